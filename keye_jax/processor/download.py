"""Downloads over http(s), with limits on time and size."""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import re
import socket
import string
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import weakref
from pathlib import Path
from typing import Any

from keye_jax import __version__
from keye_jax.errors import UserError, shorten

MAX_REMOTE_BYTES = 8 << 30
# Seconds of silence, seconds until the content begins (redirects included), and seconds in all.
REMOTE_TIMEOUT_S = 30
REMOTE_START_S = 60
REMOTE_TOTAL_S = 3600
# Bytes a second, on average, from the beginning of the content on.
REMOTE_MIN_RATE = 4096
_CHUNK_BYTES = 1 << 20
_ENCODINGS = frozenset({"gzip", "x-gzip", "compress", "deflate", "br", "zstd"})
# What stays as it is in each part of a URL; browsers write everything else as %XX.
_PATH_CHARACTERS = "".join(set(string.punctuation) - set('"#<>?`{}^'))
_QUERY_CHARACTERS = "".join(set(string.punctuation) - set("\"#<>'"))


class DownloadedFile:
    """A downloaded file. `close` removes it, and so does the garbage collector."""

    def __init__(self, path: str):
        self.path = Path(path)
        self._remove = weakref.finalize(self, _unlink, path)

    def close(self) -> None:
        self._remove()


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108


def download(url: str, field: str) -> DownloadedFile:
    """Downloads a file.

    Args:
      url: an http or https URL. Spaces and characters outside of ASCII are escaped, as browsers do.
      field: the name of the medium in error messages.

    Raises:
      UserError: the URL is malformed, the server cannot be reached, refuses, is too slow, or closes the connection
        early, or the content is compressed or larger than `MAX_REMOTE_BYTES`.
    """
    name = f"{field} is {shorten(url)}"
    result: DownloadedFile | None = None
    with _Watchdog(REMOTE_START_S) as watchdog:
        try:
            opener = _opener(watchdog)
            with opener.open(_escape(url), timeout=REMOTE_TIMEOUT_S) as response:
                encoding = response.headers.get("Content-Encoding", "").strip().lower()
                if encoding in _ENCODINGS:
                    raise UserError(f"{name}; it must be sent as it is, not with the content encoding {encoding!r}")
                descriptor, path = tempfile.mkstemp(prefix="keye-jax-")
                result = DownloadedFile(path)
                with open(descriptor, "wb") as file:  # noqa: PTH123
                    _copy(response, file, name, watchdog)
            watchdog.check()
            return result
        except BaseException as error:
            if result is not None:
                result.close()
            if isinstance(error, UserError) or not isinstance(error, OSError | http.client.HTTPException | ValueError):
                raise
            raise UserError(f"{name}; it cannot be fetched: {watchdog.reason or _reason(error)}") from error


def _copy(response: Any, file: Any, name: str, watchdog: _Watchdog) -> None:
    """Copies the content of an answer, and raises if it is too long or ends early."""
    expected, size = response.length, 0
    watchdog.content_begins()
    while expected is None or size < expected:
        if not (chunk := response.read1(_CHUNK_BYTES)):
            break
        size += len(chunk)
        if size > MAX_REMOTE_BYTES:
            raise UserError(f"{name}; it must be at most {MAX_REMOTE_BYTES >> 20} MiB")
        file.write(chunk)
        watchdog.received(size)
    if expected is not None and size < expected:
        raise ConnectionError(f"the connection was closed after {size:,} of {expected:,} bytes")


class _Watchdog:
    """Shuts the connections of one download down when it takes too long.

    A timeout of a socket is not enough. It begins again with every byte.

    Attributes:
      reason: why the connections were shut down; empty if they were not.
    """

    def __init__(self, seconds: float):
        self.reason = ""
        self._sockets: list[socket.socket] = []
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._due = time.monotonic() + seconds
        self._late = f"nothing came within {seconds:g} s"

    def __enter__(self) -> _Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        self._thread.join()

    def watch(self, connected: socket.socket) -> None:
        self._sockets.append(connected)

    def content_begins(self) -> None:
        self._start = time.monotonic()
        self._late = f"it comes with less than {REMOTE_MIN_RATE:,} bytes a second, or takes over {REMOTE_TOTAL_S:,} s"
        self.received(0)

    def received(self, size: int) -> None:
        """Notes that the first `size` bytes of the content are there."""
        self._due = self._start + min(REMOTE_TOTAL_S, REMOTE_TIMEOUT_S + size / REMOTE_MIN_RATE)

    def check(self) -> None:
        """Raises TimeoutError if the time was over: without a length, a content that was cut looks complete."""
        if self.reason:
            raise TimeoutError(self.reason)

    def _run(self) -> None:
        while not self._finished.wait(max(0.0, self._due - time.monotonic())):
            if time.monotonic() < self._due:
                continue
            self.reason = self._late
            # A connection that is made after this, by a redirect, is shut down by the next round.
            while not self._finished.wait(0.1):
                for connected in self._sockets:
                    with contextlib.suppress(OSError):
                        connected.shutdown(socket.SHUT_RDWR)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, watchdog: _Watchdog):
        super().__init__()
        self._watchdog = watchdog

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(_connection, http.client.HTTPConnection, self._watchdog), req)  # pyright: ignore[reportArgumentType]


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, watchdog: _Watchdog):
        super().__init__()
        self._watchdog = watchdog

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(_connection, http.client.HTTPSConnection, self._watchdog), req)  # pyright: ignore[reportArgumentType]


def _connection(kind: Any, watchdog: _Watchdog, host: str, **options: Any) -> Any:
    """A connection that shows its socket to the watchdog."""
    connection = kind(host, **options)
    connect = connection.connect

    def watched() -> None:
        connect()
        watchdog.watch(connection.sock)

    connection.connect = watched
    return connection


class _Redirects(urllib.request.HTTPRedirectHandler):
    inf_msg = "redirects in a circle or too often: "

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urllib.parse.urlsplit(newurl).scheme.lower() not in ("http", "https"):
            raise UserError(f"{shorten(req.full_url)} redirects to {shorten(newurl)}; only http(s) is followed")
        return super().redirect_request(req, fp, code, msg, headers, _escape(newurl))


def _opener(watchdog: _Watchdog) -> urllib.request.OpenerDirector:
    # There is no handler for file: or ftp:, so that redirects cannot lead there either.
    opener = urllib.request.OpenerDirector()
    for handler in (
        *(urllib.request.ProxyHandler(), _Http(watchdog), _Https(watchdog), _Redirects()),
        *(urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor()),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", f"keye-jax/{__version__}"), ("Accept", "*/*")]
    return opener


def _escape(url: str) -> str:
    """The URL in ASCII, as browsers send it.

    Raises:
      ValueError: the URL is malformed.
    """
    if match := re.search(r"[\x00-\x1f\x7f-\x9f]", url):
        raise ValueError(f"its URL must hold no control character, such as {match[0]!r}")
    parts = urllib.parse.urlsplit(url)
    host = urllib.parse.unquote(parts.hostname or "")
    if not host or re.search(r"[\s/?#@\\<>^|%]", host):
        raise ValueError("its URL must name a host")
    if ":" in host:
        host = f"[{host}]"
    elif not host.isascii():
        host = host.encode("idna").decode()
    if parts.username is not None:
        raise ValueError("its URL must hold no user name")
    port = "" if parts.port is None else f":{parts.port}"
    path = urllib.parse.quote(parts.path.replace("\\", "/"), safe=_PATH_CHARACTERS)
    query = urllib.parse.quote(parts.query, safe=_QUERY_CHARACTERS)
    return urllib.parse.urlunsplit((parts.scheme, host + port, path or "/", query, ""))


def _reason(error: Exception) -> str:
    """Why a download failed, in one line."""
    if isinstance(error, urllib.error.HTTPError):
        text = str(error.msg)
        answer = text if text.startswith(_Redirects.inf_msg) else f"answers {error.code} {text}"
        text = f"the server {answer}"
    elif isinstance(error, http.client.IncompleteRead):
        text = "the connection was closed before the end"
    elif isinstance(error, urllib.error.URLError):
        text = str(error.reason)
    else:
        text = str(error) or type(error).__name__
    return shorten_line(text)


def shorten_line(text: str) -> str:
    return " ".join(text.split())[:200]
