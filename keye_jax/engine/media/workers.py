"""Processes that plan and decode the media of requests."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from keye_jax.engine.media.arena import Arena
from keye_jax.engine.media.downloads import DownloadFolder
from keye_jax.engine.media.events import Broken, Finished, MediaEvent, Pixels, Planned
from keye_jax.engine.media.frame_cache import FrameCache
from keye_jax.engine.media.hashes import FileHashes
from keye_jax.engine.media.lane import Failed, Job, Lane
from keye_jax.engine.media.work import Decoded, Stopped, failure, frames_per_piece
from keye_jax.engine.media.worker import Settings
from keye_jax.errors import UserError
from keye_jax.processor import Processor, PromptPlan
from keye_jax.processor.messages import MAX_DEPTH

PIECE_PATCHES = 8192
"""Patches that the vision encoder takes in one step."""

BYTE_BUDGET = 1 << 30

# A plan that takes longer than this, in seconds, does not hold others up: helpers are started, at most so many.
_SLOW_PLAN_S, _MOST_HELPERS = 1.0, 8

_log = logging.getLogger(__name__)


class MediaWorkers:
    """Plans and decodes the media of requests in processes of their own.

    A request goes through two steps. After `submit` its prompt is planned, and `Planned` tells its tokens. After
    `decode` its frames come as `Pixels`, in the order of the prompt, and then `Finished`. `Broken` may come at any time
    in place of the rest. A worker does one thing at a time: what crashes it or holds it up costs only one request.

    Frames are decoded into shared memory of a fixed size. Without room for the next piece a worker waits, so memory
    does not depend on the length of a video. Pieces have to be released without waiting for other requests.

    Requests with arrays or PIL images in them, and plans that the caller made, are worked on by threads of this
    process; without worker processes all are. There, a crash is not contained, and the time limit does not hold.

    Any thread may call the methods. Only `close` waits for workers.

    Args:
      processor: plans and decodes; the workers get a copy.
      processes: how many requests are decoded at once; 0 for one, by a thread of this process.
      byte_budget: bytes of shared memory.
      frame_cache: decoded frames on disk; None for none.
      hashes: whether media are named by their content; with a frame cache they always are.
      timeout: seconds that a worker may take to plan a request, downloads included, and to decode each piece of it.
        Waiting for memory does not count.
      piece_patches: most patches of a piece of more than one frame.
      notify: called, from any thread, when there are events for `poll`.

    Attributes:
      arena: the shared memory; it counts what is used.
      folder: for downloads.

    Raises:
      UserError: a number is not allowed.
    """

    def __init__(
        self,
        processor: Processor,
        processes: int = 2,
        byte_budget: int = BYTE_BUDGET,
        *,
        frame_cache: FrameCache | None = None,
        hashes: bool = True,
        timeout: float = 300,
        piece_patches: int = PIECE_PATCHES,
        notify: Callable[[], None] = lambda: None,
    ):
        if processes < 0:
            raise UserError(f"processes is {processes}; it must not be negative")
        for name, value in (("byte_budget", byte_budget), ("timeout", timeout)):
            if value <= 0:
                raise UserError(f"{name} is {value}; it must be positive")
        self._settings = Settings(processor, frame_cache, piece_patches, hashes or frame_cache is not None)
        self._setup = pickle.dumps(self._settings, pickle.HIGHEST_PROTOCOL)
        self._threads_only = processes == 0
        self._processes, self._timeout, self._notify = max(1, processes), timeout, notify
        self.arena = Arena(byte_budget, byte_budget // self._processes)
        self._downloads = DownloadFolder()
        self.folder = self._downloads.path
        self._files = FileHashes()
        self._serials = itertools.count()
        self._changed = threading.Condition()
        # Of the lock of `_changed`:
        self._jobs: dict[Hashable, Job] = {}
        self._to_plan: deque[Job] = deque()
        self._to_decode: deque[Job] = deque()
        self._events: deque[tuple[Job, MediaEvent]] = deque()
        self._lanes: dict[Lane, threading.Thread] = {}
        self._planning = self._decoding = self._idle = 0  # lanes that do so; those that start are idle
        self._closed = False
        with self._changed:
            # One more than may decode, so that planning does not wait for a long video.
            for _ in range(self._processes + 1):
                self._add_lane()

    def __enter__(self) -> MediaWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run."""
        with self._changed:
            return [process.pid for lane in self._lanes if (process := lane.process) is not None]

    def submit(
        self,
        job_id: Hashable,
        messages: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        plan: PromptPlan | None = None,
    ) -> None:
        """Has a request planned.

        Args:
          job_id: its name in events.
          messages, options: the arguments of `Processor.plan`.
          plan: what `Processor.plan` returned, in their place. It is closed when the request ends.

        Raises:
          ValueError: another request has this name.
        """
        job = Job(job_id, next(self._serials), plan=plan, messages=messages or (), options=options or {})
        if plan is None and not self._threads_only and not _holds_pixels((messages, options)):
            # What cannot be pickled is not a request from outside either.
            with contextlib.suppress(Exception):
                job.request = pickle.dumps((job.messages, job.options), pickle.HIGHEST_PROTOCOL)
        with self._changed:
            if job_id in self._jobs:
                raise ValueError(f"job_id is {job_id!r}; another request has this name")
            self._jobs[job_id] = job
            self._to_plan.append(job)
            self._changed.notify_all()

    def decode(
        self,
        job_id: Hashable,
        skip: Mapping[int, int] | None = None,
        shown: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        """Has the media of a planned request decoded.

        Args:
          skip: how many of the first frames of a medium are not needed, by its place in `Prompt.media`.
          shown: what `Decoded.shown` said of media that are not needed now.
        """
        with self._changed:
            job = self._jobs.get(job_id)
            if job is None:  # it was cancelled
                return
            assert job.prompt is not None, "decode comes after Planned"
            job.skip, job.shown = dict(skip or {}), dict(shown or {})
            media = enumerate(job.prompt.media)
            if job.shown or any(job.skip.get(index, 0) < medium.frames for index, medium in media):
                self._to_decode.append(job)
                self._changed.notify_all()
                return
        times = job.prompt.frame_times
        none = tuple(np.zeros(0) for _ in times)
        self._tell(job, Finished(job_id, Decoded(times, none, job.prompt.warnings)))

    def cancel(self, job_id: Hashable) -> None:
        """Ends a request. No more events come about it; pieces that were taken still have to be released."""
        with self._changed:
            job = self._jobs.pop(job_id, None)
            if job is None:
                return
            job.cancelled = True
            for queue in (self._to_plan, self._to_decode):
                if job in queue:
                    queue.remove(job)
            events, self._events = self._events, deque()
            for each, event in events:
                if each is not job:
                    self._events.append((each, event))
                elif isinstance(event, Pixels):
                    event.release()
        self.arena.wake()
        job.close()

    def poll(self) -> list[MediaEvent]:
        """The events since the last call, in the order in which they happened. Does not wait."""
        with self._changed:
            events, self._events = self._events, deque()
        return [event for _, event in events]

    def close(self) -> None:
        """Ends all requests and workers. Does nothing the second time."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            jobs, lanes = list(self._jobs), dict(self._lanes)
            self._changed.notify_all()
        for job_id in jobs:
            self.cancel(job_id)
        for lane, thread in lanes.items():
            lane.kill()
            thread.join()
        self.arena.close()
        self._downloads.close()

    def _add_lane(self) -> None:
        lane = Lane(self._settings, self._setup, self.folder, self.arena, self._timeout, self._files)
        self._lanes[lane] = threading.Thread(target=self._run, args=(lane,), name="keye-jax media", daemon=True)
        self._idle += 1
        self._lanes[lane].start()

    def _run(self, lane: Lane) -> None:
        """A thread: starts a worker, and has it work."""
        if not self._threads_only:
            with contextlib.suppress(Failed):  # it is started again for the first request, and fails that
                lane.start()
        with self._changed:
            self._idle -= 1
        while (job := self._next(lane)) is not None:
            decoding = job.prompt is not None
            event: MediaEvent | None = None
            try:
                event = self._decode(lane, job) if decoding else self._plan(lane, job)
            except Stopped:
                pass
            except Failed as failed:
                event = Broken(job.job_id, *failed.args)
            except Exception as error:
                if not isinstance(error, UserError):
                    lane.close()  # its worker may be in the middle of something
                event = Broken(job.job_id, *failure(error, _log.exception))
            with self._changed:
                self._decoding -= decoding
                self._planning -= not decoding
                self._changed.notify_all()
            if event is None:
                job.close()
            else:
                self._tell(job, event)
        lane.close()

    def _next(self, lane: Lane) -> Job | None:
        """Waits for work; None if there will be none."""
        with self._changed:
            self._idle += 1
            try:
                while not self._closed:
                    plans, decodes = self._startable()
                    if plans:
                        self._planning += 1
                        return self._to_plan.popleft()
                    if decodes:
                        self._decoding += 1
                        return self._to_decode.popleft()
                    if len(self._lanes) > self._processes + 1:
                        break
                    self._changed.wait()
                del self._lanes[lane]
                return None
            finally:
                self._idle -= 1

    def _startable(self) -> tuple[int, int]:
        """How many plans, and how many videos, another lane could begin with.

        So many of both may be under way that plans, however many are slow, leave lanes for decoding.
        """
        plans = min(len(self._to_plan), 1 + _MOST_HELPERS - self._planning)
        return plans, min(len(self._to_decode), self._processes - self._decoding)

    def _plan(self, lane: Lane, job: Job) -> MediaEvent:
        begin = time.monotonic()

        def look() -> None:
            with self._changed:
                slow = time.monotonic() - begin > _SLOW_PLAN_S
                if slow and sum(self._startable()) > self._idle and not self._closed:
                    self._add_lane()

        prompt = lane.plan(job, look)
        largest = 0
        for medium in prompt.media:
            largest = max(largest, medium.frame_bytes * frames_per_piece(medium, self._settings.piece_patches))
        if largest > self.arena.size:
            kept = f"byte_budget is {self.arena.size:,}"
            return Broken(
                job.job_id, "too_large", f"the media need {largest:,} bytes at once; {kept}, and must be at least that"
            )
        job.prompt = prompt
        return Planned(job.job_id, prompt)

    def _decode(self, lane: Lane, job: Job) -> MediaEvent:
        with self._changed:
            at_once = min(self._processes, self._decoding + len(self._to_decode))
        # A video that is alone has all cores.
        threads = max(1, _cores() // at_once)
        return Finished(job.job_id, lane.decode(job, functools.partial(self._give, job), threads))

    def _give(self, job: Job, offset: int, number: int, first_frame: int, frames: int) -> None:
        """Tells a piece."""
        assert job.prompt is not None
        medium, patch = job.prompt.media[number], self._settings.processor.patch_size
        patches = self.arena.view(offset, frames * medium.frame_bytes).reshape(-1, 3, patch, patch)
        pixels = Pixels(
            job.job_id,
            number,
            first_frame,
            np.tile(np.array(medium.grid, np.int32), (frames, 1)),
            medium.first_pad + first_frame * medium.tokens_per_frame,
            frames * medium.tokens_per_frame,
            patches,
            functools.partial(self.arena.free, offset),
        )
        self._tell(job, pixels)

    def _tell(self, job: Job, event: MediaEvent) -> None:
        ended = isinstance(event, Finished | Broken)
        with self._changed:
            if wanted := not job.cancelled:
                self._events.append((job, event))
                if ended:
                    del self._jobs[job.job_id]
            elif isinstance(event, Pixels):
                event.release()
        if ended or not wanted:
            job.close()
        if wanted:
            self._notify()


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _holds_pixels(value: Any, depth: int = 0) -> bool:
    """Whether there are arrays or PIL images anywhere in `value`."""
    if isinstance(value, np.ndarray | Image.Image):
        return True
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return False
    return depth < 2 * MAX_DEPTH and any(_holds_pixels(item, depth + 1) for item in value)
