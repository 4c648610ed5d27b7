"""Ctrl-C and SIGTERM end the command within seconds and with one line, wherever they find it.

Python runs a signal's handler between two of its instructions, in the main thread. A compilation, a load or a wait for
other processes can be one such instruction that takes minutes. So a thread of this module gets signals too, over a
pipe that Python's C handler writes to. The first signal raises KeyboardInterrupt where files have to be closed; nothing
else is printed from then on. If that has not led to the end after a moment, or at the second signal, the thread ends
the process. What is written is safe from that, as from SIGKILL. A signal during an import ends the process too: native
modules abort it when Python code that their imports call raises an exception.

A command that ends in its own order at a signal takes signals with `given_to`, and tells the user with `say_stopped`.

A signal that comes before `handle` gets Python's own answer, a traceback. So this module imports little.
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

TYPE_CHECKING = False
if TYPE_CHECKING:  # to import typing takes as long as all of the above
    import subprocess
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType, TracebackType
    from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALLED = 128
"""The exit code after a signal, less the signal's number."""

_PATIENCE_S = 2.0

_told: signal.Signals | None = None
_taken = False
_raises = False
_hint = ""
_unfinished = False
_announce: Callable[[str, int], bool] | None = None
_said = False
_receivers: dict[int, Callable[[signal.Signals], object]] = {}
_ending = threading.RLock()  # of the thread that ends the process, for good
_ends = False
_whole = threading.RLock()  # of what is not cut in two
_main_is_in_whole = False
_late: int | None = None  # came to the main thread meanwhile
_handles = False
_others: int | None = None  # signals to handlers of others, where they are counted
_children: weakref.WeakSet[subprocess.Popen[Any]] = weakref.WeakSet()
_errors = 2  # where the line goes
_bell: int | None = None


def handle() -> None:
    """Takes over Ctrl-C and SIGTERM. For the main thread."""
    global _handles
    for number in SIGNALS:
        # A signal that the parent has the command ignore, as nohup does, stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _take)
    if not _handles:
        _handles = True
        sys.excepthook = _last_hook
        # Functions that are registered later are called earlier.
        atexit.register(_ignore)
    signal.set_wakeup_fd(_watched_bell(), warn_on_full_buffer=False)


def handle_if_command(program: str, module: str) -> None:
    """`handle`, if this process is a console script's or that of `python -m module`, whose imports have just begun."""
    if sys.argv[0].rpartition("/")[2] == program or (sys.argv[0] == "-m" and module in sys.orig_argv):
        handle()


@contextlib.contextmanager
def given_to(
    function: Callable[[signal.Signals], object], numbers: Sequence[signal.Signals] = SIGNALS
) -> Iterator[None]:
    """In it signals go to a function, and do not end the process. It needs no `handle`.

    For the main thread; without `numbers`, for any.

    Args:
      function: is called in a thread, also while the main thread is in native code.
      numbers: which signals.
    """
    if not numbers:
        yield
        return
    bell, handlers = signal.set_wakeup_fd(_watched_bell(), warn_on_full_buffer=False), {}
    try:
        for number in numbers:
            _receivers[number] = function
            handlers[number] = signal.signal(number, _leave)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        with _whole:  # the function is not being called
            _receivers.clear()
        signal.set_wakeup_fd(bell)


@contextlib.contextmanager
def ended_by_second() -> Iterator[None]:
    """In it the second signal to a handler of others ends the process, also where native code keeps it from that."""
    global _others
    _others = 0
    try:
        yield
    finally:
        _others = None


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """In it the first signal raises KeyboardInterrupt in the main thread, unless that imports a module.

    Outside, the first signal ends the process at once.
    """
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
    raise AssertionError("it has ended")


def told() -> bool:
    """Whether a signal is about to end this process."""
    return _told is not None


def say_stopped(number: int, rest: str) -> int:
    """Tells the user that a signal has stopped the command, which has ended in its own order.

    Signals that come later add no line.

    Args:
      rest: of the sentence, which begins with the signal's name.

    Returns:
      The exit code.
    """
    global _said
    with _undisturbed():
        if _told is None:  # or the command is about to say that it was interrupted
            print(f"keye-jax: stopped by {signal.Signals(number).name}{rest}", file=sys.stderr, flush=True)
            _said = True
    return SIGNALLED + number


def set_hint(text: str = "") -> None:
    """Has the line say what the user can do next."""
    global _hint
    _hint = text and f"; {text}"


def set_unfinished(unfinished: bool) -> None:
    """Says whether a line of other text on stderr has no end yet; the line about a signal then begins a new one."""
    global _unfinished
    _unfinished = unfinished


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

    A terminal and a cluster send both to all processes of a command, at any moment of their start too. This process
    acts on a signal when the start is over, or it would leave a child that it does not know.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with _undisturbed():  # other threads of this process get signals still
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


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """The main thread takes no signal in it, and the process does not end, unless it takes long."""
    global _main_is_in_whole, _late
    main = threading.current_thread() is threading.main_thread()
    try:
        with _whole:
            _main_is_in_whole |= main
            try:
                yield
            finally:
                _main_is_in_whole &= not main
    finally:
        if main and _late is not None:
            number, _late = _late, None
            _take(number, sys._getframe())


def _watched_bell() -> int:
    """The end of the pipe to write to; the thread is there."""
    global _bell
    if _bell is None:
        reading, _bell = os.pipe()
        os.set_blocking(_bell, False)
        threading.Thread(target=_watch, args=(reading,), name="keye-jax signals", daemon=True).start()
    return _bell


def _take(number: int, frame: FrameType | None) -> None:
    """The handler, in the main thread."""
    global _told, _taken, _late
    if _main_is_in_whole:
        _late = number
        return
    # The thread may have read the same signal before, and have set `_told`.
    first, _taken = not _taken, True
    _told = _told or signal.Signals(number)
    if first and _raises and not _is_in_import(frame):
        _mute()
        assert _bell is not None
        os.write(_bell, b"\0")  # to the thread, which did not count the signal if another's handler has passed it on
        raise KeyboardInterrupt
    _end()


def _is_in_import(frame: FrameType | None) -> bool:
    """Whether a frame, or one that has called it, is of Python's import system."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib."):
        frame = frame.f_back
    return frame is not None


def _leave(number: int, _: FrameType | None) -> None:
    """The handler of `given_to`, in the main thread. The thread gives the signal to the function."""


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
        got = [number for number in os.read(bell, 64) if number in SIGNALS and _ends_process(number)]
    if got:
        _told = _told or signal.Signals(got[0])
    end = time.monotonic() + _PATIENCE_S
    while len(got) < 2 and select.select([bell], [], [], max(0.0, end - time.monotonic()))[0]:
        got += [number for number in os.read(bell, 64) if number in SIGNALS]
    _end()


def _ends_process(number: int) -> bool:
    """Whether a signal is to end this process; it is given to whom it belongs."""
    global _others
    handler = signal.getsignal(number)
    if handler is _leave:
        with _whole:
            if (function := _receivers.get(number)) is not None:
                function(signal.Signals(number))
    elif handler is not _take and _others is not None:
        _others += 1
        return _others > 1
    return handler is _take


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
    """Says why and ends the process. Returns only if this thread is doing that already, and got another signal."""
    global _ends
    _ending.acquire()
    if _ends:
        return
    _ends = True
    assert _told is not None
    _whole.acquire(timeout=_PATIENCE_S)
    _mute()
    code, said = SIGNALLED + _told, _said
    if _announce is not None:
        with contextlib.suppress(Exception):
            said |= _announce(reason(_told), code)
    if not said:
        # On a terminal a progress bar has hidden the cursor, and "^C" stands in its line.
        before = "\x1b[?25h\n" if os.isatty(_errors) else "\n" * _unfinished
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
