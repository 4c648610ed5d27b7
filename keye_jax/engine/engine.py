"""Many requests, one model: what a server, a batch job or a program asks.

One thread runs the devices. It takes what came, asks the scheduler what to do, queues that step, and then looks at the
tokens of the step before. Media are planned and decoded in processes of their own. Over several hosts each has such a
thread, and all of them take the same.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from keye_jax.engine.generation_config import GenerationDefaults
from keye_jax.engine.handle import Handle
from keye_jax.engine.hosts import Command, Hosts, MediaElsewhere, Turn
from keye_jax.engine.job import Answering, Encoded, Encoding, Job, Steps
from keye_jax.engine.media.embeddings import EmbeddingCache
from keye_jax.engine.media.events import Broken, Finished, MediaEvent, Pixels, Planned
from keye_jax.engine.media.frame_cache import FrameCache
from keye_jax.engine.media.hashes import block_hashes
from keye_jax.engine.media.work import Decoded, Prompt
from keye_jax.engine.media.workers import MediaWorkers
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
from keye_jax.processor import Processor, PromptTokens
from keye_jax.progress import Progress
from keye_jax.runtime.encode import ENCODE_PATCHES
from keye_jax.runtime.runtime import Runtime

MOST_ENCODING = 8
"""Steps of encoding that are queued together: patches and embeddings of more would fill the devices' memory."""

_log = logging.getLogger(__name__)

TURN_BYTES = 32 << 20
"""Of frames that are taken in one turn. The rest is for the next one."""

_ELSEWHERE = "process 0 takes the requests of this job"


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

    A model that lies over several processes has an engine in each of them, with the same arguments. Process 0 takes
    requests; `warmup` is called in all of them, and `close` of the others waits until process 0 closes its engine.

    Args:
      runtime: the model. Its `prefill_chunk` is the large chunk.
      processor: turns messages into prompts.
      defaults: of the checkpoint: how tokens are drawn, and which end an answer.
      options: how the devices are shared out.

    Attributes:
      takes_requests: whether this process does: process 0, or the only one.

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
        self._hosts = Hosts(runtime.rules)
        self.takes_requests = self._hosts.is_main
        self._inbox: list[Command] = []
        self._told: collections.deque[MediaEvent] = collections.deque()
        self._media = self._media_workers() if self.takes_requests else MediaElsewhere()
        self._embeddings: EmbeddingCache[Encoded] = EmbeddingCache(options.embedding_cache_bytes)
        self._jobs: dict[int, Job] = {}
        self._choices: dict[str, tuple[Job, Answering]] = {}
        self._events: list[SchedulerEvent] = []
        self._pixels: collections.deque[Pixels] = collections.deque()
        self._encoding: collections.deque[Encoding] = collections.deque()
        self._numbers, self._sequences = itertools.count(), itertools.count()
        self._steps = self._compilations = 0
        self._draining = self._closing = self._ended = self._poked = False
        self._measured: Measured | None = None
        # How often programs were and are to be compiled, whom that is told, and what went wrong.
        self._warm_done = self._warm_wanted = 0
        self._warm_progress: Progress = lambda done, total: None
        self._warm_failure: Exception | None = None
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

    def submit(self, request: Request, progress: Steps = lambda step, done, total: None) -> Handle:
        """Takes a request. What is wrong with it comes through the handle.

        Args:
          progress: told by the engine's thread, which it must not hold up, what is done of "decoding frames", "encoding
            frames" and "reading the prompt".

        Raises:
          RequestError: the engine is closed or about to be, or another process takes requests.
        """
        number = next(self._numbers)
        job = Job(number, request, Handle(lambda: self._post(Command(number))), time.perf_counter(), progress)
        with self._changed:
            if self._draining or not self.takes_requests:
                raise RequestError("closed", "the engine takes no more requests" if self._draining else _ELSEWHERE)
            self._jobs[number] = job
            self._inbox.append(Command(number, request))
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
        with self._changed:
            self._warm_wanted += 1
            number, self._warm_progress = self._warm_wanted, progress
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._warm_done >= number or self._ended)
            if self._warm_done < number:
                raise RequestError("closed", "the engine was closed")
            if self._warm_failure:
                raise self._warm_failure
        return time.perf_counter() - start

    @property
    def cache_tokens(self) -> int:
        """Tokens that the page pool holds, of all sequences together."""
        config = self.scheduler_config
        return config.pages_per_shard * config.homes * config.turns * PAGE_SIZE

    @property
    def ended(self) -> bool:
        """Whether the engine answers no more, because it was closed or failed."""
        return self._ended

    def stats(self) -> EngineStats:
        """Counts for metrics."""
        return EngineStats(self._scheduler.stats, self._compilations, self._steps, self._embeddings.hits)

    def drain(self) -> None:
        """Takes no more requests, and waits until all that there are have ended."""
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: not self._jobs)

    def close(self) -> None:
        """Ends all requests and frees the devices; where no requests are taken, waits until that is done elsewhere.

        Does nothing the second time.
        """
        with self._changed:
            closed = self._closing
            self._draining = self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if closed:
            return
        self._media.close()
        self._stepper.close()
        with contextlib.suppress(AssertionError, ValueError):  # someone has removed all listeners
            jax.monitoring.unregister_event_duration_listener(self._count_compilation)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self.takes_requests:  # after an error here, process 0 may not close its engine
            self.close()

    def _media_workers(self) -> MediaWorkers:
        options = self.options
        cache = FrameCache(options.frame_cache, options.frame_cache_bytes) if options.frame_cache else None
        return MediaWorkers(
            self.processor,
            options.media_workers,
            options.media_bytes,
            frame_cache=cache,
            hashes=options.prefix_cache or options.embedding_cache_bytes > 0,
            timeout=options.media_timeout,
            notify=self._wake,
        )

    # What other threads do.

    def _post(self, command: Command) -> None:
        with self._changed:
            self._inbox.append(command)
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
            self._hosts.fail(error)
            failure = RequestError("closed", f"the engine failed: {type(error).__name__}: {error}")
        else:
            failure = RequestError("closed", "the engine was closed")
        with self._changed:
            self._draining = self._ended = True
            for job in self._jobs.values():
                job.handle.put(failure)
            self._jobs.clear()
            self._changed.notify_all()

    def _loop(self) -> None:
        before: tuple[Plan, DrawnTokens] | None = None
        started = time.perf_counter()
        while True:
            idle = before is None and not (self._events or self._pixels or self._encoding)
            turn = self._hosts.exchange(lambda idle=idle: self._gather(wait=idle))
            if turn.close:
                return
            if before is None:
                started = time.perf_counter()
            if turn.warm:
                self._warm_up()
            if turn.measured:
                self._events.append(turn.measured)
            self._take(turn.commands)
            self._take_media(turn.media)
            self._encode(all_of_them=before is None)
            events, self._events = self._events, []
            plan = self._scheduler.step(events)
            for name, tokens in plan.cached:
                job, choice = self._choices[name]
                job.stamp("admitted")
                job.cached = max(job.cached, tokens) if choice.number == 0 else job.cached
            if plan.read is not None:
                job, read = self._choices[plan.read.id][0], plan.read
                job.progress("reading the prompt", read.start + read.count, len(job.choices[0].data.input_ids))
            if plan.read is not None and before is not None and self.options.target_gap_ms is not None:
                # Queueing a chunk may hold this thread until it is nearly read. The devices idle for it meanwhile.
                started = self._complete(*before, started)
                before = None
            now = None
            if plan != Plan(cached=plan.cached, ended=plan.ended):
                now = plan, self._stepper.run(plan, lambda name: self._choices[name][1].data)
                self._steps += 1
                for placed in plan.offload:
                    if placed.id not in self._choices:  # what was delivered above ended it
                        self._stepper.forget(placed.id)
            if before is not None:
                started = self._complete(*before, started)
            before = now

    def _complete(self, plan: Plan, drawn: DrawnTokens, started: float) -> float:
        """Waits for a step that began at `started`, delivers its tokens, and returns the time."""
        self._deliver(drawn.fetch())
        ended = time.perf_counter()
        if plan.read or plan.decode:
            self._measured = Measured(ended - started, plan.read.program if plan.read else None, plan.decode)
        return ended

    def _gather(self, *, wait: bool) -> Turn:
        """What came since the last turn; waits for something if nothing else is to be done."""
        with self._changed:
            if wait and not self._told:
                self._changed.wait_for(lambda: self._inbox or self._closing or self._poked or self._wants_warmup)
            commands, self._inbox, self._poked = tuple(self._inbox), [], False
            warm, close = self._wants_warmup, self._closing
        self._told.extend(self._media.poll())
        media, size = [], 0
        while self._told and size < TURN_BYTES:
            media.append(event := self._told.popleft())
            size += event.patches.nbytes if isinstance(event, Pixels) else 0
        measured, self._measured = self._measured, None
        return Turn(commands, tuple(media), measured, warm, close)

    @property
    def _wants_warmup(self) -> bool:
        return self._warm_wanted > self._warm_done

    def _warm_up(self) -> None:
        """Compiles all programs for `warmup`."""
        failure = None
        try:
            self._stepper.warmup(self._most_patches, self._warm_progress)
            self._compilations = 0
        except Exception as error:
            failure = error
        with self._changed:
            self._warm_done, self._warm_failure = self._warm_done + 1, failure
            self._changed.notify_all()

    def _take(self, commands: Sequence[Command]) -> None:
        for number, request in commands:
            job = self._jobs.get(number)
            if request is None:
                if job is not None:
                    self._cancel(job)
                continue
            if job is None:  # it was submitted in another process
                job = self._jobs[number] = Job(number, request, Handle(lambda: None), time.perf_counter())
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

    def _take_media(self, events: Sequence[MediaEvent]) -> None:
        for event in events:
            job = self._jobs.get(event.job_id) if isinstance(event.job_id, int) else None
            if job is None:
                if isinstance(event, Pixels):
                    event.release()
            elif isinstance(event, Planned):
                self._arrive(job, event.prompt)
            elif isinstance(event, Pixels):
                self._pixels.append(event)
                job.frames_decoded += event.frames
                job.progress("decoding frames", job.frames_decoded, job.frames)
            elif isinstance(event, Finished):
                job.decoded = event.decoded
                if job.frames:
                    job.stamp("media")
                for number in range(len(job.frames_left)):
                    self._keep(job, number)
                if event.decoded.tokens is None:
                    self._tell_ready(job)
                else:
                    self._restate(job, event.decoded.tokens)
                self._finish(job)
            elif isinstance(event, Broken):
                self._fail(job, event.kind, event.message)

    def _arrive(self, job: Job, prompt: Prompt) -> None:
        """Takes note of a planned request: of what is read, and which of its media have to be decoded."""
        pads = sum(medium.pads for medium in prompt.media)
        job.prompt = prompt
        job.stamp("planned")
        limit = self._limit(job)
        if limit is None:
            return
        job.embeds = np.zeros((pads, self.runtime.config.hidden_size), self.runtime.dtype)
        job.filled = np.zeros(pads, bool)
        job.frames_left = [medium.frames for medium in prompt.media]
        skip, shown = {}, {}
        for number, medium in enumerate(prompt.media):
            found = self._embeddings.get(medium.hash)
            if found is not None:
                job.embeds[medium.first_pad : medium.first_pad + medium.pads] = found.embeds
                job.filled[medium.first_pad : medium.first_pad + medium.pads] = True
                job.frames_left[number], skip[number] = 0, medium.frames
                if found.shown is not None:
                    shown[number] = found.shown
        job.frames = sum(job.frames_left)
        self._begin(job, limit)
        self._media.decode(job.id, skip, shown)

    def _restate(self, job: Job, tokens: PromptTokens) -> None:
        """Begins again with the prompt that states the times of the frames that are shown. No token was drawn yet."""
        assert job.prompt is not None, "it was decoded"
        job.prompt, job.cached = job.prompt.restated(tokens), 0
        for choice in job.choices:
            del self._choices[choice.id]
            self._events.append(Failed(choice.id))
        job.choices.clear()
        limit = self._limit(job)
        if limit is not None:
            self._begin(job, limit)

    def _limit(self, job: Job) -> int | None:
        """Most tokens of each answer; None if the request can never run, and failed."""
        assert job.prompt is not None, "it is planned"
        request, length = job.request, len(job.prompt.input_ids)
        room = self.scheduler_config.most_tokens - length
        limit = request.max_tokens or max(1, min(DEFAULT_NEW_TOKENS, room))
        if job.decoded is not None:
            limit = max(1, min(limit, room))  # other times may take a few tokens more; the request was taken before
        try:
            self._scheduler.check(length, limit)
        except UserError as error:
            self._media.cancel(job.id)
            self._fail(job, "too_large", str(error))
            return None
        return limit

    def _begin(self, job: Job, limit: int) -> None:
        """Makes the sequences of a request, each of which writes at most `limit` tokens."""
        assert job.prompt is not None and job.embeds is not None, "it is planned"
        request, prompt, config = job.request, job.prompt, self.runtime.config
        pads = np.isin(prompt.input_ids, (config.image_token_id, config.video_token_id))
        before = np.concatenate([[0], np.cumsum(pads)])
        hashes: tuple[bytes, ...] = ()
        if self.options.prefix_cache:
            media = [(medium.hash, medium.pads) for medium in prompt.media]
            pad_ids = (config.image_token_id, config.video_token_id)
            hashes = tuple(block_hashes(prompt.input_ids, media, pad_ids, self.scheduler_config.small))
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
            choice = Answering(str(next(self._sequences)), number, data, writer, logprobs, limit)
            job.choices.append(choice)
            self._choices[choice.id] = job, choice
            self._events.append(Arrival(choice.id, len(prompt.input_ids), limit, hashes))
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
        left = sum(job.frames_left)
        job.progress("encoding frames", job.frames - left, job.frames)
        if not left:
            job.stamp("encoded")
        self._keep(job, part.medium)
        self._tell_ready(job)

    def _keep(self, job: Job, number: int) -> None:
        """Keeps the embeddings of a medium, if all its frames are encoded and it is known which these are."""
        if job.frames_left[number] or job.decoded is None:
            return
        assert job.prompt is not None and job.embeds is not None, "it is planned"
        medium = job.prompt.media[number]
        if medium.hash not in self._embeddings:
            whole = job.embeds[medium.first_pad : medium.first_pad + medium.pads]
            self._embeddings.put(medium.hash, Encoded(whole.copy(), job.decoded.shown.get(number)))

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
        times, undecodable = (
            tuple(tuple(each.tolist()) for each in arrays)
            for arrays in (job.decoded.frame_times, job.decoded.undecodable_times)
        )
        self._leave(job, Result(tuple(choices), usage, timings, times, job.decoded.warnings, undecodable))

    def _fail(self, job: Job, kind: str, message: str) -> None:
        self._events += [Failed(choice.id) for choice in job.choices if choice.choice is None]
        self._leave(job, RequestError(kind, message))

    def _cancel(self, job: Job) -> None:
        self._media.cancel(job.id)
        if job.prompt is None:
            self._leave(job, RequestError("cancelled", "the request was cancelled before it was planned"))
            return
        job.decoded = job.decoded or Decoded(job.prompt.frame_times, (), job.prompt.warnings)
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
