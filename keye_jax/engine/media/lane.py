"""The work on one request after another: in a worker process, or in the calling thread."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keye_jax.engine.media.arena import Arena
from keye_jax.engine.media.hashes import FileHashes
from keye_jax.engine.media.process import ProcessEnded, WorkerProcess
from keye_jax.engine.media.work import Decoded, Prompt, Stopped, decode, describe
from keye_jax.engine.media.worker import Settings
from keye_jax.processor import PromptPlan

# Seconds that a worker may take to notice that its work is no longer wanted.
_STOP_S = 2

type Give = Callable[[int, int, int, int], None]
"""Takes a piece: offset of its block in the arena, medium, first frame, number of frames."""


@dataclasses.dataclass(eq=False)
class Job:
    """A request.

    Attributes:
      serial: a number of its own.
      request: pickled (messages, options); None if the work is done in this process.
      messages, options: as for `Processor.plan`.
      plan: the plan; pickled unless the work is done in this process.
      prompt: what is told about it, once it is planned.
      skip, shown: as for `MediaWorkers.decode`.
      folder: of downloads; None before it is planned by a worker.
      cancelled: whether nothing more is wanted of it.
    """

    job_id: Hashable
    serial: int
    messages: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    request: bytes | None = None
    plan: PromptPlan | bytes | None = None
    prompt: Prompt | None = None
    skip: Mapping[int, int] = dataclasses.field(default_factory=dict)
    shown: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    cancelled: bool = False

    @property
    def for_worker(self) -> bool:
        """Whether a worker process does the work."""
        return self.request is not None

    def close(self) -> None:
        """Removes downloaded files."""
        if isinstance(self.plan, PromptPlan):
            self.plan.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class Failed(Exception):
    """A request failed because of what happened to its worker. The arguments are kind and message of `Broken`."""


class Lane:
    """Plans and decodes, one request at a time.

    Args:
      settings: what a worker needs to know.
      setup: the same, pickled.
      folder: for the folders of requests.
      arena: where pixels go.
      timeout: as for `MediaWorkers`.
      files: hashes of files.

    Attributes:
      process: the worker process that runs; None if there is none.
    """

    def __init__(self, settings: Settings, setup: bytes, folder: Path, arena: Arena, timeout: float, files: FileHashes):
        self._settings, self._setup, self._folder, self._arena = settings, setup, folder, arena
        self._timeout, self._files = timeout, files
        self.process: WorkerProcess | None = None

    def start(self) -> WorkerProcess:
        """The worker process; a new one if there is none or it ended, which is no fault of the request that comes now.

        Raises:
          Failed: it does not start.
        """
        if self.process is not None and self.process.answers():
            return self.process
        self.close()
        try:
            self.process = WorkerProcess(self._setup, self._arena.descriptor)
        except (ProcessEnded, TimeoutError, OSError) as error:
            raise Failed("internal", f"a worker process for media does not start: {error}") from error
        return self.process

    def kill(self) -> None:
        """Makes the work end at once, from another thread."""
        if (process := self.process) is not None:
            process.kill()

    def close(self) -> None:
        """Ends the worker process."""
        process, self.process = self.process, None
        if process is not None:
            process.close()

    def plan(self, job: Job, look: Callable[[], None]) -> Prompt:
        """Plans a request, and keeps the plan in it.

        Args:
          look: is called from time to time.

        Raises:
          Failed, UserError: it failed.
          Stopped: it was cancelled.
        """
        if not job.for_worker:
            processor = self._settings.processor
            plan = job.plan if isinstance(job.plan, PromptPlan) else processor.plan(job.messages, **job.options)
            job.plan = plan
            return describe(processor, plan, self._files if self._settings.hashes else None)
        process = self.start()
        with self._watched(job, lambda: "the media of the request"):
            job.folder = self._folder / str(job.serial)
            job.folder.mkdir()
            process.send(("plan", job.serial, job.request, str(job.folder), self._files.known()))
            message = self._receive(process, job, look)
        _, job.plan, prompt, hashes = message
        self._files.learn(hashes)
        return prompt

    def decode(self, job: Job, give: Give, threads: int) -> Decoded:
        """Decodes the media of a planned request.

        Args:
          give: takes the pieces.
          threads: of a video decoder.

        Raises:
          Failed, UserError: it failed.
          Stopped: it was cancelled.
        """
        assert job.prompt is not None
        if isinstance(job.plan, PromptPlan):
            settings, here = self._settings, _Here(job, self._arena, give)
            try:
                return decode(
                    settings.processor,
                    job.plan,
                    job.prompt.media,
                    job.skip,
                    job.shown,
                    here,
                    piece_patches=settings.piece_patches,
                    threads=threads,
                    cache=settings.cache,
                )
            finally:
                here.close()
        process = self.start()
        wanted: tuple[int, int, int, int] | None = None  # the piece that the worker is filling
        field = job.prompt.media[0].field
        try:
            with self._watched(job, lambda: field):
                process.send(("decode", job.serial, job.plan, job.prompt.media, job.skip, job.shown, threads))
                while True:
                    message = self._receive(process, job)
                    if message[0] == "decoded":
                        return message[1]
                    if message[0] == "want":
                        medium, first, frames = message[1:]
                        field = job.prompt.media[medium].field
                        size = frames * job.prompt.media[medium].frame_bytes
                        offset = self._arena.take(job.serial, size, lambda: job.cancelled)
                        if offset is None:
                            process.send(("stop", job.serial))
                            continue
                        wanted = offset, medium, first, frames
                        process.send(("room", job.serial, offset))
                    elif wanted is not None:
                        filled, wanted = wanted, None
                        give(*filled)
        finally:
            if wanted is not None:
                self._arena.free(wanted[0])

    def _receive(self, process: WorkerProcess, job: Job, look: Callable[[], None] = lambda: None) -> tuple[Any, ...]:
        """The next message of a worker.

        Raises:
          Stopped: the worker has stopped.
          Failed: it says that the request failed.
        """
        told = False

        def looked() -> float | None:
            nonlocal told
            look()
            if not job.cancelled or told:
                return None
            told = True
            process.send(("stop", job.serial))
            return _STOP_S

        message = process.receive(self._timeout, looked)
        if message[0] == "stopped":
            raise Stopped
        if message[0] == "failed":
            raise Failed(*message[1:])
        return message

    @contextlib.contextmanager
    def _watched(self, job: Job, field: Callable[[], str]) -> Iterator[None]:
        """Ends a worker that hangs, and says why a request failed with its worker.

        Args:
          field: tells what is being read, for error messages.
        """
        try:
            yield
        except TimeoutError as error:
            self.close()
            if job.cancelled:
                raise Stopped from error
            allowed = f"each step of reading it must take at most {self._timeout:g} s"
            raise Failed("timeout", f"{field()} took too long; {allowed}") from error
        except ProcessEnded as error:
            self.close()
            if job.cancelled:
                raise Stopped from error
            raise Failed("media", f"{field()} cannot be read; the decoder crashed ({error})") from error


class _Here:
    """A `Sink` for work in this process."""

    def __init__(self, job: Job, arena: Arena, give: Give):
        assert job.prompt is not None
        self._job, self._media, self._arena, self._give = job, job.prompt.media, arena, give
        self._wanted: tuple[int, int, int, int] | None = None

    def space(self, medium: int, first_frame: int, frames: int) -> np.ndarray:
        size = frames * self._media[medium].frame_bytes
        offset = self._arena.take(self._job.serial, size, lambda: self._job.cancelled)
        if offset is None:
            raise Stopped
        self._wanted = offset, medium, first_frame, frames
        return self._arena.view(offset, size)

    def filled(self) -> None:
        filled, self._wanted = self._wanted, None
        assert filled is not None
        self._give(*filled)

    def check(self) -> None:
        if self._job.cancelled:
            raise Stopped

    def close(self) -> None:
        """Frees room that was not filled."""
        if self._wanted is not None:
            self._arena.free(self._wanted[0])
