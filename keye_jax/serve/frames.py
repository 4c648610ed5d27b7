"""What the model sees of a picture or a video, for the page: times, sizes, and small pictures."""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keye_jax.call_process import CallProcess
from keye_jax.errors import UserError
from keye_jax.processor import ImagePlan, MediaPlanner

_TIMEOUT_S = 60.0
_QUALITY = 80


class FrameReader:
    """Shows media in a process of its own, which a damaged file may crash or hold up without harm to others.

    One medium is shown after the other. The time of each begins with its turn.

    Args:
      planner: measures media.
    """

    def __init__(self, planner: MediaPlanner):
        self._setup = pickle.dumps(planner)
        self._turns = concurrent.futures.ThreadPoolExecutor(1, "keye-jax frames")
        self._process: _Process | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the process; None if there is none."""
        process = self._process
        return None if process is None else process.pid

    def close(self) -> None:
        """Ends the process."""
        self._closed = True
        self._turns.shutdown(wait=False, cancel_futures=True)
        if (process := self._process) is not None:
            process.kill()
        self._turns.shutdown()
        self._end()

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
        return await asyncio.get_running_loop().run_in_executor(self._turns, self._ask, function, arguments)

    def _ask(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        for _ in range(2):  # a process that ended while it had nothing to do is no fault of this medium
            if self._closed:
                break
            if self._process is None:
                self._process = _Process(self._setup)
            try:
                returned, answer = self._process.ask(function, *arguments, timeout=_TIMEOUT_S)
            except TimeoutError:
                self._end()
                break
            except (EOFError, OSError):
                self._end()
                continue
            if not returned:
                raise answer
            return answer
        raise UserError("the medium cannot be shown: what reads it crashed or takes too long")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()


class _Process(CallProcess):
    """The process, with a folder for what it downloads."""

    def __init__(self, setup: bytes):
        self._folder = tempfile.mkdtemp(prefix="keye-jax-frames-")
        super().__init__(_start, setup, self._folder)

    def close(self) -> None:
        """Ends it, and removes what it has downloaded."""
        self.kill()
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _start(setup: bytes, folder: str) -> MediaPlanner:
    tempfile.tempdir = folder
    return pickle.loads(setup)


def _describe(planner: MediaPlanner, source: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    with _plan(planner, source, options) as plan:
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


def _picture(planner: MediaPlanner, source: str | Path, options: dict[str, Any], frame: int, width: int) -> bytes:
    with _plan(planner, source, options) as plan:
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


def _plan(planner: MediaPlanner, source: str | Path, options: dict[str, Any]) -> Any:
    return planner.file(source, "media", options)
