"""Ctrl-C and SIGTERM end the command within seconds and with one line, wherever they find it.

Python runs a signal's handler between two of its instructions, in the main thread. A compilation, a load or a wait for
other processes can be one such instruction that takes minutes. So a thread of this module gets signals too, over a
pipe that Python's C handler writes to. The first signal raises KeyboardInterrupt where files have to be closed; nothing
else is printed from then on. If that has not led to the end after a moment, or at the second signal, the thread ends
the process. What is written is safe from that, as from SIGKILL.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import subprocess

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALLED = 128
"""The exit code after a signal, less the signal's number."""

_PATIENCE_S = 2.0

_told: signal.Signals | None = None
_taken = False
_raises = False
_hint = ""
_announce: Callable[[str, int], bool] | None = None
_ending = threading.Lock()
_children: weakref.WeakSet[subprocess.Popen[Any]] = weakref.WeakSet()
_errors = 2  # where the line goes
_bell: int | None = None


def handle() -> None:
    """Takes over Ctrl-C and SIGTERM. For the main thread."""
    global _bell
    for number in SIGNALS:
        # A signal that the parent has the command ignore, as nohup does, stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _take)
    if _bell is None:
        reading, _bell = os.pipe()
        os.set_blocking(_bell, False)
        threading.Thread(target=_watch, args=(reading,), name="keye-jax signals", daemon=True).start()
        sys.excepthook = _last_hook
        # Functions that are registered later are called earlier.
        atexit.register(_ignore)
    signal.set_wakeup_fd(_bell, warn_on_full_buffer=False)


def handle_again() -> None:
    """`handle`, if it was called before others, such as asyncio, took over."""
    if _bell is not None:
        handle()


def handle_if_command(program: str, module: str) -> None:
    """`handle`, if this process is a console script's or that of `python -m module`, whose imports have just begun."""
    if Path(sys.argv[0]).name == program or (sys.argv[0] == "-m" and module in sys.orig_argv):
        handle()


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """In it the first signal raises KeyboardInterrupt in the main thread; outside, it ends the process at once."""
    global _raises
    _raises = True
    try:
        yield
    finally:
        _raises = False
        end_if_told()


def end_if_told() -> None:
    """Ends the process if there was a signal, whatever has become of its KeyboardInterrupt."""
    if _told is not None:
        _end()


def end(number: int) -> NoReturn:
    """Ends the process as a signal does, which a handler of others has got."""
    global _told
    _told = _told or signal.Signals(number)
    _end()
    while True:  # another thread is about to end it
        time.sleep(1)


def told() -> bool:
    """Whether a signal is about to end this process."""
    return _told is not None


def set_hint(text: str = "") -> None:
    """Has the line say what the user can do next."""
    global _hint
    _hint = text and f"; {text}"


def announce(function: Callable[[str, int], bool]) -> None:
    """Has a function called before a signal ends the process.

    Args:
      function: takes what happened and the exit code; returns whether it has told the user.
    """
    global _announce
    _announce = function


def line(number: int) -> str:
    """What the user is told of a signal."""
    return f"keye-jax: {reason(number)}{_hint}\n"


def reason(number: int) -> str:
    """What a signal has done, after "was"."""
    return "interrupted" if number == signal.SIGINT else f"told to end ({signal.Signals(number).name})"


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes that this thread starts in it do not get Ctrl-C and SIGTERM: this process ends them.

    A terminal and a cluster send both to all processes of a command, at any moment of their start too.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_at_end(child: subprocess.Popen[Any]) -> None:
    """Has a signal that ends this process kill a child too, which may not have come as far as `end_with`.

    The children of `multiprocessing` need not be named.
    """
    _children.add(child)


def end_with(pipe: int) -> None:
    """Has this process end when the other end of a pipe is closed, as it is when its parent ends, however that does."""

    def wait() -> None:
        waiting = select.poll()
        waiting.register(pipe, 0)  # not to read: only to hear that the other end is gone
        waiting.poll()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def start_quiet_tracker() -> None:
    """Starts the process that removes what a killed process of `multiprocessing` leaves; it prints nothing then."""
    from multiprocessing import resource_tracker

    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        with kept_from_children():
            resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _take(number: int, _: FrameType | None) -> None:
    """The handler, in the main thread."""
    global _told, _taken
    # The thread may have read the same signal before, and have set `_told`.
    first, _taken = not _taken, True
    _told = _told or signal.Signals(number)
    if first and _raises:
        _mute()
        assert _bell is not None
        os.write(_bell, b"\0")  # to the thread, which did not count the signal if another's handler has passed it on
        raise KeyboardInterrupt
    _end()


def _ignore() -> None:
    """Python gives up its handlers when it has done all else. A signal would then end the process without a line."""
    for number in SIGNALS:
        if signal.getsignal(number) is _take:
            signal.signal(number, signal.SIG_IGN)


def _watch(bell: int) -> None:
    """The thread. It reads the numbers of signals; those that are left to another's handler do not count."""
    global _told
    got: list[int] = []
    while not got and _told is None:
        got = [number for number in os.read(bell, 64) if number in SIGNALS and signal.getsignal(number) is _take]
    if got:
        _told = _told or signal.Signals(got[0])
    end = time.monotonic() + _PATIENCE_S
    while len(got) < 2 and select.select([bell], [], [], max(0.0, end - time.monotonic()))[0]:
        got += [number for number in os.read(bell, 64) if number in SIGNALS]
    _end()


def _mute() -> None:
    """Tracebacks of threads and of destructors, warnings and progress that come after the signal lead nowhere."""
    global _errors
    if _errors == 2:
        errors = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        _errors = errors


def _end() -> None:
    """Says why and ends the process; returns if that is under way already."""
    if not _ending.acquire(blocking=False):
        return
    assert _told is not None
    _mute()
    code, said = SIGNALLED + _told, False
    if _announce is not None:
        with contextlib.suppress(Exception):
            said = _announce(reason(_told), code)
    if not said:
        # On a terminal a progress bar has hidden the cursor, and "^C" stands in its line.
        before = "\x1b[?25h\n" if os.isatty(_errors) else ""
        with contextlib.suppress(OSError):
            os.write(_errors, f"{before}{line(_told)}".encode())
    _kill_children()
    os._exit(code)


def _kill_children() -> None:
    with contextlib.suppress(Exception):  # another thread has just started one
        started = sys.modules.get("multiprocessing")
        for child in [*_children, *(started.active_children() if started else ())]:
            with contextlib.suppress(Exception):  # it has ended
                child.kill()


def _last_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
    end_if_told()
    sys.__excepthook__(kind, error, trace)
