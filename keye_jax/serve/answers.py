"""Answers of the engine as responses: whole, or as server-sent events while they are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from keye_jax.jobs.lines import encode

CLIENT_GONE = "client_gone"
"""The kind of failure of an answer whose client went away before it was whole."""

_COMMENT = b": still working\n\n"


class ClientGone(Exception):
    """The client has closed its connection."""


async def unless_gone[T](receive: Receive, wanted: Awaitable[T]) -> T:
    """The result of `wanted`.

    Raises:
      ClientGone: the client went away before; `wanted` was cancelled.
    """
    task = asyncio.ensure_future(wanted)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait({task, gone})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    """A server-sent event with an object, and a name if the interface names its events."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + encode(value) + b"\n"


DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """A response of server-sent events.

    A stream that is silent for a while gets a comment, so that nothing between the server and the client takes it for
    dead.

    Args:
      events: what is sent, event by event.
      heartbeat_s: seconds of silence before a comment.
      close: called at the end, also if the client has gone away.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        heartbeat_s: float,
        close: Callable[[], None],
        headers: Mapping[str, str],
    ):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._events, self._heartbeat_s, self._close = events, heartbeat_s, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_disconnected(receive))
        following: asyncio.Task[bytes | None] = asyncio.create_task(_next(self._events))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while not gone.done():
                await asyncio.wait({gone, following}, timeout=self._heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
                body: bytes | None = _COMMENT
                if following.done():
                    if (body := following.result()) is None:
                        await send({"type": "http.response.body", "body": b""})
                        return
                    following = asyncio.create_task(_next(self._events))
                if body and not gone.done():
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            self._close()
            for task in (gone, following):
                task.cancel()
            await asyncio.wait({gone, following})


async def _next(events: AsyncIterator[bytes]) -> bytes | None:
    """The next event; None if there is none."""
    return await anext(events, None)
