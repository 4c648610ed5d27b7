"""Downloads files over HTTP. A download that broke off continues where it ended."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import re
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from keye_jax.progress import PhaseProgress

_BLOCK = 1 << 20
_TIMEOUT_S = 60
_ATTEMPTS = 5


class Stopped(Exception):
    """The download was told to stop."""


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    Attributes:
      url: returns its URL; called before each attempt, since signed URLs expire.
      size: its length in bytes.
      sha256: digest of its content in hexadecimal; None if the server does not tell it.
    """

    url: Callable[[], str]
    size: int
    sha256: str | None


def part_of(target: Path) -> Path:
    """The file that holds the bytes of an unfinished `target`."""
    return target.with_name(f"{target.name}.part")


def fetch(
    remote: RemoteFile,
    target: Path,
    *,
    headers: Mapping[str, str],
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Downloads `remote` to `target`, and continues the partial file of an earlier attempt or process.

    Args:
      remote: the file.
      target: its path once its length, and its digest if that is known, are verified.
      headers: sent with each request.
      advance: called with the number of bytes that arrived; negative if bytes have to be downloaded again.
      stop: set by another thread to end the download; the partial file stays.

    Raises:
      OSError: five attempts in a row failed, or the server refused the request.
      ValueError: the content is not that of the file; the partial file is removed.
      Stopped: `stop` was set.
    """
    part = part_of(target)
    failures = 0
    while (already := part.stat().st_size if part.exists() else 0) < remote.size or not part.exists():
        try:
            _continue(remote, part, already, headers, advance, stop)
        except (OSError, http.client.HTTPException) as error:
            # 403: a signed URL expired. 429: too many requests. Any other refusal is final.
            if (status := _status(error)) is not None and 400 <= status < 500 and status not in (403, 429):
                raise
            failures = 1 if part.exists() and part.stat().st_size > already else failures + 1
            if failures == _ATTEMPTS:
                raise OSError(str(error) or type(error).__name__) from error
            if stop.wait(2 ** (failures - 1)):
                raise Stopped from error
    _verify(remote, part, advance)
    part.rename(target)


def _status(error: Exception) -> int | None:
    """The HTTP status in an exception of urllib or of a hub's library; None if there is none."""
    return getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)


def _continue(
    remote: RemoteFile,
    part: Path,
    already: int,
    headers: Mapping[str, str],
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Requests the missing bytes once; OSError if the connection ends before all have arrived."""
    wanted = {**headers, "Range": f"bytes={already}-"} if already else dict(headers)
    with urllib.request.urlopen(urllib.request.Request(remote.url(), headers=wanted), timeout=_TIMEOUT_S) as response:
        if already and not _continues_at(response, already):
            # The server ignored the range and sends the whole file.
            advance(-already)
            already = 0
        with part.open("r+b" if already else "wb") as stream:
            stream.seek(already)
            while block := response.read1(_BLOCK):
                if stop.is_set():
                    raise Stopped
                stream.write(block)
                already += len(block)
                advance(len(block))
    if already < remote.size:
        raise OSError(f"the connection ended after {already:,} of {remote.size:,} bytes")


def _continues_at(response: http.client.HTTPResponse, offset: int) -> bool:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return response.status == 206 and match is not None and int(match.group(1)) == offset


def _verify(remote: RemoteFile, part: Path, advance: Callable[[int], None]) -> None:
    size = part.stat().st_size
    wrong = size != remote.size
    if not wrong and remote.sha256 is not None:
        with part.open("rb") as stream:
            wrong = hashlib.file_digest(stream, "sha256").hexdigest() != remote.sha256
    if wrong:
        part.unlink()
        advance(-size)
        raise ValueError("the downloaded content is not the file that the server announced")


class Meter:
    """Adds up the bytes of several downloads, and reports them at most five times a second."""

    def __init__(self, report: PhaseProgress, done: int, total: int) -> None:
        self._report, self._done, self._total = report, done, total
        self._lock = threading.Lock()
        self._reported = 0.0
        report("download", done, total)

    def advance(self, nbytes: int) -> None:
        """Counts bytes that arrived."""
        with self._lock:
            self._done += nbytes
            if time.monotonic() - self._reported > 0.2 or self._done == self._total:
                self._reported = time.monotonic()
                self._report("download", self._done, self._total)


def same_host(first: str, second: str) -> bool:
    """Whether two URLs name the same server, so that a token for one may be sent to the other."""
    return urllib.parse.urlsplit(first)[:2] == urllib.parse.urlsplit(second)[:2]
