"""Sources of media: files, `data:` URLs, base64, and http(s) URLs if the caller allows them."""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import re
import socket
import ssl
import string
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keye_jax import __version__
from keye_jax.errors import UnreachableError, UserError, shorten
from keye_jax.processor.data_url import is_data_url, read_bare_base64, read_data_url
from keye_jax.processor.guard import MediaGuard, connect_public

MAX_REMOTE_BYTES = 8 << 30
# Seconds: of silence; until the content begins, redirects included; in all.
REMOTE_TIMEOUT_S = 30
REMOTE_START_S = 60
REMOTE_TOTAL_S = 3600
# Bytes a second, on average over the content.
REMOTE_MIN_RATE = 4096
_CHUNK_BYTES = 1 << 20
_ENCODINGS = frozenset({"gzip", "x-gzip", "compress", "deflate", "br", "zstd"})
# Punctuation that stays as it is in a part of a URL. Browsers escape the rest, and all that is not ASCII.
_IN_PATH = "".join(set(string.punctuation) - set('"#<>?`{}^'))
_IN_QUERY = "".join(set(string.punctuation) - set("\"#<>'"))

type _Connect = Callable[[tuple[str, int], float | None], socket.socket]


class DownloadedFile:
    """A downloaded file. `close` removes it, and so does the garbage collector."""

    def __init__(self, path: str):
        self.path = Path(path)
        self._remove = weakref.finalize(self, _unlink, path)

    def close(self) -> None:
        self._remove()

    def keep(self) -> None:
        """Leaves the file to the caller, who has to remove it."""
        self._remove.detach()


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108


def fetch(
    source: str, field: str, *, allow_remote: bool, allow_files: bool = True, guard: MediaGuard | None = None
) -> Path | bytes | DownloadedFile:
    """Finds or downloads what a text names.

    Args:
      source: a path, a `file:`, `data:`, `http:` or `https:` URL, or the base64 of an image or a video. White space
        around a URL does not count.
      field: the name of the medium in error messages.
      allow_remote: whether http(s) URLs may be fetched.
      allow_files: whether local files may be read.
      guard: limits on what strangers name; None if whoever asks is trusted.

    Returns:
      The absolute path of a local file, the content of a `data:` URL or of base64, or a downloaded file.

    Raises:
      UserError: the medium is missing, not allowed, malformed, larger than `MAX_REMOTE_BYTES`, or unreachable.
        UnreachableError if it may be reached later.
    """
    if is_data_url(source):
        return read_data_url(source, field)
    if (data := read_bare_base64(source)) is not None:
        return data
    url = source.strip()
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", url)
    kind = scheme[1].lower() if scheme else ""
    if kind in ("http", "https"):
        if not allow_remote:
            raise UserError(f"{field} is {shorten(url)}; http(s) URLs are fetched only with --allow-remote")
        return _download(url, field, guard)
    if kind != "file" and "://" in url:
        raise UserError(f"{field} is {shorten(url)}; it must be a path or a file:, data:, http: or https: URL")
    if not allow_files:
        raise UserError(f"{field} is {shorten(url)}; local files may not be read here, only data: and http(s) URLs")
    try:
        path = _path_of_url(url, field) if kind == "file" else Path(source)
        path = path.expanduser() if guard is None else guard.file(path, field)
        if not path.exists():
            raise UserError(f"{field} is {shorten(source)}; there is no such file")
        if not path.is_file():
            raise UserError(f"{field} is {shorten(source)}; it must be a regular file")
        if not os.access(path, os.R_OK):
            raise UserError(f"{field} is {shorten(source)}; the file must be readable")
        return path.absolute()
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the home folder of a user who does not exist
        raise UserError(f"{field} is {shorten(source)}; it must be the path of a file") from error


def _path_of_url(url: str, field: str) -> Path:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{field} is {shorten(url)}; a file: URL must name a file of this machine")
    return Path(urllib.request.url2pathname(parts.path))


def _download(url: str, field: str, guard: MediaGuard | None) -> DownloadedFile:
    name = f"{field} is {shorten(url)}"
    limit = MAX_REMOTE_BYTES if guard is None else min(MAX_REMOTE_BYTES, guard.max_bytes)
    connect = None if guard is None else functools.partial(connect_public, name)
    with contextlib.ExitStack() as on_error, _Watchdog() as watchdog:
        try:
            with _opener(watchdog, connect).open(_escape(url), timeout=REMOTE_TIMEOUT_S) as response:
                encoding = response.headers.get("Content-Encoding", "").strip().lower()
                if encoding in _ENCODINGS:
                    raise UserError(f"{name}; it must be sent as it is, not with the content encoding {encoding!r}")
                descriptor, path = tempfile.mkstemp(prefix="keye-jax-")
                result = DownloadedFile(path)
                on_error.callback(result.close)
                with open(descriptor, "wb") as file:  # noqa: PTH123
                    _copy(response, file, name, limit, watchdog)
            if watchdog.reason:
                raise TimeoutError
        except UserError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            kind = UnreachableError if _may_pass(error) else UserError
            raise kind(f"{name}; it cannot be fetched: {watchdog.reason or _reason(error)}") from error
        on_error.pop_all()
        return result


def _copy(response: Any, file: Any, name: str, limit: int, watchdog: _Watchdog) -> None:
    """Copies the content of an answer to a file. Raises an error if the content is too long or ends early."""
    expected, size = response.length, 0
    watchdog.begin()
    while expected is None or size < expected:
        chunk = response.read1(_CHUNK_BYTES)
        if not chunk:
            break
        size += len(chunk)
        if size > limit:
            raise UserError(f"{name}; it must have at most {limit:,} bytes")
        file.write(chunk)
        watchdog.received(size)
    if expected is not None and size < expected:
        raise ConnectionError(f"the connection was closed after {size:,} of {expected:,} bytes")


class _Watchdog:
    """Shuts the connections of one download down when it takes too long.

    The timeout of a socket is not enough: it begins again with every byte.

    Attributes:
      reason: why the connections were shut down; empty if they were not.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._late = f"the content does not begin within {REMOTE_START_S:g} s"
        self._due = time.monotonic() + REMOTE_START_S
        self._start = 0.0
        self._sockets: list[socket.socket] = []
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        self._thread.join()

    def watch(self, connected: socket.socket) -> None:
        """Adds a connection."""
        self._sockets.append(connected)

    def begin(self) -> None:
        """Notes that the content begins."""
        self._start = time.monotonic()
        self._late = f"it comes with less than {REMOTE_MIN_RATE:,} bytes a second, or takes over {REMOTE_TOTAL_S:,} s"
        self.received(0)

    def received(self, size: int) -> None:
        """Notes that the first `size` bytes of the content are there."""
        self._due = self._start + min(REMOTE_TOTAL_S, REMOTE_TIMEOUT_S + size / REMOTE_MIN_RATE)

    def _run(self) -> None:
        while (left := self._due - time.monotonic()) > 0:
            if self._finished.wait(min(left, 0.5)):  # the time may become shorter in the meantime
                return
        self.reason = self._late
        # Again and again, since a redirect may still make a connection.
        while not self._finished.wait(0.1):
            for connected in list(self._sockets):
                with contextlib.suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, watchdog: _Watchdog, connect: _Connect | None):
        super().__init__()
        self._connection: Any = functools.partial(_connection, http.client.HTTPConnection, watchdog, connect)

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self._connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, watchdog: _Watchdog, connect: _Connect | None):
        super().__init__()
        self._connection: Any = functools.partial(_connection, http.client.HTTPSConnection, watchdog, connect)

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self._connection, req)


def _connection(kind: Any, watchdog: _Watchdog, connect: _Connect | None, host: str, **options: Any) -> Any:
    """A connection of class `kind` whose socket the watchdog knows, and which `connect` makes if it is given."""
    connection = kind(host, **options)
    begin = connection.connect

    def begin_with(connect: _Connect) -> None:
        connected = connect((connection.host, connection.port), connection.timeout)
        if kind is http.client.HTTPSConnection:
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=connection.host)
        connection.sock = connected

    def watched() -> None:
        if connect is None:
            begin()
        else:
            begin_with(connect)
        watchdog.watch(connection.sock)

    connection.connect = watched
    return connection


class _Redirects(urllib.request.HTTPRedirectHandler):
    inf_msg = "redirects in a circle or too often: "

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urllib.parse.urlsplit(newurl).scheme.lower() not in ("http", "https"):
            raise UserError(f"{shorten(req.full_url)} redirects to {shorten(newurl)}; only http(s) is followed")
        return super().redirect_request(req, fp, code, msg, headers, _escape(newurl))


def _opener(watchdog: _Watchdog, connect: _Connect | None) -> urllib.request.OpenerDirector:
    # There is no handler for file: or ftp:, so that redirects cannot lead there either.
    opener = urllib.request.OpenerDirector()
    # A proxy would look names up itself, and reach what must not be reached.
    proxies = urllib.request.ProxyHandler() if connect is None else urllib.request.ProxyHandler({})
    for handler in (
        *(proxies, _Http(watchdog, connect), _Https(watchdog, connect), _Redirects()),
        *(urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor()),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", f"keye-jax/{__version__}")]
    return opener


def _escape(url: str) -> str:
    """The URL in ASCII, as browsers send it, without the fragment.

    Raises:
      ValueError: the URL is malformed.
    """
    if match := re.search(r"[\x00-\x1f\x7f-\x9f]", url):
        raise ValueError(f"its URL must hold no control character, such as {match[0]!r}")
    parts = urllib.parse.urlsplit(url)
    host = urllib.parse.unquote(parts.hostname or "")
    if not host or re.search(r"[\s/?#@\\<>^|%]", host):
        raise ValueError("its URL must name a host")
    if parts.username is not None:
        raise ValueError("its URL must hold no user name")
    host = f"[{host}]" if ":" in host else host if host.isascii() else host.encode("idna").decode()
    port = "" if parts.port is None else f":{parts.port}"
    path = urllib.parse.quote(parts.path.replace("\\", "/"), safe=_IN_PATH)
    query = urllib.parse.quote(parts.query, safe=_IN_QUERY)
    return urllib.parse.urlunsplit((parts.scheme, host + port, path or "/", query, ""))


def _may_pass(error: Exception) -> bool:
    """Whether the same download may succeed later: not if the server refuses it or the URL is malformed."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 425, 429)
    return isinstance(error, OSError | http.client.HTTPException) and not isinstance(error, http.client.InvalidURL)


def _reason(error: Exception) -> str:
    """Why a download failed, in one line."""
    if isinstance(error, urllib.error.HTTPError):
        text = str(error.msg)
        text = f"the server {text if text.startswith(_Redirects.inf_msg) else f'answers {error.code} {text}'}"
    elif isinstance(error, http.client.IncompleteRead):
        text = "the connection was closed before the end"
    elif isinstance(error, urllib.error.URLError):
        text = str(error.reason)
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())[:200]
