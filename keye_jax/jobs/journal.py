"""The output of a job, to which each result is added exactly once, whenever the job is killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keye_jax import file_lock
from keye_jax.errors import UserError
from keye_jax.jobs.lines import encode, result_key

_SMALL_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


class JobStoppedError(Exception):
    """A job that cannot go on for now. Its results are safe, and the same command resumes it."""


class Journal:
    """The output file of a job, open and locked.

    The file `<output>.journal.json` says what the output belongs to.

    Args:
      path: of the output.
      key: what the results depend on: "input" and "checkpoint" (hashes) and "options" (values by name).

    Attributes:
      finished: `result_key` of each result that was there.
      succeeded: how many of these have an answer.
      failures: how many of the others have each error code.

    Raises:
      UserError: another job writes the output, it belongs to another input, checkpoint or options, or it is damaged.
      JobStoppedError: a file cannot be written.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]):
        self._path = path
        self.finished: set[bytes] = set()
        self.succeeded, self.failures = 0, Counter[str]()
        self._holder: Path | None = None
        with self._written():
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            with self._written():
                self._lock()
                self._size = os.fstat(self._file).st_size
                self._check_key(json.loads(json.dumps(key)))
                self._recover()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._holder is not None:
            self._holder.unlink(missing_ok=True)
        os.close(self._file)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds results. When it returns, they are on the disk.

        Raises:
          JobStoppedError: they cannot be written. Then none of them is in the file.
        """
        data = memoryview(b"".join(map(encode, records)))
        with self._written():
            try:
                rest = data
                while rest:
                    rest = rest[os.write(self._file, rest) :]
                os.fsync(self._file)
            except OSError:
                # Should this fail too, the next start cuts off a part of a line, and keeps whole ones.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
                raise
        self._size += len(data)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise JobStoppedError(f"{self._path} cannot be written ({reason}); the same command resumes it") from error

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise UserError(f"--output is {str(self._path)!r}; it must be a regular file")
        try:
            self._holder = file_lock.lock(self._file, self._path)
        except BlockingIOError as error:
            who = f" ({error.strerror} {error.filename})" if error.filename else ""
            raise UserError(f"--output is {str(self._path)!r}; another job is writing it{who}") from error

    def _check_key(self, key: Mapping[str, Any]) -> None:
        """Compares the key with that of an output that has results; else writes it down."""
        sidecar = self._path.with_name(f"{self._path.name}.journal.json")
        if not self._size:
            write_whole(sidecar, [json.dumps(key, indent=2).encode()])
            return
        try:
            before = json.loads(sidecar.read_bytes())
            differences = list(_differences(before, key))
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"--output is {str(self._path)!r}, which has content, but {sidecar.name} does not say from which job; "
                "give another --output"
            ) from error
        if differences:
            raise UserError(
                f"--output is {str(self._path)!r}, which was begun with {', '.join(differences)}; give the same, or "
                "another --output"
            )

    def _recover(self) -> None:
        """Reads the results that are there, and cuts off what was being written when the job was killed."""
        end, number, damaged = 0, 0, 0
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            position = 0
            for number, line in enumerate(file, 1):
                position += len(line)
                if not line.endswith(b"\n") or not self._read(line):
                    damaged = damaged or number
                elif damaged:
                    raise UserError(
                        f"--output is {str(self._path)!r}, whose line {damaged} is no result; remove that line, or "
                        "give another --output"
                    )
                else:
                    end = position
        if end < self._size:
            os.ftruncate(self._file, end)
            os.fsync(self._file)
            self._size = end

    def _read(self, line: bytes) -> bool:
        """Notes a result; False if the line is none."""
        try:
            record = json.loads(line)
            error = record["error"]
            key = result_key(record["custom_id"], None if error is None else error.get("line"))
            code = None if error is None else str(error["code"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
        self.finished.add(key)
        if code is None:
            self.succeeded += 1
        else:
            self.failures[code] += 1
        return True


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in ("input", "checkpoint"):
        if before[name] != now[name]:
            yield f"another {name} (SHA-256 {before[name][:8]}..., now {now[name][:8]}...)"
    for name in sorted(before["options"].keys() | now["options"].keys()):
        old, new = (json.dumps(values["options"].get(name)) for values in (before, now))
        if old != new:
            yield f"{name} {old} (now {new})"


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file that is there whole or not at all, also after the machine fails. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def checkpoint_hash(directory: Path) -> str:
    """A SHA-256 that tells checkpoints apart, wherever they lie, in seconds.

    It is that of the names and sizes of all files, of the content of small files, and of samples of large ones. Files
    whose name, or whose folder's name, begins with a dot are left out: tools that download keep their notes there.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name, size = path.relative_to(directory), path.stat().st_size
        if any(part.startswith(".") for part in name.parts):
            continue
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogatepass"))
        with path.open("rb") as file:
            if size <= _SMALL_BYTES:
                digest.update(file.read())
                continue
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
