"""Many requests, one model: what a server, a batch job or a program asks.

One thread runs the devices. It takes what came, asks the scheduler what to do, queues that step, and then looks at the
tokens of the step before. Media are planned and decoded in processes of their own.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from keye_jax.engine.generation_config import GenerationDefaults
from keye_jax.engine.handle import Handle
from keye_jax.engine.job import Answering, Encoding, Job
from keye_jax.engine.media.embeddings import EmbeddingCache
from keye_jax.engine.media.frame_cache import FrameCache
from keye_jax.engine.media.hashes import block_hashes
from keye_jax.engine.media.work import Decoded, Prompt
from keye_jax.engine.media.workers import Broken, Finished, MediaWorkers, Pixels, Planned
from keye_jax.engine.options import EngineOptions, scheduler_config
from keye_jax.engine.plan import Arrival, Cancel, Ended, Failed, Measured, Plan, Ready
from keye_jax.engine.plan import Event as SchedulerEvent
from keye_jax.engine.request import (
    DEFAULT_NEW_TOKENS,
    Choice,
    Piece,
    Request,
    RequestError,
    Result,
    Timings,
    TokenLogprob,
    Usage,
)
from keye_jax.engine.scheduler import Scheduler
from keye_jax.engine.stepper import DrawnToken, DrawnTokens, SequenceData, Stepper
from keye_jax.engine.text import AnswerWriter
from keye_jax.errors import UserError
from keye_jax.page_allocator import PAGE_SIZE
from keye_jax.processor import Processor
from keye_jax.progress import Progress
from keye_jax.runtime.encode import ENCODE_PATCHES
from keye_jax.runtime.runtime import Runtime

MOST_ENCODING = 8
"""Steps of encoding that are queued together: patches and embeddings of more would fill the devices' memory."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts for metrics.

    Attributes:
      scheduler: those of the scheduler.
      compilations: programs compiled since `warmup`, which should be none.
      steps: steps so far.
      embedding_hits: media whose embeddings were kept.
    """

    scheduler: Any
    compilations: int
    steps: int
    embedding_hits: int


class Engine:
    """Answers many requests at once with one model. All methods may be called from any thread.

    Args:
      runtime: the model. Its `prefill_chunk` is the large chunk.
      processor: turns messages into prompts.
      defaults: of the checkpoint: how tokens are drawn, and which end an answer.
      options: how the devices are shared out.

    Raises:
      UserError: an option is not allowed.
    """

    def __init__(
        self,
        runtime: Runtime,
        processor: Processor,
        defaults: GenerationDefaults,
        options: EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
    ):
        self.runtime, self.processor, self.defaults, self.options = runtime, processor, defaults, options
        self._most_patches = processor.media.most_pixels // runtime.config.vision_config.patch_size**2
        if runtime.rules.platform == "cpu":
            self._most_patches = min(self._most_patches, ENCODE_PATCHES)  # a larger image takes minutes there
        self.scheduler_config = scheduler_config(runtime, options, self._most_patches)
        self._scheduler = Scheduler(self.scheduler_config)
        self._stepper = Stepper(
            runtime, self.scheduler_config, pixel_scale=processor.pixel_scale, pixel_shift=processor.pixel_shift
        )
        self._changed = threading.Condition()
        self._inbox: collections.deque[tuple[str, Job]] = collections.deque()
        cache = FrameCache(options.frame_cache, options.frame_cache_bytes) if options.frame_cache else None
        self._media = MediaWorkers(
            processor,
            options.media_workers,
            options.media_bytes,
            frame_cache=cache,
            timeout=options.media_timeout,
            notify=self._wake,
        )
        self._embeddings: EmbeddingCache[np.ndarray] = EmbeddingCache(options.embedding_cache_bytes)
        self._jobs: dict[int, Job] = {}
        self._choices: dict[str, tuple[Job, Answering]] = {}
        self._events: list[SchedulerEvent] = []
        self._pixels: collections.deque[Pixels] = collections.deque()
        self._encoding: collections.deque[Encoding] = collections.deque()
        self._numbers = itertools.count()
        self._steps = self._compilations = 0
        self._draining = self._closing = self._poked = False
        self._warm: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name="keye-jax engine", daemon=True)
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)
        self._thread.start()

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path,
        *,
        options: EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
        **settings: Any,
    ) -> Engine:
        """An engine for a checkpoint, safetensors or Orbax.

        Args:
          options: how the devices are shared out.
          settings: arguments of `keye_jax.engine.checkpoint.load`.

        Raises:
          UserError: the checkpoint or a setting is not valid.
        """
        from keye_jax.engine.checkpoint import load  # Orbax takes seconds to import

        return cls(*load(directory, **settings), options=options)

    def submit(self, request: Request) -> Handle:
        """Takes a request. What is wrong with it comes through the handle.

        Raises:
          RequestError: the engine is closed or about to be.
        """
        job = Job(next(self._numbers), request, Handle(lambda: self._post("cancel", job)), time.perf_counter())
        with self._changed:
            if self._draining:
                raise RequestError("closed", "the engine takes no more requests")
            self._inbox.append(("submit", job))
            self._changed.notify_all()
        return job.handle

    def warmup(self, progress: Progress = lambda done, total: None) -> float:
        """Compiles all programs; returns the seconds that it took. Requests may come meanwhile and wait.

        Afterwards no request compiles a program, but for images beyond the checkpoint's limits. On a CPU images of more
        than `ENCODE_PATCHES` patches are left out.

        Raises:
          RequestError: the engine was closed meanwhile.
        """
        start = time.perf_counter()
        done = threading.Event()
        failure: list[BaseException] = []

        def run() -> None:
            try:
                self._stepper.warmup(self._most_patches, progress)
                self._compilations = 0
            except BaseException as error:
                failure.append(error)
            done.set()

        with self._changed:
            self._warm = run
            self._changed.notify_all()
        while not done.wait(1.0):
            if not self._thread.is_alive():
                raise RequestError("closed", "the engine was closed")
        if failure:
            raise failure[0]
        return time.perf_counter() - start

    @property
    def cache_tokens(self) -> int:
        """Tokens that the page pool holds, of all sequences together."""
        config = self.scheduler_config
        return config.pages_per_shard * config.homes * config.turns * PAGE_SIZE

    def stats(self) -> EngineStats:
        """Counts for metrics."""
        return EngineStats(self._scheduler.stats, self._compilations, self._steps, self._embeddings.hits)

    def drain(self) -> None:
        """Takes no more requests, and waits until all that there are have ended."""
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: not self._jobs and not self._inbox)

    def close(self) -> None:
        """Ends all requests and frees the devices."""
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._media.close()
        self._stepper.close()
        with contextlib.suppress(ValueError):
            jax.monitoring.unregister_event_duration_listener(self._count_compilation)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What other threads do.

    def _post(self, what: str, job: Job) -> None:
        with self._changed:
            self._inbox.append((what, job))
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._poked = True
            self._changed.notify_all()

    def _count_compilation(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and threading.current_thread() is self._thread:
            self._compilations += 1

    # The engine's thread.

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:
            _log.exception("the engine failed")
            failure = RequestError("closed", f"the engine failed: {type(error).__name__}: {error}")
        else:
            failure = RequestError("closed", "the engine was closed")
        with self._changed:
            self._draining = self._closing = True
            for _, job in self._inbox:
                job.handle.put(failure)
            for job in self._jobs.values():
                job.handle.put(failure)
            self._inbox.clear()
            self._jobs.clear()
            self._changed.notify_all()

    def _loop(self) -> None:
        before: tuple[Plan, DrawnTokens] | None = None
        started = time.perf_counter()
        while True:
            with self._changed:
                if self._closing:
                    return
                inbox, self._inbox = self._inbox, collections.deque()
                warm, self._warm, self._poked = self._warm, None, False
            if warm:
                warm()
            self._take(inbox)
            self._take_media()
            self._encode(all_of_them=before is None)
            events, self._events = self._events, []
            plan = self._scheduler.step(events)
            for name, tokens in plan.cached:
                job, choice = self._choices[name]
                job.stamp("admitted")
                job.cached = max(job.cached, tokens) if choice.number == 0 else job.cached
            now = None
            if plan != Plan(cached=plan.cached, ended=plan.ended):
                now = plan, self._stepper.run(plan, lambda name: self._choices[name][1].data)
                self._steps += 1
            if before is not None:
                self._deliver(before[1].fetch())
                ended = time.perf_counter()
                read, decode = before[0].read, before[0].decode
                if read or decode:
                    self._events.append(Measured(ended - started, read.program if read else None, decode))
                started = ended
            before = now
            if before is None and not self._events:
                started = time.perf_counter()
                with self._changed:
                    self._changed.notify_all()
                    busy = self._pixels or self._encoding
                    self._changed.wait_for(
                        lambda: self._inbox or self._closing or self._poked or self._warm, 0.0 if busy else None
                    )

    def _take(self, inbox: collections.deque[tuple[str, Job]]) -> None:
        for what, job in inbox:
            if what == "cancel":
                self._cancel(job)
                continue
            self._jobs[job.id] = job
            request = job.request
            try:
                self._check(request)
            except UserError as error:
                self._fail(job, "invalid", str(error))
                continue
            self._media.submit(job.id, request.messages, request.options, plan=request.plan)

    def _check(self, request: Request) -> None:
        vocab = self.runtime.config.vocab_size
        for token in request.logit_bias:
            if not 0 <= token < vocab:
                raise UserError(f"logit_bias has token {token}; it must be from 0 to {vocab - 1}")

    def _take_media(self) -> None:
        for event in self._media.poll():
            job = self._jobs.get(event.job_id) if isinstance(event.job_id, int) else None
            if job is None:
                if isinstance(event, Pixels):
                    event.release()
            elif isinstance(event, Planned):
                self._arrive(job, event.prompt)
            elif isinstance(event, Pixels):
                self._pixels.append(event)
            elif isinstance(event, Finished):
                job.decoded = event.decoded
                job.stamp("media")
                self._finish(job)
            elif isinstance(event, Broken):
                self._fail(job, event.kind, event.message)

    def _arrive(self, job: Job, prompt: Prompt) -> None:
        """Makes the sequences of a planned request."""
        request, config = job.request, self.runtime.config
        job.prompt = prompt
        job.stamp("planned")
        length = len(prompt.input_ids)
        room = self.scheduler_config.most_tokens - length
        limit = request.max_tokens or max(1, min(DEFAULT_NEW_TOKENS, room))
        try:
            self._scheduler.check(length, limit)
        except UserError as error:
            self._media.cancel(job.id)
            self._fail(job, "too_large", str(error))
            return
        pads = np.isin(prompt.input_ids, (config.image_token_id, config.video_token_id))
        before = np.concatenate([[0], np.cumsum(pads)])
        job.embeds = np.zeros((int(before[-1]), config.hidden_size), self.runtime.dtype)
        job.filled = np.zeros(int(before[-1]), bool)
        job.frames_left = [medium.frames for medium in prompt.media]
        skip = {}
        for number, medium in enumerate(prompt.media):
            found = self._embeddings.get(medium.hash)
            if found is not None:
                job.embeds[medium.first_pad : medium.first_pad + medium.pads] = found
                job.filled[medium.first_pad : medium.first_pad + medium.pads] = True
                job.frames_left[number], skip[number] = 0, medium.frames
        hashes: tuple[bytes, ...] = ()
        if self.options.prefix_cache:
            media = [(medium.hash, medium.pads) for medium in prompt.media]
            pad_ids = (config.image_token_id, config.video_token_id)
            hashes = tuple(block_hashes(prompt.input_ids, media, pad_ids, self.options.small_chunk))
        sampling = request.sampling or self.defaults.sampling
        for number in range(request.n):
            data = SequenceData(
                prompt.input_ids,
                prompt.positions,
                prompt.position_delta,
                before,
                job.embeds,
                dataclasses.replace(sampling, seed=sampling.seed + number),
                request.logit_bias,
            )

            def emit(text: str, reasoning: bool, number: int = number) -> None:
                job.handle.put(Piece(number, text, reasoning))

            writer = AnswerWriter(self.processor, prompt.prompt_opens_thinking, emit, request.stop)
            logprobs = None if request.top_logprobs is None else []
            choice = Answering(f"{job.id}.{number}", number, data, writer, logprobs, limit)
            job.choices.append(choice)
            self._choices[choice.id] = job, choice
            self._events.append(Arrival(choice.id, length, limit, hashes))
        self._media.decode(job.id, skip)
        self._tell_ready(job)

    def _tell_ready(self, job: Job) -> None:
        """Tells the scheduler up to where the prompt can be read."""
        self._events += [Ready(choice.id, job.ready) for choice in job.choices if choice.choice is None]

    def _encode(self, *, all_of_them: bool) -> None:
        """Takes embeddings that are there, and queues the encoding of the next frames: one piece a step."""
        while self._encoding:
            self._place(self._encoding.popleft())
        while self._pixels:
            pixels = self._pixels.popleft()
            if not isinstance(pixels.job_id, int) or pixels.job_id not in self._jobs:
                pixels.release()
                continue
            grid = pixels.grids[0]
            each = int(grid[1] * grid[2])
            at_once = self._stepper.images_at_once(each)
            tokens = pixels.pads // pixels.frames
            for first in range(0, pixels.frames, at_once):
                count = min(at_once, pixels.frames - first)
                patches = pixels.patches[first * each : (first + count) * each]
                encoded = self._stepper.encode(patches, grid)
                pad = pixels.first_pad + first * tokens
                self._encoding.append(Encoding(pixels.job_id, pixels.medium, count, tokens, pad, encoded))
            pixels.release()
            if not all_of_them or len(self._encoding) >= MOST_ENCODING:
                return

    def _place(self, part: Encoding) -> None:
        """Puts embeddings where the prompt has their pads."""
        job = self._jobs.get(part.job_id)
        if job is None or job.embeds is None or job.filled is None or job.prompt is None:
            return
        place = slice(part.first_pad, part.first_pad + part.frames * part.tokens)
        job.embeds[place] = self._stepper.embeddings(part.encoded, part.frames, part.tokens)
        job.filled[place] = True
        job.frames_left[part.medium] -= part.frames
        if not job.frames_left[part.medium]:
            medium = job.prompt.media[part.medium]
            whole = job.embeds[medium.first_pad : medium.first_pad + medium.pads]
            self._embeddings.put(medium.hash, whole.copy())
        self._tell_ready(job)

    def _deliver(self, tokens: list[DrawnToken]) -> None:
        """Gives tokens to the answers that drew them."""
        for drawn in tokens:
            found = self._choices.get(drawn.id)
            if found is None or found[1].choice is not None:
                continue
            job, choice = found
            job.stamp("first_token")
            now = job.at["last_token"] = time.perf_counter() - job.submitted
            if drawn.token in self.defaults.end_tokens:
                self._end(job, choice, "stop")
                continue
            choice.data.tokens.append(drawn.token)
            choice.times.append(now)
            if choice.logprobs is not None:
                top = job.request.top_logprobs or 0
                pairs = zip(drawn.top_tokens[:top].tolist(), drawn.top_logprobs[:top].tolist(), strict=True)
                choice.logprobs.append(TokenLogprob(drawn.token, drawn.logprob, tuple(pairs)))
            choice.writer.write(drawn.token)
            if choice.writer.stopped:
                self._end(job, choice, "stop")
            elif len(choice.data.tokens) == choice.max_tokens:
                self._end(job, choice, "length")

    def _end(self, job: Job, choice: Answering, reason: Any) -> None:
        """Ends one answer, and with the last one the request."""
        text, reasoning = choice.writer.finish()
        logprobs = None if choice.logprobs is None else tuple(choice.logprobs)
        writer = choice.writer
        choice.choice = Choice(
            text,
            reasoning,
            reason,
            tuple(writer.token_ids),
            writer.reasoning_tokens,
            logprobs,
            tuple(choice.times),
        )
        if reason != "length":
            self._events.append(Cancel(choice.id) if reason == "cancelled" else Ended(choice.id))
        self._finish(job)

    def _finish(self, job: Job) -> None:
        """Gives the result out, if all answers are there and all is known about the media."""
        choices = [choice.choice for choice in job.choices if choice.choice is not None]
        if not job.choices or len(choices) < len(job.choices) or job.decoded is None or job.prompt is None:
            return
        prompt = job.prompt
        usage = Usage(
            len(prompt.input_ids),
            prompt.image_tokens,
            prompt.video_tokens,
            job.cached,
            sum(len(choice.token_ids) for choice in choices),
            sum(choice.reasoning_tokens for choice in choices),
        )
        names = [field.name for field in dataclasses.fields(Timings)]
        timings = Timings(**{name: job.at.get(name, job.at.get("planned", 0.0)) for name in names})
        times = tuple(tuple(each.tolist()) for each in prompt.frame_times)
        self._leave(job, Result(tuple(choices), usage, timings, times, job.decoded.warnings))

    def _fail(self, job: Job, kind: str, message: str) -> None:
        self._events += [Failed(choice.id) for choice in job.choices if choice.choice is None]
        self._leave(job, RequestError(kind, message))

    def _cancel(self, job: Job) -> None:
        if job.id not in self._jobs:
            return
        self._media.cancel(job.id)
        if job.prompt is None:
            self._leave(job, RequestError("cancelled", "the request was cancelled before it was planned"))
            return
        job.decoded = job.decoded or Decoded((), job.prompt.warnings, 0)
        for choice in job.choices:
            if choice.choice is None:
                self._end(job, choice, "cancelled")

    def _leave(self, job: Job, outcome: Result | RequestError) -> None:
        for choice in job.choices:
            del self._choices[choice.id]
            self._stepper.forget(choice.id)
        with self._changed:
            self._jobs.pop(job.id, None)
            self._changed.notify_all()
        job.handle.put(outcome)
