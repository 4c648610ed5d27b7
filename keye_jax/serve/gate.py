"""What every request passes first: its name, its key, its origin, the limits of its body, and its line in the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import sys
import time
import urllib.parse
import uuid
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keye_jax.serve.errors import Refusal, refusal_response
from keye_jax.serve.options import ServeOptions
from keye_jax.serve.service import QUEUE_RETRY_S

# Without a key: the page itself, the probes, and the counts, none of which tells what was asked.
PROBE_PATHS = frozenset({"/health", "/ready", "/metrics"})
OPEN_PATHS = PROBE_PATHS | {"/"}
UPLOAD_PATH = "/v1/files"
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# Beside the file in the body of an upload.
FORM_BYTES = 64 << 10
# Bytes a second, on average over a body.
_MIN_RATE = 4096
# Seconds in which the rest of a refused body is thrown away, so that its client reads why; and that of a small one.
_LINGER_S, _SMALL_WAIT_S, _SMALL_BYTES = 2.0, 0.5, 64 << 10
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY"}

log = logging.getLogger("keye_jax.serve")


class JsonFormatter(logging.Formatter):
    """A line of JSON for each record; what a record has in `fields` is in it."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


def start_log() -> None:
    """Sends all records from "info" on to standard error, a line of JSON each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.INFO)


class Gate:
    """Middleware around all routes.

    It answers what may not pass, and turns an error that nothing else took into an answer. A request without an end of
    its body is given up. Probes always pass: a server with too many clients is busy and not dead.

    Args:
      app: the routes. They say in the state of a request, as `failure`, of which kind its failure is, if it fails.
      options: of the server.
      connections: how many are open.
      failed: called with the kind of each request that fails or is refused, but for probes.
    """

    def __init__(
        self, app: ASGIApp, options: ServeOptions, connections: Callable[[], int], failed: Callable[[str], None]
    ):
        self._app, self._options, self._connections, self._failed = app, options, connections, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        # What routes add for the log.
        fields: MutableMapping[str, Any] = scope.setdefault("state", {})
        fields["request_id"], fields["log"] = request_id, {}
        limit = self._options.max_body_bytes
        if scope["path"] == UPLOAD_PATH:
            limit = self._options.max_file_bytes + FORM_BYTES
        body = _Body(receive, headers, limit, self._options.stall_s)
        status, crowded = 0, False

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if body.is_small:  # it is there already, or comes at once, and the connection can go on
                    await body.discard(_SMALL_WAIT_S)
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = request_id
                for name, value in _HEADERS.items():
                    answer.setdefault(name, value)
                if crowded or not body.whole:
                    answer["connection"] = "close"
            elif not message.get("more_body", False) and not body.whole:
                await send({**message, "more_body": True})
                await body.discard(_LINGER_S)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        try:
            crowded = self._connections() > self._options.max_connections
            self._check(scope, headers, limit, crowded)
            await self._app(scope, body.receive, sending)
        except Refusal as refusal:
            fields["failure"] = refusal.kind
            if not status:
                await refusal_response(refusal)(scope, receive, sending)
        except Exception:
            log.exception("a request failed", extra={"fields": {"request_id": request_id}})
            fields["failure"] = "internal"
            if status:
                raise
            failed = Refusal(500, f"the server failed; its log has more about {request_id}", code="internal")
            failed.retry_after = 1
            await refusal_response(failed)(scope, receive, sending)
        finally:
            seconds = round(time.perf_counter() - began, 4)
            line = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            if "failure" in fields and scope["path"] not in PROBE_PATHS:
                self._failed(fields["failure"])
            level = logging.DEBUG if scope["path"] in PROBE_PATHS else logging.INFO
            log.log(level, "request", extra={"fields": {**line, "seconds": seconds, **fields["log"]}})

    def _check(self, scope: Scope, headers: Headers, limit: int, crowded: bool) -> None:
        """Raises Refusal if the request may not pass."""
        if crowded and scope["path"] not in PROBE_PATHS:
            most = self._options.max_connections
            message = f"there are more than {most:,} connections, which is all that may be open at once"
            raise Refusal(503, message, code="too_many_connections", retry_after=QUEUE_RETRY_S)
        key = self._options.api_key
        if key is not None and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key):
                raise Refusal(401, "the API key is missing or wrong", code="invalid_api_key")
        if key is None:
            self._check_origin(headers)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large(limit)

    def _check_origin(self, headers: Headers) -> None:
        """Without a key, what any page in a browser of this machine sends is refused, under whatever name it does."""
        host = headers.get("host", "")
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in _LOCAL_NAMES | {self._options.host}:
            raise Refusal(403, "the Host of the request must be that of this server, unless an API key is set")
        origin = headers.get("origin")
        allowed = {f"http://{host}", f"https://{host}", *self._options.cors_origins}
        if origin is not None and "*" not in allowed and origin not in allowed:
            raise Refusal(403, "pages of other origins must be allowed with --cors-origin")


def too_large(limit: int) -> Refusal:
    """The refusal of a body that has more than `limit` bytes."""
    return Refusal(413, f"the body of the request is too large; it must have at most {limit:,} bytes", code="too_large")


class _Body:
    """The body of a request as it comes.

    Attributes:
      whole: whether all of it is there.
      is_small: whether it is short, and not there yet.
    """

    def __init__(self, receive: Receive, headers: Headers, limit: int, stall_s: float):
        self._receive, self._limit, self._stall_s = receive, limit, stall_s
        self._size, self._begin = 0, time.monotonic()
        self._length = headers.get("content-length", "" if "transfer-encoding" in headers else "0")
        self.whole = self._length == "0"

    @property
    def is_small(self) -> bool:
        return not self.whole and self._length.isdecimal() and int(self._length) <= _SMALL_BYTES

    async def receive(self) -> Message:
        """The next part. Raises Refusal if the body is too long or too slow."""
        if self.whole:
            return await self._receive()
        due = self._begin + self._stall_s + self._size / _MIN_RATE
        wait = min(self._stall_s, max(0.0, due - time.monotonic()))
        try:
            message = await asyncio.wait_for(self._receive(), wait)
        except TimeoutError as error:
            raise Refusal(408, "the body of the request does not come, or comes too slowly", code="timeout") from error
        self._size += len(message.get("body", b""))
        self.whole = message["type"] == "http.disconnect" or not message.get("more_body", False)
        if self._size > self._limit:
            raise too_large(self._limit)
        return message

    async def discard(self, wait_s: float) -> None:
        """Throws the rest away for a while: a client that is cut off while it sends may not read the answer."""
        end = time.monotonic() + wait_s
        while not self.whole and (left := end - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(self._receive(), left)
            except TimeoutError:
                return
            self.whole = message["type"] == "http.disconnect" or not message.get("more_body", False)
