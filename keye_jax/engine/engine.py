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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax

from keye_jax.engine.answers import Answers
from keye_jax.engine.arrivals import Arrivals
from keye_jax.engine.compilation import most_patches
from keye_jax.engine.constraint import Grammars, Masks
from keye_jax.engine.encoding import FrameEncoder
from keye_jax.engine.generation_config import GenerationDefaults
from keye_jax.engine.handle import Handle
from keye_jax.engine.hosts import Command, Hosts, MediaElsewhere, Turn
from keye_jax.engine.job import Job, Steps
from keye_jax.engine.media.events import MediaEvent, Pixels
from keye_jax.engine.media.frame_cache import FrameCache
from keye_jax.engine.media.workers import MediaWorkers
from keye_jax.engine.options import EngineOptions, scheduler_config
from keye_jax.engine.plan import Measured, Plan
from keye_jax.engine.request import Request, RequestError, Result
from keye_jax.engine.scheduler import Scheduler
from keye_jax.engine.stats import EngineProgress, EngineStats
from keye_jax.engine.stepper import DrawnTokens, Stepper
from keye_jax.errors import UserError
from keye_jax.page_allocator import PAGE_SIZE
from keye_jax.processor import Processor
from keye_jax.progress import Progress
from keye_jax.runtime.runtime import Runtime

_log = logging.getLogger(__name__)

TURN_BYTES = 32 << 20
"""Of frames that are taken in one turn. The rest is for the next one."""

_ELSEWHERE = "process 0 takes the requests of this job"


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
        self._most_patches = most_patches(runtime, processor)
        self.scheduler_config = scheduler_config(runtime, options, self._most_patches)
        self._scheduler = Scheduler(self.scheduler_config)
        self._stepper = Stepper(
            runtime,
            self.scheduler_config,
            pixel_scale=processor.pixel_scale,
            pixel_shift=processor.pixel_shift,
            heat=options.selection_heat,
        )
        self._changed = threading.Condition()
        self._hosts = Hosts(runtime.rules)
        self.takes_requests = self._hosts.is_main
        self._inbox: list[Command] = []
        self._told: collections.deque[MediaEvent] = collections.deque()
        self._media = self._media_workers() if self.takes_requests else MediaElsewhere()
        self._jobs: dict[int, Job] = {}
        self._encoder = FrameEncoder(self._stepper, self._jobs, options.embedding_cache_bytes)
        vocab, block = runtime.config.vocab_size, self.scheduler_config.small if options.prefix_cache else None
        masks = Masks(vocab, defaults.end_tokens, (processor.token_id("<think>"), processor.token_id("</think>")))
        self._answers = Answers(processor, defaults, masks, block, self._leave)
        self._grammars = Grammars(processor, vocab, defaults.end_tokens)
        # Compiles grammars and reads long prompts, so that neither clients nor the devices wait for it.
        self._preparer = ThreadPoolExecutor(1, "keye-jax requests")
        self._preparing: set[int] = set()
        self._arrivals = Arrivals(
            *(self._jobs, self._media, self._encoder, self._answers, self._scheduler),
            lambda grammar: self._preparer.submit(self._grammars.compile, grammar),
        )
        self._numbers = itertools.count()
        self._steps = self._compilations = 0
        self._progress = EngineProgress(0, time.monotonic(), busy=False)
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
        compile_ahead: bool = False,
        **settings: Any,
    ) -> Engine:
        """An engine for a checkpoint, safetensors or Orbax.

        Args:
          options: how the devices are shared out.
          compile_ahead: whether all programs are compiled while weights are loaded, which makes `warmup` short.
          settings: arguments of `keye_jax.engine.checkpoint.load`.

        Raises:
          UserError: the checkpoint or a setting is not valid.
        """
        from keye_jax.engine.checkpoint import load  # Orbax takes seconds to import

        return cls(*load(directory, compile_for=options if compile_ahead else None, **settings), options=options)

    def submit(self, request: Request, progress: Steps = lambda step, done, total: None) -> Handle:
        """Takes a request. What is wrong with it comes through the handle.

        Args:
          progress: told by the engine's thread, which it must not hold up, what is done of "decoding frames", "encoding
            frames" and "reading the prompt".

        Raises:
          RequestError: the engine is closed or about to be, or another process takes requests.
        """
        number = next(self._numbers)
        job = Job(number, request, Handle(lambda: self._cancel(number)), time.perf_counter(), progress)
        refusal = self._refusal(request)
        with self._changed:
            if self._draining or not self.takes_requests:
                raise RequestError("closed", "the engine takes no more requests" if self._draining else _ELSEWHERE)
            if refusal is not None:
                job.handle.put(refusal)
                return job.handle
            self._jobs[number] = job
            if request.grammar is None and request.prompt is None:
                self._inbox.append(Command(number, request))
                self._changed.notify_all()
            else:
                self._preparing.add(number)
                self._preparer.submit(self._prepare, job)
        return job.handle

    def warmup(self, progress: Progress = lambda done, total: None) -> float:
        """Compiles all programs; returns the seconds that it took. Requests may come meanwhile and wait.

        Afterwards no request compiles a program, but for images beyond the checkpoint's limits. On a CPU images of more
        than `keye_jax.runtime.encode.ENCODE_PATCHES` patches are left out.

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
        with self._changed:
            jobs = tuple(self._jobs.values())
        waiting = sum("admitted" not in job.at for job in jobs)
        counts = self._compilations, self._steps, self._encoder.hits
        return EngineStats(self._scheduler.stats, *counts, len(jobs), waiting, self._answers.tokens)

    @property
    def progress(self) -> EngineProgress:
        """For a watchdog: that steps are done, whatever the time that each of them takes."""
        return self._progress

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests, and waits until all that there are have ended, or for `timeout` seconds.

        Returns:
          whether they have.
        """
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._jobs, timeout)

    def cancel_all(self) -> None:
        """Ends all requests soon. Their results then have what was written so far."""
        with self._changed:
            numbers = tuple(self._jobs)
        for number in numbers:
            self._cancel(number)

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
        self._preparer.shutdown(cancel_futures=True)
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

    def _cancel(self, number: int) -> None:
        with self._changed:
            if number not in self._preparing:
                self._inbox.append(Command(number))
                self._changed.notify_all()
                return
            self._preparing.discard(number)
            job = self._jobs.pop(number)
            self._changed.notify_all()
        job.handle.put(RequestError("cancelled", "the request was cancelled before it was planned"))

    def _refusal(self, request: Request) -> RequestError | None:
        """What is wrong with a request that can be seen before its prompt is planned."""
        vocab, most = self.runtime.config.vocab_size, self.scheduler_config.most_tokens
        for token in request.logit_bias:
            if not 0 <= token < vocab:
                return RequestError("invalid", f"logit_bias has token {token}; it must be from 0 to {vocab - 1}")
        if request.selection_heat and not self.options.selection_heat:
            return RequestError("invalid", "selection_heat is true; this engine does not count what answers look at")
        if request.max_tokens is not None and request.max_tokens >= most:
            limit = f"a prompt and its answer together must be at most {most}"
            return RequestError("too_large", f"max_tokens is {request.max_tokens}; {limit}")
        return None

    def _prepare(self, job: Job) -> None:
        """Compiles the grammar of a request, plans a prompt without a template, and then submits the request."""
        request, failure = job.request, None
        try:
            if request.grammar is not None:
                job.matcher = Future()
                job.matcher.set_result(self._grammars.compile(request.grammar))
            if request.prompt is not None:
                job.plan = self.processor.plan_raw(request.prompt)
        except UserError as error:
            failure = RequestError("invalid", str(error))
        except Exception as error:
            _log.exception("a request could not be prepared")
            failure = RequestError("internal", f"the request could not be prepared: {type(error).__name__}")
        with self._changed:
            if job.id not in self._preparing:  # it was cancelled, or the engine has ended
                return
            self._preparing.discard(job.id)
            if failure is None:
                self._inbox.append(Command(job.id, request))
            else:
                self._jobs.pop(job.id)
            self._changed.notify_all()
        if failure is not None:
            job.handle.put(failure)

    def _wake(self) -> None:
        with self._changed:
            self._poked = True
            self._changed.notify_all()

    def _count_compilation(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and threading.current_thread() is self._thread:
            self._compilations += 1
            if self._warm_done:
                _log.warning("a program was compiled while requests ran: %s", kwargs.get("fun_name"))

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
            self._preparing.clear()
            self._changed.notify_all()

    def _loop(self) -> None:
        answers = self._answers
        before: tuple[Plan, DrawnTokens] | None = None
        started = time.perf_counter()
        while True:
            idle = before is None and not (answers.events or self._encoder.busy)
            turn = self._hosts.exchange(lambda idle=idle: self._gather(wait=idle))
            if turn.close:
                return
            if before is None:
                started = time.perf_counter()
                self._note_progress()
            if turn.warm:
                self._warm_up()
            if turn.measured:
                answers.events.append(turn.measured)
            self._arrivals.take(turn.commands)
            self._arrivals.take_media(turn.media)
            for job in self._encoder.advance(all_of_them=before is None):
                answers.tell_ready(job)
            events, answers.events = answers.events, []
            plan = self._scheduler.step(events)
            answers.note_cached(plan.cached)
            for read in plan.reads:
                job = answers.job(read.id)
                job.progress("reading the prompt", read.start + read.count, len(job.choices[0].data.input_ids))
            if plan.reads and before is not None and self.options.target_gap_ms is not None:
                # Queueing a chunk may hold this thread until it is nearly read. The devices idle for it meanwhile.
                started = self._complete(*before, started)
                before = None
            now = None
            if plan != Plan(cached=plan.cached, ended=plan.ended):

                def look(drawn: DrawnTokens) -> None:
                    nonlocal before, started
                    if before is not None:
                        started = self._complete(*before, started)
                        before = None
                    answers.deliver(drawn.fetch())

                now = plan, self._stepper.run(plan, answers.data, look)
                self._steps += 1
                for placed in plan.offload:
                    if placed.id not in answers:  # what was delivered above ended it
                        self._stepper.forget(placed.id)
            if before is not None:
                started = self._complete(*before, started)
            answers.take_heat(self._stepper.heat)
            before = now

    def _complete(self, plan: Plan, drawn: DrawnTokens, started: float) -> float:
        """Waits for a step that began at `started`, delivers its tokens, and returns the time."""
        self._answers.deliver(drawn.fetch())
        ended = time.perf_counter()
        self._note_progress(steps=1)
        if plan.reads or plan.decode:
            self._measured = Measured(ended - started, plan.program, plan.decode)
        return ended

    def _gather(self, *, wait: bool) -> Turn:
        """What came since the last turn; waits for something if nothing else is to be done."""
        with self._changed:
            if wait and not self._told:
                self._progress = dataclasses.replace(self._progress, busy=False)
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

    def _note_progress(self, steps: int = 0) -> None:
        self._progress = EngineProgress(self._progress.steps + steps, time.monotonic(), busy=True)

    @property
    def _wants_warmup(self) -> bool:
        return self._warm_wanted > self._warm_done

    def _warm_up(self) -> None:
        """Compiles all programs for `warmup`."""
        failure = None

        def told(done: int, total: int) -> None:
            self._note_progress()
            self._warm_progress(done, total)

        try:
            prepared = self._preparer.submit(self._grammars.prepare)
            self._stepper.warmup(self._most_patches, told)
            prepared.result()
            self._compilations = 0
        except Exception as error:
            failure = error
        with self._changed:
            self._warm_done, self._warm_failure = self._warm_done + 1, failure
            self._changed.notify_all()

    def _leave(self, job: Job, outcome: Result | RequestError) -> None:
        for choice in job.choices:
            self._stepper.forget(choice.id)
        with self._changed:
            self._jobs.pop(job.id, None)
            self._changed.notify_all()
        job.handle.put(outcome)
