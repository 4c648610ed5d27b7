"""Runs a job: reads lines, keeps an engine busy with them, and writes down what becomes of each."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from convert.detect import read_config
from keye_jax import interrupts
from keye_jax.engine.openai import completion_body, read_chat
from keye_jax.engine.request import Request, RequestError, Result
from keye_jax.errors import UserError
from keye_jax.jobs.journal import JobStoppedError, Journal
from keye_jax.jobs.lines import BadLine, Line, error_record, response_record, result_key
from keye_jax.jobs.report import Outcome, Progress, Tally
from keye_jax.processor.prompt import SafeTokenizer
from keye_jax.runtime.sampling import SamplingParams
from keye_jax.sharding import MeshRules, ShardingConfig

# Results that wait to be written, at most. More would only fill memory while the disk is slow.
_WAITING = 1024
_LONGEST_PAUSE_S = 60.0


class Handle(Awaitable[Result], Protocol):
    """An answer under way. To await it raises RequestError if the request failed."""

    def cancel(self) -> object: ...


class Engine(Protocol):
    """What a job needs of an engine."""

    def submit(self, request: Request) -> Handle: ...


def open_engine(checkpoint: str, *, sharding: str | None = None, warmup: bool = True, **settings: Any) -> Any:
    """An engine for a checkpoint, local or in a bucket; a context manager. Compiled programs are kept.

    Args:
      sharding: a preset's name, or a sharding file; None for one device.
      warmup: whether all programs are compiled now, and none later.
      settings: of `Engine.from_checkpoint`.
    """
    from convert import buckets
    from keye_jax import presets
    from keye_jax.engine.engine import Engine
    from keye_jax.runtime.compilation_cache import enable_compilation_cache

    enable_compilation_cache()
    directory = buckets.local(checkpoint)
    rules = None
    if sharding is not None:
        file = ShardingConfig.from_file(presets.sharding_file(sharding))
        rules = MeshRules.create(file, read_config(directory))
    with contextlib.ExitStack() as on_error:
        engine = on_error.enter_context(
            Engine.from_checkpoint(directory, compile_ahead=warmup, rules=rules, **settings)
        )
        if warmup:
            engine.warmup()
        on_error.pop_all()
    return engine


def token_text(checkpoint: Path) -> Callable[[int], str]:
    """The function that gives the text of one token of a checkpoint's vocabulary."""
    tokenizer = SafeTokenizer(checkpoint / "tokenizer.json")
    return lambda token: tokenizer.detokenize([token], skip_special_tokens=False)


@dataclasses.dataclass(frozen=True)
class Answerer:
    """Answers the bodies of chat completions with an engine, and again if they fail for now.

    Attributes:
      engine: answers requests.
      model: its name in responses.
      token_text: the text of one token, for log probabilities.
      sampling, max_tokens: what applies where a body says nothing.
      retries: how often a request is tried again that may pass later.
      pause_s: seconds before the second try; each further pause is twice as long, a minute at most.
    """

    engine: Engine
    model: str
    token_text: Callable[[int], str]
    sampling: SamplingParams
    max_tokens: int | None = None
    retries: int = 2
    pause_s: float = 1.0

    async def answer(self, custom_id: str, body: object) -> Outcome:
        """What becomes of one body, whatever it is.

        Raises:
          JobStoppedError: the engine takes no more requests.
        """
        start = time.monotonic()
        tries = 0
        while True:
            tries += 1
            try:
                result = await self._try(body)
            except RequestError as error:
                if error.kind in ("closed", "cancelled"):
                    raise JobStoppedError(f"the engine ended ({error}); the same command resumes the job") from error
                if error.transient and tries <= self.retries:
                    pause = min(_LONGEST_PAUSE_S, self.pause_s * 2 ** (tries - 1))
                    # Requests that failed together do not come back together.
                    await asyncio.sleep(pause * random.uniform(0.5, 1))
                    continue
                record = error_record(custom_id, error.kind, str(error))
                return Outcome(record, time.monotonic() - start, tries, code=error.kind)
            response = completion_body(
                result,
                completion_id=f"chatcmpl-{random.randbytes(16).hex()}",
                created=int(time.time()),
                model=self.model,
                token_text=self.token_text,
            )
            return Outcome(response_record(custom_id, response), time.monotonic() - start, tries, result=result)

    async def _try(self, body: object) -> Result:
        try:
            asked = read_chat(body, sampling=self.sampling, max_tokens=self.max_tokens, batch=True)
            handle = self.engine.submit(asked.request)
            try:
                result = await handle
            except asyncio.CancelledError:
                handle.cancel()
                raise
        except UserError as error:
            raise RequestError("invalid", str(error)) from error
        except (RequestError, asyncio.CancelledError):
            raise
        except Exception as error:  # a defect of the engine; the lines after this one are not its victims
            raise RequestError("internal", f"{type(error).__name__}: {error}") from error
        if any(choice.finish_reason == "cancelled" for choice in result.choices):
            raise RequestError("cancelled", "it cancelled a request")
        return result


class Batch:
    """One run of a job.

    Args:
      answerer: answers lines.
      journal: takes what becomes of them, and knows which are done.
      lines: of the input; they are read as they are needed.
      tally: counts.
      progress: shows the tally.
      concurrency: how many lines are with the engine at once.
      grace_s: after SIGINT or SIGTERM, how many seconds the lines that the engine has may still take.
    """

    def __init__(
        self,
        answerer: Answerer,
        journal: Journal,
        lines: Iterator[Line | BadLine],
        tally: Tally,
        progress: Progress,
        *,
        concurrency: int,
        grace_s: float,
    ):
        self._answerer, self._journal, self._lines = answerer, journal, lines
        self._tally, self._progress, self._grace_s = tally, progress, grace_s
        self._slots = asyncio.Semaphore(concurrency)
        self._outcomes = asyncio.Queue[Outcome | None](_WAITING)
        # Set by the first signal or failure, and by the second signal.
        self._ending, self._now = asyncio.Event(), asyncio.Event()
        self._signal: signal.Signals | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self._failure: JobStoppedError | None = None

    def stop(self, *, now: bool = False) -> None:
        """As a signal, or with `now` a second one, ends the run. To be called from its event loop."""
        self._ending.set()
        if now:
            self._now.set()

    async def run(self, signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> signal.Signals | None:
        """Answers all lines that are not done.

        Args:
          signals: those that end the run early.

        Returns:
          The signal that ended the run early; None if all lines are done.

        Raises:
          JobStoppedError: the output cannot be written, the input cannot be read, or the engine ended.
        """
        self._loop = loop = asyncio.get_running_loop()
        with interrupts.given_to(lambda number: loop.call_soon_threadsafe(self._on_signal, number), signals):
            await self._run()
        if self._failure is not None:
            raise self._failure
        return self._signal

    async def _run(self) -> None:
        feeding, writing = asyncio.create_task(self._feed()), asyncio.create_task(self._write())
        showing = asyncio.create_task(self._show())
        watches = [asyncio.create_task(event.wait()) for event in (self._ending, self._now)]
        try:
            await asyncio.wait([feeding, writing, watches[0]], return_when=asyncio.FIRST_COMPLETED)
            if not feeding.done() and not writing.done():
                waited = [feeding, writing, watches[1]]
                await asyncio.wait(waited, timeout=self._grace_s, return_when=asyncio.FIRST_COMPLETED)
            await _cancelled(feeding)
            last = asyncio.create_task(self._outcomes.put(None))
            await asyncio.wait([writing])
            await _cancelled(last)
            writing.result()
            if not feeding.cancelled():
                feeding.result()
        finally:
            for task in (feeding, writing, showing, *watches):
                await _cancelled(task)
            self._progress.close(self._tally)

    def pass_signal(self, number: int) -> None:
        """Ends the run as a signal does that another process of the job has got. Any thread may call it."""

        def take() -> None:
            self._stopped = not self._ending.is_set()
            self._signal = self._signal or signal.Signals(number)
            self._ending.set()

        if self._loop is not None:
            self._loop.call_soon_threadsafe(take)

    def _on_signal(self, number: signal.Signals) -> None:
        # The same signal to all processes of a job arrives twice here.
        again = self._ending.is_set() and not self._stopped
        self._stopped = False
        self._signal = self._signal or number
        self.stop(now=again)

    def _fail(self, error: JobStoppedError) -> None:
        self._failure = self._failure or error
        self._ending.set()

    async def _feed(self) -> None:
        """Gives lines to the engine, and returns when it has answered them."""
        async with asyncio.TaskGroup() as group:
            while not self._ending.is_set():
                await asyncio.sleep(0)  # lines that are done already could keep a signal waiting
                try:
                    line = next(self._lines, None)
                except OSError as error:
                    reason = f"the input cannot be read ({error.strerror or error})"
                    return self._fail(JobStoppedError(f"{reason}; the same command resumes the job"))
                if line is None:
                    return None
                if result_key(line.custom_id, line.number) in self._journal.finished:
                    continue
                if isinstance(line, BadLine):
                    record = error_record(line.custom_id, line.code, line.message, line.number)
                    await self._outcomes.put(Outcome(record, 0.0, 1, code=line.code))
                    continue
                await self._slots.acquire()
                if self._ending.is_set():
                    return None
                group.create_task(self._answer(line))

    async def _answer(self, line: Line) -> None:
        try:
            await self._outcomes.put(await self._answerer.answer(line.custom_id, line.body))
        except JobStoppedError as error:
            self._fail(error)
        finally:
            self._slots.release()

    async def _write(self) -> None:
        """Writes outcomes down, all that wait in one go, until there comes None."""
        ended = False
        while not ended:
            waiting = [await self._outcomes.get()]
            while not self._outcomes.empty():
                waiting.append(self._outcomes.get_nowait())
            outcomes = [outcome for outcome in waiting if outcome is not None]
            ended = len(outcomes) < len(waiting)
            if outcomes:
                # The disk may be slow, and the event loop goes on meanwhile.
                await asyncio.to_thread(self._journal.append, [outcome.record for outcome in outcomes])
                for outcome in outcomes:
                    self._tally.add(outcome)

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(self._progress.interval_s)
            self._progress.show(self._tally)


async def _cancelled(task: asyncio.Task) -> None:
    """Cancels a task if it is not done, and waits for its end."""
    task.cancel()
    await asyncio.wait([task])
