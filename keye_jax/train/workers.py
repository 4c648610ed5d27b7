"""Processes that make calls for training. One that ends, however it does, costs at most the call that it was making.

Each has a pipe of its own, and this process does not hold the end that the other writes to. The processes of
`concurrent.futures.ProcessPoolExecutor` share one, which it does hold: when one is killed while it sends a result, it
waits for the rest of it without end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from keye_jax import interrupts

type _Call = tuple[Callable[..., Any], tuple[Any, ...]]


class Crashed(Exception):
    """A call ended the process that made it, twice."""


class Workers:
    """Processes that make calls, each one at a time.

    A process that ends during a call is replaced, and the call is made once more: the process may have been ended from
    outside.

    Args:
      count: how many processes.
      start: is called in each process before its first call.
      arguments: of `start`.
    """

    def __init__(self, count: int, start: Callable[..., None], *arguments: Any):
        self._start = start, arguments
        self._calls: queue.SimpleQueue[tuple[Future[Any], _Call] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._make_calls, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit[T](self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Has a process call a function. The future raises what that raises, or Crashed."""
        future: Future[T] = Future()
        self._calls.put((future, (function, arguments)))
        return future

    def close(self) -> None:
        """Cancels the calls that have not begun, and ends the processes after those that have."""
        with contextlib.suppress(queue.Empty):
            while waiting := self._calls.get_nowait():
                waiting[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _make_calls(self) -> None:
        """Has one process make calls until the end. The program of a thread."""
        process: _Process | None = None
        while waiting := self._calls.get():
            future, call = waiting
            if not future.set_running_or_notify_cancel():
                continue
            try:
                for _ in range(2):
                    process = process or _Process(self._start)
                    try:
                        future.set_result(process.make(call))
                        break
                    except _Ended:
                        process.close()
                        process = None
                else:
                    future.set_exception(Crashed())
            except BaseException as error:
                future.set_exception(error)
        if process is not None:
            process.close()


class _Ended(Exception):
    """The process ended before it answered."""


class _Process:
    def __init__(self, start: _Call):
        context = multiprocessing.get_context("spawn")  # not forked: JAX has threads
        self._pipe, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(target=_run, args=(theirs, start), daemon=True)
        with theirs, interrupts.kept_from_children():
            self._process.start()

    def make(self, call: _Call) -> Any:
        """What the call returns or raises there.

        Raises:
          _Ended: the process ended.
        """
        try:
            self._pipe.send(call)
            returned, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise _Ended from error
        if not returned:
            raise value
        return value

    def close(self) -> None:
        """Has it end, which takes until its call is made."""
        self._pipe.close()
        self._process.join()


def _run(pipe: Connection, start: _Call) -> None:
    """The program of a process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    interrupts.end_with(parent.sentinel)
    _call(start)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # no more calls
        while True:
            call = pipe.recv()
            try:
                answer = True, _call(call)
            except Exception as error:
                error.add_note(f"It was raised in a process of its own:\n{traceback.format_exc()}")
                answer = False, error
            pipe.send(answer)


def _call(call: _Call) -> Any:
    function, arguments = call
    return function(*arguments)
