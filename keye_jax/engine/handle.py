"""What a client has of a request that it gave to an engine."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, cast

from keye_jax.engine.request import AnswerPiece, Event, RequestError, Result


class Handle:
    """A request that was submitted. It is iterated over, or awaited, or asked for its result."""

    def __init__(self, cancel: Callable[[], None]):
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._outcome: Result | RequestError | None = None
        self._done = threading.Event()
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[AnswerPiece]:
        """Pieces of the answers as they come.

        Raises:
          RequestError: the request failed.
        """
        while True:
            event = self._events.get()
            if not isinstance(event, Result | RequestError):
                yield event
                continue
            self._events.put(event)  # for others who iterate
            if isinstance(event, RequestError):
                raise event
            return

    async def __aiter__(self) -> AsyncIterator[AnswerPiece]:
        """As `__iter__`, without holding up the event loop."""
        iterator = iter(self)
        done = object()
        while True:
            piece = await asyncio.to_thread(next, iterator, done)
            if piece is done:
                return
            yield cast(AnswerPiece, piece)

    def result(self, timeout: float | None = None) -> Result:
        """Waits for all answers.

        Raises:
          RequestError: the request failed.
          TimeoutError: it is not done after `timeout` seconds.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"the request is not done after {timeout} seconds")
        if isinstance(self._outcome, RequestError):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def __await__(self) -> Generator[Any, None, Result]:
        """Waits for `result` without holding up the event loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(lambda: future.done() or future.set_result(None))

        with self._lock:
            waits = not self._done.is_set()
            if waits:
                self._listeners.append(wake)
        if waits:
            yield from future.__await__()
        return self.result(0)

    @property
    def done(self) -> bool:
        """Whether `result` would not wait."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Ends the request soon. Its result then has what was written so far."""
        self._cancel()

    def put(self, event: Event) -> None:
        """For the engine: adds an event."""
        if not isinstance(event, Result | RequestError):
            self._events.put(event)
            return
        with self._lock:
            if self._done.is_set():
                return
            self._outcome = event
            self._done.set()
            listeners, self._listeners = self._listeners, []
        self._events.put(event)
        for wake in listeners:
            wake()
