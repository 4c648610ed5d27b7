"""One worker process, as the process that started it sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from keye_jax import interrupts

_PROGRAM = "from keye_jax.engine.media.worker import main; main()"
# Seconds. How long it may take to start and to answer, and how often one looks whether to go on waiting.
_START_S, _PING_S, _LOOK_S = 120, 30, 0.1


class ProcessEnded(Exception):
    """The process ended by itself; the text says how."""


class WorkerProcess:
    """A process that runs `worker.main`.

    It is started as a program of its own, and not by `multiprocessing`, which would import the caller's main module
    into it, and JAX with that.

    Args:
      setup: pickled `worker.Settings`.
      memory: descriptor of the shared memory.

    Raises:
      ProcessEnded: it does not start.
      TimeoutError: it does not start in time.
    """

    def __init__(self, setup: bytes, memory: int):
        self._pipe, theirs = Pipe()
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        with theirs, interrupts.kept_from_children():
            descriptors = (theirs.fileno(), memory)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, *map(str, descriptors)],
                pass_fds=descriptors,
                env=os.environ | {"PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output belongs to the user's results
            )
            interrupts.kill_at_end(self._process)
        try:
            self._pipe.send_bytes(setup)
            self.receive(_START_S)
        except ConnectionError as error:
            ended = self._ended()
            self.close()
            raise ended from error
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def answers(self) -> bool:
        """Whether the process, which has nothing to do, is there: while it is killed, it still seems to run."""
        try:
            self.send(("ping",))
            self.receive(_PING_S)
        except (ProcessEnded, TimeoutError):
            return False
        return True

    def send(self, message: tuple[Any, ...]) -> None:
        """Raises ProcessEnded."""
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._ended() from error

    def receive(self, limit: float, look: Callable[[], float | None] = lambda: None) -> tuple[Any, ...]:
        """The next message.

        Args:
          limit: seconds to wait for it.
          look: is called from time to time; it may return another number of seconds from now.

        Raises:
          ProcessEnded: there is none, because the process ended.
          TimeoutError: it does not come in time.
        """
        end = time.monotonic() + limit
        try:
            while not self._pipe.poll(max(0, min(_LOOK_S, end - time.monotonic()))):
                if (left := look()) is not None:
                    end = min(end, time.monotonic() + left)
                if time.monotonic() >= end:
                    raise TimeoutError
            return self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise self._ended() from error

    def kill(self) -> None:
        """Ends the process at once. Any thread may call it."""
        self._process.kill()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def _ended(self) -> ProcessEnded:
        code = self._process.wait()
        if code >= 0:
            return ProcessEnded(f"exit code {code}")
        try:
            return ProcessEnded(signal.Signals(-code).name)
        except ValueError:
            return ProcessEnded(f"signal {-code}")
