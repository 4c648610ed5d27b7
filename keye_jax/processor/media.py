"""Sources of media: files, `data:` URLs, and http(s) URLs if the caller allows them."""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import os
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import weakref
from pathlib import Path

from keye_jax.errors import UserError

REMOTE_TIMEOUT_S = 30
MAX_REMOTE_BYTES = 8 << 30
_CHUNK_BYTES = 1 << 20


def shorten(value: object, limit: int = 80) -> str:
    """`value` for an error message: one line of at most `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


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


def fetch(url: str, field: str, *, allow_remote: bool, allow_files: bool = True) -> Path | bytes | DownloadedFile:
    """Finds or downloads what a path or URL names.

    Args:
      url: a path, or a `file:`, `data:`, `http:` or `https:` URL.
      field: the name of the medium in error messages.
      allow_remote: whether http(s) URLs may be fetched.
      allow_files: whether local files may be read; a server turns this off.

    Returns:
      The absolute path of a local file, the content of a `data:` URL, or a downloaded file.

    Raises:
      UserError: the medium is missing, not allowed, malformed, larger than `MAX_REMOTE_BYTES`, or unreachable.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", url)
    kind = scheme[1].lower() if scheme else ""
    if kind == "data":
        return _read_data_url(url, field)
    if kind in ("http", "https"):
        if not allow_remote:
            raise UserError(f"{field} is {shorten(url)}; http(s) URLs are fetched only with --allow-remote")
        return _download(url, field)
    if kind == "file":
        parts = urllib.parse.urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{field} is {shorten(url)}; a file: URL must name a file of this machine")
        path = Path(urllib.request.url2pathname(parts.path))
    elif "://" in url:
        raise UserError(f"{field} is {shorten(url)}; it must be a path or a file:, data:, http: or https: URL")
    else:
        path = Path(url).expanduser()
    return _check_file(path, url, field, allow_files)


def _check_file(path: Path, url: str, field: str, allow_files: bool) -> Path:
    if not allow_files:
        raise UserError(f"{field} is {shorten(url)}; local files may not be read here, only data: and http(s) URLs")
    try:
        if not path.exists():
            raise UserError(f"{field} is {shorten(url)}; there is no such file")
        if not path.is_file():
            raise UserError(f"{field} is {shorten(url)}; it must be a regular file")
        if not os.access(path, os.R_OK):
            raise UserError(f"{field} is {shorten(url)}; the file must be readable")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{field} is {shorten(url)}; it must be the path of a file") from error
    return path.absolute()


def _read_data_url(url: str, field: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise UserError(f"{field} is {shorten(url)}; a data: URL must be data:<type>;base64,<data>")
    data = urllib.parse.unquote_to_bytes(payload)
    if header.lower().endswith(";base64"):
        try:
            data = base64.b64decode(b"".join(data.split()), validate=True)
        except binascii.Error as error:
            raise UserError(f"{field} is {shorten(url)}; its data must be valid base64 ({error})") from error
    if not data:
        raise UserError(f"{field} is {shorten(url)}; a data: URL must hold some data")
    return data


class _HttpOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urllib.parse.urlsplit(newurl).scheme.lower() not in ("http", "https"):
            raise UserError(f"{shorten(req.full_url)} redirects to {shorten(newurl)}; only http(s) is followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, field: str) -> DownloadedFile:
    # There is no handler for file: or ftp:, so that redirects cannot lead there either.
    opener = urllib.request.OpenerDirector()
    for handler in (
        *(urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler),
        *(_HttpOnly, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor),
    ):
        opener.add_handler(handler())
    descriptor, path = tempfile.mkstemp(prefix="keye-jax-")
    result = DownloadedFile(path)
    try:
        with open(descriptor, "wb") as file, opener.open(url, timeout=REMOTE_TIMEOUT_S) as response:  # noqa: PTH123
            size = 0
            while chunk := response.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > MAX_REMOTE_BYTES:
                    raise UserError(f"{field} is {shorten(url)}; it must be at most {MAX_REMOTE_BYTES >> 20} MiB")
                file.write(chunk)
    except UserError:
        result.close()
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        result.close()
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(f"{field} is {shorten(url)}; it cannot be fetched: {reason}") from error
    return result
