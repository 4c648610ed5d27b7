"""The manifest of a converted checkpoint: length and SHA-256 of every file in it.

    {"format": "keye-jax", "version": 2, "files": {NAME: {"size": BYTES, "sha256": HEX}}, "sha256": HEX}

The last is the SHA-256 of "files" as JSON without spaces and with sorted keys, so that damage to the manifest is not
taken for damage to a file. Version 1 had only the lengths of the files in `params/`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from convert import storage
from keye_jax.errors import UserError
from keye_jax.parsing import parse_json
from keye_jax.progress import PhaseProgress

MANIFEST = "checkpoint.json"

_BLOCK = 1 << 22
# Hashing releases Python's lock, and a disk or a network likes several readers.
_THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file.

    Attributes:
      size: its length in bytes.
      sha256: its digest in hexadecimal; None in a manifest of version 1.
    """

    size: int
    sha256: str | None


class Blocks(Protocol):
    """Yields the content of a file of a checkpoint, in order."""

    def __call__(self, name: str) -> Iterator[bytes]: ...


class Manifest:
    """The manifest of a checkpoint.

    Attributes:
      files: what it says of each file, by path relative to the checkpoint's directory.
    """

    def __init__(self, files: Mapping[str, FileRecord]) -> None:
        self.files = dict(files)

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The manifest in `directory`; None if there is none.

        Raises:
          UserError: it is not a manifest, or is damaged.
        """
        path = directory / MANIFEST
        if not path.is_file():
            return None
        values = parse_json(storage.read_bytes(path), str(path))
        try:
            if not all(_is_below(name) for name in values["files"]):
                raise ValueError
            if values["version"] == 1:
                return cls({f"params/{name}": FileRecord(_count(size), None) for name, size in values["files"].items()})
            files = {
                name: FileRecord(_count(record["size"]), str(record["sha256"]))
                for name, record in values["files"].items()
            }
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a checkpoint's manifest: it must have 'files' by relative path") from error
        if values.get("sha256") != _digest_of(values["files"]):
            raise UserError(f"{path} is damaged: its content does not have the SHA-256 that is stored in it")
        return cls(files)

    @property
    def has_checksums(self) -> bool:
        return all(record.sha256 is not None for record in self.files.values())

    def wrong_sizes(self, sizes: Mapping[str, int]) -> list[str]:
        """One sentence for each file that is missing or not as long as it was.

        Args:
          sizes: of the weight files that are there, by name. Files outside the folders of these are not looked for.
        """
        problems = []
        for name, record in self.files.items():
            if not is_weights(name):
                continue
            if name not in sizes:
                problems.append(f"{name}: it is missing")
            elif sizes[name] != record.size:
                problems.append(_wrong_size(name, sizes[name], record.size))
        return problems

    def wrong_content(self, blocks: Blocks, report: PhaseProgress | None = None) -> list[str]:
        """Reads all files, and says in one sentence each which are missing, unreadable or not as they were written.

        Args:
          blocks: reads a file.
          report: called with "verify", the bytes read and the bytes of all files.
        """
        total = sum(record.size for record in self.files.values())
        done = 0
        problems: list[str] = []

        def check(name: str) -> str | None:
            digest, size = hashlib.sha256(), 0
            try:
                for block in blocks(name):
                    digest.update(block)
                    size += len(block)
            except FileNotFoundError:
                return f"{name}: it is missing"
            except (OSError, ValueError) as error:
                why = str(error).rpartition(": ")[2] if isinstance(error, storage.BucketError) else None
                return f"{name}: it cannot be read: {why or storage.reason(error) or error}"
            record = self.files[name]
            if size != record.size:
                return _wrong_size(name, size, record.size)
            if digest.hexdigest() != record.sha256:
                return f"{name}: its content is damaged: its SHA-256 is not the one in {MANIFEST}"
            return None

        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            jobs = {pool.submit(check, name): name for name in self.files}
            try:
                for job in concurrent.futures.as_completed(jobs):
                    done += self.files[jobs[job]].size
                    if report is not None:
                        report("verify", done, total)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        results = {name: job.result() for job, name in jobs.items()}
        problems += [problem for name in self.files if (problem := results[name]) is not None]
        return problems


def _wrong_size(name: str, size: int, expected: int) -> str:
    state = "truncated" if size < expected else "too long"
    return f"{name}: it is {state}: it has {size:,} bytes; it must have {expected:,}"


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint holds weights or what finds them."""
    return name.startswith("params/") or name.endswith((".safetensors", ".safetensors.index.json"))


def local_blocks(directory: Path) -> Blocks:
    """Reads files below `directory`."""

    def blocks(name: str) -> Iterator[bytes]:
        with (directory / name).open("rb") as stream:
            while block := stream.read(_BLOCK):
                yield block

    return blocks


class Hasher:
    """SHA-256 of files, computed by threads while their writer works on the next ones.

    A digest belongs to an inode, a length and a time of change, so it also holds after a rename, and for a hard link.
    """

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
        self._jobs: dict[tuple[int, int, int], concurrent.futures.Future[str]] = {}

    def begin(self, files: Iterable[Path]) -> None:
        """Begins to read files that are written completely."""
        for file in files:
            # A file may go again: then it is not asked for.
            with contextlib.suppress(FileNotFoundError):
                self._job(file)

    def part(self, file: Path, offset: int, length: int) -> concurrent.futures.Future[str]:
        """The digest of `length` bytes from `offset` on, which no one changes any more. Its errors are OSErrors."""
        try:
            if offset == 0 and file.stat().st_size == length:
                return self._job(file)
            return self._pool.submit(_hash, os.open(file, os.O_RDONLY | os.O_CLOEXEC), offset, length)
        except OSError as error:
            failed: concurrent.futures.Future[str] = concurrent.futures.Future()
            failed.set_exception(error)
            return failed

    def _job(self, file: Path) -> concurrent.futures.Future[str]:
        key = _identity(file)
        if key not in self._jobs:
            # The descriptor is the file that was meant, even if its name goes.
            self._jobs[key] = self._pool.submit(_hash, os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        return self._jobs[key]

    def digests(self, files: Iterable[Path]) -> list[str]:
        """The digests of files, in order.

        Raises:
          OSError: a file cannot be read.
        """
        files = list(files)
        self.begin(files)
        return [self._jobs[_identity(file)].result() for file in files]

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def write(directory: Path, hasher: Hasher) -> None:
    """Writes the manifest of all files below `directory`.

    Raises:
      OSError: a file cannot be read, or the manifest not be written.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    digests = hasher.digests(files)
    records = {
        file.relative_to(directory).as_posix(): FileRecord(file.stat().st_size, digest)
        for file, digest in zip(files, digests, strict=True)
    }
    (directory / MANIFEST).write_bytes(encode(records))


def encode(records: Mapping[str, FileRecord]) -> bytes:
    """The bytes of a manifest."""
    files = {name: dataclasses.asdict(record) for name, record in sorted(records.items())}
    values = {"format": "keye-jax", "version": 2, "files": files, "sha256": _digest_of(files)}
    return (json.dumps(values, indent=1) + "\n").encode()


def _digest_of(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _is_below(name: str) -> bool:
    """Whether a manifest may name a file so: it must not lead out of the checkpoint's directory."""
    return name.isprintable() and not name.startswith("/") and not {"", ".", ".."} & set(name.split("/"))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError
    return value


def _identity(file: Path) -> tuple[int, int, int]:
    state = file.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _hash(descriptor: int, offset: int = 0, length: int | None = None) -> str:
    with open(descriptor, "rb") as stream:
        if length is None:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        stream.seek(offset)
        while length and (block := stream.read(min(length, _BLOCK))):
            digest.update(block)
            length -= len(block)
        return digest.hexdigest()
