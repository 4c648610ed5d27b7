"""A process that makes calls for this one, and may end at any moment, without keeping this one waiting.

It has a pipe of its own, and this process does not hold the end that it writes to. The processes of
`concurrent.futures.ProcessPoolExecutor` share one, which their parent holds: when one is killed while it sends a
result, the parent waits for the rest of it without end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from keye_jax import interrupts


class CallProcess:
    """A process that calls functions, one at a time. It ends with this one.

    Args:
      start: is called in it first. What it returns is the first argument of every function.
      arguments: of `start`.
    """

    def __init__(self, start: Callable[..., Any], *arguments: Any):
        context = multiprocessing.get_context("spawn")  # not forked: JAX has threads
        self._pipe, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(target=_run, args=(theirs, start, arguments), daemon=True)
        with theirs, interrupts.kept_from_children():
            self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def ask(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> tuple[bool, Any]:
        """Has it call a function.

        After an exception nothing else can be asked: its next answer may be to this call.

        Returns:
          True and what the function returned, or False and the exception that it raised.

        Raises:
          TimeoutError: no answer has come after `timeout` seconds.
          EOFError, OSError: the process ended.
        """
        self._pipe.send((function, arguments))
        if not self._pipe.poll(timeout):
            raise TimeoutError
        return self._pipe.recv()

    def kill(self) -> None:
        """Ends it at once. Any thread may call it."""
        self._process.kill()

    def close(self) -> None:
        """Has it end, which takes until its call is made."""
        self._pipe.close()
        self._process.join()


def _run(pipe: Connection, start: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The program of the process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    interrupts.end_with(parent.sentinel)
    begun = start(*arguments)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the other process is done with it
        while True:
            function, arguments = pipe.recv()
            try:
                answer = True, function(begun, *arguments)
            except Exception as error:
                error.add_note(f"It was raised in a process of its own:\n{traceback.format_exc()}")
                answer = False, error
            pipe.send(answer)
