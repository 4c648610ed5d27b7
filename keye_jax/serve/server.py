"""A server from its start to its end: the socket, the engine, signals, and the watchdog."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from keye_jax import interrupts
from keye_jax.errors import UserError
from keye_jax.jobs.journal import checkpoint_hash
from keye_jax.runtime import distributed
from keye_jax.serve.app import make_app
from keye_jax.serve.batches import Batches
from keye_jax.serve.files import FileStore
from keye_jax.serve.gate import log, start_log
from keye_jax.serve.options import ServeOptions
from keye_jax.serve.protocol import protocol_class
from keye_jax.serve.service import Service

_BACKLOG = 2048
_HEAD_BYTES = 64 << 10
_OTHER_FILES = 512
_LOOK_S, _SOON_S = 0.5, 0.02


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError if it cannot."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"--host is {host!r}; it must be a name or an address of this machine") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        where = f"--host is {host!r} and --port is {port}"
        raise UserError(f"{where}; they must be free to listen on ({error.strerror or error})") from error
    listener.setblocking(False)
    return listener


def allow_connections(count: int) -> None:
    """Raises this process's own limit on open files to what so many connections need, as far as the system lets it.

    At the limit no connection is accepted, and so no probe is answered.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + _OTHER_FILES  # an answer may need a file of its own
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(
    options: ServeOptions,
    checkpoint: Path,
    name: str,
    opener: Callable[[], AbstractContextManager[Any]],
    listener: socket.socket,
) -> int:
    """Serves until SIGTERM, or until the engine cannot be opened. Ctrl-C raises KeyboardInterrupt.

    Args:
      checkpoint: the folder, whose hash results of batches are kept with.
      name: of the model.
      opener: opens the engine, warm; it is called in a thread, so that probes are answered meanwhile.
      listener: what `listen` returned; it is closed.

    Returns:
      The exit code: 0 after SIGTERM and all answers, 1 if answers were cut off or the engine failed.

    Raises:
      UserError: the folder of files cannot be made, or the engine cannot be opened because of a user's mistake.
    """
    start_log()
    allow_connections(options.max_connections)
    state = options.state_dir
    try:
        files = FileStore(state and state / "files", options.max_stored_bytes)
        service = Service(options, name, files)
        batches = Batches(service, state and state / "batches", functools.partial(checkpoint_hash, checkpoint))
    except OSError as error:
        raise UserError(
            f"--state-dir is {str(state)!r}; it cannot be written to ({error.strerror or error})"
        ) from error
    server = Server(service, batches)
    opening = _Opening(opener)
    distributed.take_passed_on(server.pass_signal)
    try:
        asyncio.run(server.run(listener, opening))
    finally:
        service.close()
        batches.close()
        opening.close()
    if not opening.done:
        interrupts.end(signal.SIGTERM)
    if isinstance(opening.error, UserError):
        raise opening.error
    return 1 if opening.error is not None or server.failed else 0


class _Opening:
    """A thread that opens an engine, holds it, and closes it.

    Attributes:
      engine: the engine once it is open.
      error: why it is not.
    """

    def __init__(self, opener: Callable[[], AbstractContextManager[Any]]):
        self.engine: Any = None
        self.error: Exception | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(opener,), name="keye-jax opener", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the engine is open, or will not be."""
        return self.engine is not None or self.error is not None

    def close(self) -> None:
        """Closes the engine. One that is still being opened is left to the end of this process."""
        self._end.set()
        if self.done:
            self._thread.join()

    def _run(self, opener: Callable[[], AbstractContextManager[Any]]) -> None:
        try:
            with opener() as engine:
                self.engine = engine
                self._end.wait()
        except Exception as error:
            self.error = error
            if not isinstance(error, UserError):
                log.exception("the engine failed")


class Server(uvicorn.Server):
    """uvicorn with a drain: after the first signal, running answers end before connections are closed.

    Attributes:
      failed: whether the engine failed, or answers were still written when the time for them was over.
    """

    def __init__(self, service: Service, batches: Batches):
        options = service.options
        config = uvicorn.Config(
            make_app(service, batches),
            http=protocol_class(options.stall_s),  # pyright: ignore[reportArgumentType]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            timeout_graceful_shutdown=5,
            loop="asyncio",
        )
        super().__init__(config)
        service.connections = lambda: len(self.server_state.connections)
        self.failed = False
        self._service, self._batches = service, batches
        self._signals = 0
        self._passed = False

    async def run(self, listener: socket.socket, opening: _Opening) -> None:  # pyright: ignore
        """Serves until the end."""
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log.info("listening", extra={"fields": {"url": f"http://{shown}:{port}"}})
        watching = asyncio.create_task(self._watch(opening))
        try:
            await self.serve([listener])
        finally:
            watching.cancel()
            await asyncio.wait({watching})

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM drains, and does not, as with uvicorn, end the process afterwards. Ctrl-C ends all at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self.handle_exit)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; the second ends at once."""
        # The same signal to all processes of a model over several hosts arrives twice here.
        self._signals += not self._passed
        self._passed = False

    def pass_signal(self, number: int) -> None:
        """As the first signal does, one that another process of the model has got. Any thread may call it."""
        self._passed = not self._signals
        self._signals = max(1, self._signals)

    def drain(self) -> None:
        """As the first signal does."""
        self._signals += 1

    async def _watch(self, opening: _Opening) -> None:
        """Takes the engine when it is there, looks whether it goes on, and drains after a signal."""
        service, batches = self._service, self._batches
        working: asyncio.Task[None] | None = None
        due: float | None = None
        while not self.should_exit:
            now = time.monotonic()
            if opening.error is not None or (service.engine is not None and service.engine.ended):
                self.should_exit = self.failed = True
            elif service.engine is None and opening.engine is not None:
                service.take(opening.engine)
                working = asyncio.create_task(batches.run())
                log.info("ready", extra={"fields": {"cache_tokens": opening.engine.cache_tokens}})
            elif service.engine is not None:
                progress = service.engine.progress
                self._note_stalled(progress.busy and now - progress.at > service.options.watchdog_s)
            if self._signals and due is None:
                service.draining, due = True, now + service.options.grace_s
                batches.stop()
                log.info("draining", extra={"fields": {"answers": service.outstanding}})
            busy = service.outstanding > 0 or (working is not None and not working.done())
            if due is not None and (not busy or self._signals > 1 or now >= due):
                self.failed = service.outstanding > 0
                self.should_exit = True
            await asyncio.sleep(_SOON_S if due is not None or not opening.done else _LOOK_S)
        if working is not None:
            working.cancel()
            await asyncio.wait({working})

    def _note_stalled(self, stalled: bool) -> None:
        if stalled and not self._service.stalled:
            log.error("the engine has work and does not go on")
        self._service.stalled = stalled
