"""The directory in which a conversion is made, `DST.partial`, and its one moment of completion.

    DST.partial/conversion.json   what is converted, and which tensors are safely on the disk
    DST.partial/result/           becomes DST by one rename when everything is there

A process that is stopped leaves `DST.partial`; the same command continues from it. `DST` itself is whole or absent.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from keye_jax.errors import UserError

JOURNAL = "conversion.json"
_LOCK = "lock"


def is_unfinished(path: Path) -> bool:
    """Whether `path` is a conversion's working directory, or lies directly in one."""
    return any((directory / JOURNAL).is_file() for directory in (path, path.absolute().parent))


def is_empty(path: Path) -> bool:
    """Whether `path` is absent, or a directory without files."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


class Staging:
    """The working directory of one conversion, held by this process alone.

    Args:
      destination: the directory to be made, absolute.
      fingerprint: tells one source and one set of options from another.
      overwrite: whether to begin again where `DST.partial` belongs to another source.

    Raises:
      UserError: another process works in it, or it belongs to another source, or it is no working directory.

    Attributes:
      result: the directory to write into.
      done: the names of the tensors that are on the disk.
      saved_groups: what the writer said about its state when the last of them was.
    """

    def __init__(self, destination: Path, fingerprint: str, *, overwrite: bool) -> None:
        self.path = staging_directory(destination)
        self.result = self.path / "result"
        self.done: set[str] = set()
        self.saved_groups: list[str] = []
        self._destination = destination
        self._fingerprint = fingerprint
        state = self._read_journal()
        if state is not None and state.get("fingerprint") != fingerprint and not overwrite:
            raise UserError(
                f"{self.path} is an unfinished conversion of another source, or with other options; "
                "repeat that command to finish it, or begin again with --overwrite"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        if state is not None and state.get("fingerprint") == fingerprint and self.result.is_dir():
            self.done, self.saved_groups = set(state["done"]), list(state["kept"])
        else:
            self.restart()

    def restart(self) -> None:
        """Throws away what has been written, if anything."""
        self.done, self.saved_groups = set(), []
        self._write_journal()
        for name in ("result", "replaced"):
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)
        self.result.mkdir()

    def record(self, names: Iterable[str], saved_groups: list[str]) -> None:
        """Notes that the tensors `names` are on the disk, in the state `saved_groups` of the writer."""
        self.done |= set(names)
        self.saved_groups = saved_groups
        self._write_journal()

    def commit(self) -> None:
        """Makes the result the destination, in place of what is there, and removes the working directory."""
        for file in self.result.iterdir():
            _sync(file)
        _sync(self.result)
        if not is_empty(self._destination):
            self._destination.rename(self.path / "replaced")
        self.result.rename(self._destination)
        _sync(self._destination.parent)
        self.discard()

    def discard(self) -> None:
        """Removes the working directory."""
        shutil.rmtree(self.path)
        self.close()

    def close(self) -> None:
        """Lets other processes work here."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self) -> None:
        self._descriptor: int | None = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise UserError(f"{self.path}: another process is working on this conversion") from error

    def _read_journal(self) -> dict[str, Any] | None:
        """What an earlier process noted; None where there was none. Never throws away what is not ours."""
        if not self.path.is_dir():
            if self.path.exists():
                raise UserError(f"{self.path} is in the way: a directory of this name is needed for the conversion")
            return None
        try:
            state = json.loads((self.path / JOURNAL).read_text(encoding="utf-8"))
            if isinstance(state["done"], list) and isinstance(state["kept"], list):
                return state
        except FileNotFoundError:
            # A process that stopped at once leaves no more than these.
            if {entry.name for entry in self.path.iterdir()} <= {_LOCK, f"{JOURNAL}.new"}:
                return None
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{self.path} is in the way: it was not made by this command; move it or remove it")

    def _write_journal(self) -> None:
        state = {"fingerprint": self._fingerprint, "done": sorted(self.done), "kept": self.saved_groups}
        new = self.path / f"{JOURNAL}.new"
        with new.open("w", encoding="utf-8") as stream:
            json.dump(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        new.rename(self.path / JOURNAL)


def staging_directory(destination: Path) -> Path:
    """Where a conversion to `destination` is made."""
    return destination.with_name(f"{destination.name}.partial")


def remove_leftover(destination: Path) -> None:
    """Removes what a process that was stopped in its very last step left beside a finished `destination`."""
    path = staging_directory(destination)
    if (path / JOURNAL).is_file() and not (path / "result").exists():
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
