"""What the model sees of a picture or a video, for the page: times, sizes, and small pictures."""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keye_jax.errors import UserError
from keye_jax.processor import ImagePlan, MediaPlanner

_TIMEOUT_S = 60.0
_QUALITY = 80

_planner: MediaPlanner | None = None


class FrameReader:
    """Shows media in a process of its own, which a damaged file may crash or hold up without harm to others.

    Args:
      planner: measures media.
    """

    def __init__(self, planner: MediaPlanner):
        self._setup = pickle.dumps(planner)
        self._pool: ProcessPoolExecutor | None = None

    def close(self) -> None:
        """Ends the process."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)

    async def describe(self, source: str | Path, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the model sees: kind, width, height, tokens, and of a video its seconds and the times of its frames.

        Args:
          source: a path or a URL.
          options: of the medium, as a part of a message has them.

        Raises:
          UserError: the medium or an option is not valid.
        """
        return await self._call(_describe, source, dict(options))

    async def picture(self, source: str | Path, options: Mapping[str, Any], frame: int, width: int) -> bytes:
        """A frame that the model sees as a JPEG of `width` pixels. Raises UserError as `describe` does."""
        return await self._call(_picture, source, dict(options), frame, width)

    async def _call[T](self, function: Callable[..., T], *arguments: Any) -> T:
        for last in (False, True):
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, context, _set_up, (self._setup,))
            pool = self._pool
            try:
                wanted = asyncio.get_running_loop().run_in_executor(pool, function, *arguments)
                return await asyncio.wait_for(wanted, _TIMEOUT_S)
            except (BrokenProcessPool, TimeoutError) as error:
                if self._pool is pool:
                    self.close()
                if last or isinstance(error, TimeoutError):
                    raise UserError("the medium cannot be shown: what reads it crashed or takes too long") from error
        raise AssertionError("the second try returns or raises")


def _set_up(setup: bytes) -> None:
    global _planner
    _planner = pickle.loads(setup)


def _describe(source: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    with _plan(source, options) as plan:
        values: dict[str, Any] = {"object": "frames", "width": plan.width, "height": plan.height}
        if isinstance(plan, ImagePlan):
            return {**values, "kind": "image", "num_tokens": plan.num_tokens, "warnings": list(plan.warnings)}
        info = plan.source.info
        frames = [{"frame": i, "time": round(float(time), 3)} for i, time in enumerate(plan.times)]
        return {
            **values,
            "kind": "video",
            "seconds": round(float(info.duration), 3),
            "num_tokens": plan.num_tokens,
            "frames": frames,
            "warnings": list(plan.warnings),
        }


def _picture(source: str | Path, options: dict[str, Any], frame: int, width: int) -> bytes:
    with _plan(source, options) as plan:
        count = 1 if isinstance(plan, ImagePlan) else plan.frames
        if not 0 <= frame < count:
            raise UserError(f"frame is {frame}; it must be from 0 to {count - 1}")
        if isinstance(plan, ImagePlan):
            pixels = plan.pixels(lambda _: None)
        else:
            (_, pixels), *_ = plan.pixels(np.array([frame]), threads=1)
        picture = Image.fromarray(pixels)
        picture.thumbnail((width, 4 * width))
        written = io.BytesIO()
        picture.save(written, "JPEG", quality=_QUALITY)
        return written.getvalue()


def _plan(source: str | Path, options: dict[str, Any]) -> Any:
    assert _planner is not None, "the process is set up"
    return _planner.file(source, "media", options)
