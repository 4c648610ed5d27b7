"""Processes that run cases. A process is used for many cases; one that dies costs only its case."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import queue
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.fuzz_inputs import cases
from tests.fuzz_inputs.cases import Case, Task

MOST_SECONDS = 10
MOST_BYTES = 2 << 30
# Address space. It keeps a case that allocates without end from taking the whole machine.
_ADDRESS_SPACE = 12 << 30
# Characters. A message that is longer has not shortened the value in it.
_LONGEST_MESSAGE = 1000
_START_SECONDS = 120
_ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
      status: "read", "refused" or "finding".
      reason: one line: the message of the refusal, or what was found.
      details: the traceback, if there is one.
      seconds: of the case.
      peak_bytes: the largest resident memory of the process up to the end of the case.
      group: that of the case; empty if the process was stopped.
    """

    status: str
    reason: str = ""
    details: str = ""
    seconds: float = 0
    peak_bytes: int = 0
    group: str = ""


def run(tasks: Iterable[Task], folder: Path, jobs: int, *, verbose: bool = False) -> Iterator[tuple[Task, Outcome]]:
    """Runs tasks in `jobs` processes, and yields their outcomes in order.

    Args:
      folder: holds `seeds`, with the files of the module `seeds`, and `checkpoint`, with the processor's files.
      verbose: whether what the libraries print on stderr is shown.

    Raises:
      RuntimeError: a process does not start.
    """
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    workers = [_Worker(folder, verbose) for _ in range(jobs)]
    for worker in workers:
        idle.put(worker)

    def one(task: Task) -> tuple[Task, Outcome]:
        worker = idle.get()
        try:
            return task, worker.run(task)
        finally:
            idle.put(worker)

    try:
        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(one, tasks)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process, started when it is needed and again after it is stopped."""

    def __init__(self, folder: Path, verbose: bool):
        self._folder, self._verbose = folder, verbose
        self._process: Any = None
        self._connection: Any = None

    def run(self, task: Task) -> Outcome:
        if self._process is None:
            self._start()
        start = time.monotonic()
        self._connection.send(task)
        if not self._connection.poll(MOST_SECONDS):
            self.stop()
            return Outcome("finding", f"takes more than {MOST_SECONDS} s", seconds=time.monotonic() - start)
        try:
            outcome = self._connection.recv()
        except EOFError:
            code = self.stop()
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Outcome("finding", f"the process died: {name}", seconds=time.monotonic() - start)
        if outcome.peak_bytes > MOST_BYTES:
            self.stop()
        return outcome

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._folder, self._verbose), daemon=True)
        self._process.start()
        other.close()
        try:
            if self._connection.poll(_START_SECONDS) and self._connection.recv() == "ready":
                return
        except EOFError:
            pass
        self.stop()
        raise RuntimeError("a process that runs cases does not start; --only shows what it prints")

    def stop(self) -> int:
        """Ends the process, and returns its exit code; minus the number of a signal if it died from one."""
        if self._process is None:
            return 0
        # Without its connection an idle process ends by itself, and one that crashed tells its exit code.
        self._connection.close()
        self._process.join(1)
        self._process.kill()
        self._process.join()
        code, self._process = self._process.exitcode, None
        return code


def _serve(connection: Connection, folder: Path, verbose: bool) -> None:
    """The life of a process: takes tasks, and sends outcomes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not verbose:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # macOS does not limit the address space.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, resource.RLIM_INFINITY))
    from keye_jax import presets
    from keye_jax.config import KeyeConfig
    from keye_jax.processor import Processor

    config = KeyeConfig.from_file(presets.TINY)
    processor = Processor.from_checkpoint(folder / "checkpoint", config)
    # Errors that Python only prints, in callbacks, finalizers and threads.
    printed: list[BaseException] = []
    sys.unraisablehook = lambda unraisable: printed.append(unraisable.exc_value or unraisable.exc_type())
    threading.excepthook = lambda args: printed.append(args.exc_value or args.exc_type())
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            task = connection.recv()
            case = cases.make(task, folder / "seeds")
            with tempfile.TemporaryDirectory(dir=folder) as directory:
                case.write(Path(directory), "")
                os.chdir(directory if case.messages else folder / "seeds")
                outcome = _run(processor, case, Path(directory), printed)
                os.chdir(folder)
            connection.send(outcome)


def _run(processor: Any, case: Case, folder: Path, printed: list[BaseException]) -> Outcome:
    from keye_jax.errors import UserError

    start = time.monotonic()
    try:
        with processor.plan(**_read(case, folder)) as plan:
            processor.process(plan)
        outcome = Outcome("read")
    except UserError as error:
        fault = _fault(str(error))
        outcome = Outcome("finding", f"{fault}: {str(error)[:300]!r}") if fault else Outcome("refused", str(error))
    except BaseException as error:  # A panic of Rust is no Exception.
        outcome = _finding(error)
    if printed:
        outcome = _finding(printed[0])
        printed.clear()
    seconds = time.monotonic() - start
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if peak > MOST_BYTES and outcome.status != "finding":
        outcome = Outcome("finding", f"takes {peak / 2**30:.1f} GiB of memory ({outcome.status})")
    return dataclasses.replace(outcome, seconds=seconds, peak_bytes=peak, group=case.group)


def _read(case: Case, folder: Path) -> dict[str, Any]:
    """The arguments of `Processor.plan`, of a message file as `keye-jax generate --messages` reads them."""
    if case.messages is not None:
        return {"messages": case.messages}
    from keye_jax.processor.messages import read_request

    return read_request((folder / case.file).read_bytes(), f"--messages is {case.file!r}")


def _fault(message: str) -> str:
    """What is wrong with the message of a `UserError`; empty if nothing is."""
    if len(message.splitlines()) != 1:
        return f"a message of {len(message.splitlines())} lines"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in message):
        return "a message with control characters"
    return f"a message of {len(message)} characters" if len(message) > _LONGEST_MESSAGE else ""


def _finding(error: BaseException) -> Outcome:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "keye_jax" in frame.filename]
    place = ""
    if frames:
        file = Path(frames[-1].filename)
        file = file.relative_to(_ROOT) if file.is_relative_to(_ROOT) else file
        place = f" at {file}:{frames[-1].lineno}"
    text = " ".join(str(error).split())[:200]
    try:
        details = "".join(traceback.format_exception(error))
    except RecursionError:
        details = ""
    return Outcome("finding", f"{type(error).__name__}{place}: {text}", details)
