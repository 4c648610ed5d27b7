"""HTTP/1.1 connections that cannot be held open by doing nothing."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol_class(stall_s: float) -> type[asyncio.Protocol]:
    """A protocol for uvicorn that ends a connection whose client does not go on.

    Args:
      stall_s: seconds in which the head of a request has to be whole, and in which some of what waits for the client
        has to be read.
    """

    class Protocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _head_due = _unread = 0.0
        _paused = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._head_due = self.loop.time() + stall_s
            self._timer = self.loop.call_later(stall_s, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._timer is not None:
                self._timer.cancel()

        def data_received(self, data: bytes) -> None:
            before: Any = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self._head_due = 0.0
            elif not self._head_due and before.response_complete:  # the head of the next request begins
                self._head_due = self.loop.time() + stall_s

        def pause_writing(self) -> None:
            super().pause_writing()
            self._paused, self._unread = True, float("inf")

        def resume_writing(self) -> None:
            super().resume_writing()
            self._paused = False

        def _look(self) -> None:
            unread = self.transport.get_write_buffer_size()
            stalled = (self._paused or self.transport.is_closing()) and unread >= self._unread
            if stalled or 0 < self._head_due <= self.loop.time():
                self.transport.abort()
                return
            self._unread = unread if unread else float("inf")
            self._timer = self.loop.call_later(stall_s / 2, self._look)

    return Protocol
