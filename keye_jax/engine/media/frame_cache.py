"""Decoded frames on disk, by the hash of their medium.

An entry is one file: the patches of all frames, a JSON object about them, and a tail that says where that begins. Every
frame has a check sum, so that it can be read by itself. Entries are written under a name of their own and renamed when
they are whole. Any number of processes may use one folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from keye_jax import file_lock
from keye_jax.errors import UserError, shorten

_ENTRY, _UNFINISHED = ".frames", ".part"
# Length and check sum of the JSON object, and what the file is.
_TAIL = struct.Struct("<QL8s")
_MAGIC = b"KEYEFRM1"


@dataclasses.dataclass(frozen=True)
class FrameCache:
    """A folder of decoded frames. Entries that were read least recently are removed beyond `max_bytes`.

    A fault of the folder or of the disk costs only time: what cannot be read is decoded, and what cannot be written is
    left out.

    Attributes:
      directory: the folder; it is made if it does not exist.
      max_bytes: limit on its size, in bytes. Entries that are being written count with the size of their frames.

    Raises:
      UserError: the folder cannot be made or written to.
    """

    directory: Path
    max_bytes: int

    def __post_init__(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.directory, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise UserError(
                f"frame_cache is {shorten(str(self.directory))}; it must be a folder that can be written to"
            )

    def read(self, media_hash: bytes, shape: Sequence[int]) -> CachedFrames | None:
        """The entry of a medium, for the caller to close; None if there is none, or it is damaged.

        Args:
          shape: (frames, patches, 3, p, p) of the medium.
        """
        path = self._path(media_hash)
        try:
            file = path.open("rb")
        except OSError:
            return None
        try:
            entry = CachedFrames(path, file, tuple(shape))
            os.utime(path)
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            file.close()
            _remove(path)
            return None
        return entry

    def write(self, media_hash: bytes, shape: Sequence[int]) -> FrameWriter | None:
        """A writer of the entry of a medium; None if there is no room for it."""
        size = int(np.prod(shape, dtype=np.int64))
        if size > self.max_bytes:
            return None
        with contextlib.suppress(OSError):
            writer = FrameWriter(self._path(media_hash), tuple(shape))
            self._make_room()
            return writer
        return None

    def _path(self, media_hash: bytes) -> Path:
        return self.directory / f"{media_hash.hex()}{_ENTRY}"

    def _make_room(self) -> None:
        """Removes what a process left unfinished, and then the oldest entries."""
        entries, total = [], 0
        for path in self.directory.iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.suffix == _UNFINISHED and _is_abandoned(path):
                    _remove(path)
                elif path.suffix in (_ENTRY, _UNFINISHED):
                    total += status.st_size
                    if path.suffix == _ENTRY:
                        entries.append((status.st_mtime_ns, status.st_size, path))
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                return
            _remove(path)
            total -= size


class CachedFrames:
    """An entry that is being read.

    Attributes:
      used: the index in the video of each frame.
      warnings: those of decoding.
    """

    def __init__(self, path: Path, file: BinaryIO, shape: tuple[int, ...]):
        """Raises OSError, ValueError, KeyError or TypeError if the entry is not whole."""
        self._path, self._file, self._shape = path, file, shape
        self._each = int(np.prod(shape[1:], dtype=np.int64))
        end = file.seek(-_TAIL.size, os.SEEK_END)
        length, check, magic = _TAIL.unpack(file.read(_TAIL.size))
        if magic != _MAGIC or end != shape[0] * self._each + length:
            raise ValueError("not a whole entry, or one of another shape")
        file.seek(end - length)
        text = file.read(length)
        if zlib.crc32(text) != check:
            raise ValueError("a damaged entry")
        about = json.loads(text)
        self.used: list[int] = about["used"]
        self.warnings: list[str] = about["warnings"]
        self._checks: list[int] = about["checks"]
        if about["shape"] != list(shape) or not len(self.used) == len(self._checks) == shape[0]:
            raise ValueError("an entry of another shape")

    def __enter__(self) -> CachedFrames:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def frame(self, index: int) -> np.ndarray | None:
        """The patches of a frame, uint8 [patches, 3, p, p]; None if they are damaged, and then the entry is removed."""
        content = b""
        with contextlib.suppress(OSError):
            self._file.seek(index * self._each)
            content = self._file.read(self._each)
        if len(content) == self._each and zlib.crc32(content) == self._checks[index]:
            return np.frombuffer(content, np.uint8).reshape(self._shape[1:])
        _remove(self._path)
        return None


class FrameWriter:
    """An entry that is being written. It appears only if `finish` is called, after all frames."""

    def __init__(self, path: Path, shape: tuple[int, ...]):
        """Raises OSError."""
        self._path, self._shape = path, shape
        descriptor, name = tempfile.mkstemp(_UNFINISHED, dir=path.parent)
        self._file: BinaryIO | None = os.fdopen(descriptor, "wb")
        self._unfinished = Path(name)
        self._holder: Path | None = None
        try:
            # Held until the process ends, so others see that it lives.
            self._holder = file_lock.lock(descriptor, self._unfinished)
            os.ftruncate(descriptor, int(np.prod(shape, dtype=np.int64)))  # it counts with its whole size at once
        except BaseException:
            self.close()
            raise
        self._used: list[int] = []
        self._checks: list[int] = []

    def __enter__(self) -> FrameWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, used: int, patches: np.ndarray) -> None:
        """Adds the next frame.

        Args:
          used: its index in the video.
          patches: uint8 [patches, 3, p, p].
        """
        if self._file is None:
            return
        content = np.ascontiguousarray(patches).data
        try:
            self._file.write(content)
        except OSError:
            self.close()
            return
        self._used.append(int(used))
        self._checks.append(zlib.crc32(content))

    def finish(self, warnings: Sequence[str]) -> None:
        """Makes the entry appear."""
        if self._file is None:
            return
        about: dict[str, Any] = {"shape": self._shape, "used": self._used, "checks": self._checks}
        text = json.dumps(about | {"warnings": list(warnings)}).encode()
        try:
            self._file.write(text + _TAIL.pack(len(text), zlib.crc32(text), _MAGIC))
            self._file.flush()
            self._unfinished.replace(self._path)
        except OSError:
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Ends writing, and removes an entry that is not finished."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # a full disk
                file.close()
            _remove(self._unfinished)
            if self._holder is not None:
                _remove(self._holder)


def _is_abandoned(path: Path) -> bool:
    """Whether no process writes an unfinished entry."""
    with path.open("rb") as file:
        try:
            holder = file_lock.lock(file.fileno(), path)
        except OSError:
            return False
        if holder is not None:
            _remove(holder)
        return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
