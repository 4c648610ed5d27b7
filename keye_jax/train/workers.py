"""Processes that make calls for training. One that ends, however it does, costs at most the call that it was making."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from keye_jax.call_process import CallProcess


class Crashed(Exception):
    """A call ended the process that made it, twice."""


class Workers:
    """Processes that call functions, each one at a time.

    A process that ends during a call is replaced, and the call is made once more: the process may have been ended from
    outside.

    Args:
      count: how many processes.
      start, arguments: of each `CallProcess`.
    """

    def __init__(self, count: int, start: Callable[..., Any], *arguments: Any):
        self._start = start, *arguments
        self._calls: queue.SimpleQueue[tuple[Future[Any], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._make_calls, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit[T](self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Has a process call a function, as `CallProcess.ask`. The future raises what that raises, or Crashed."""
        future: Future[T] = Future()
        self._calls.put((future, (function, *arguments)))
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
        process: CallProcess | None = None
        while waiting := self._calls.get():
            future, call = waiting
            if not future.set_running_or_notify_cancel():
                continue
            try:
                returned, value = False, Crashed()
                for _ in range(2):
                    process = process or CallProcess(*self._start)
                    try:
                        returned, value = process.ask(*call)
                        break
                    except BaseException as error:
                        process.close()
                        process = None
                        if not isinstance(error, (EOFError, OSError)):
                            raise
            except BaseException as error:
                returned, value = False, error
            (future.set_result if returned else future.set_exception)(value)
        if process is not None:
            process.close()
