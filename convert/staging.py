"""The staging directory of a conversion, `DST.partial`.

    DST.partial/conversion.json   the journal: the source, and the tensors that are on the disk
    DST.partial/groups/           what a sink makes the result of
    DST.partial/result/           becomes DST by one rename when it is complete

A process that is stopped leaves `DST.partial`, and the same command continues from it. `DST` is complete or absent.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convert import journal
from convert.journal import SavedGroup, Written
from convert.manifest import Hasher
from keye_jax import file_lock
from keye_jax.errors import UserError
from keye_jax.progress import PhaseProgress

JOURNAL = "conversion.json"
_LOCK = "lock"


def is_unfinished(path: Path) -> bool:
    """Whether `path` is the staging directory of a conversion, or lies directly in one."""
    return any((directory / JOURNAL).is_file() for directory in (path, path.absolute().parent))


def is_empty(path: Path) -> bool:
    """Whether `path` is absent or an empty directory."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


class Staging:
    """The staging directory of one conversion, locked by this process.

    Args:
      destination: the directory that the conversion makes, absolute.
      fingerprint: identifies the source and the options of the conversion.
      overwrite: whether to start again if the staging directory belongs to another source or other options.

    Raises:
      UserError: another process uses the directory, it belongs to another source, or it is no staging directory.

    Attributes:
      path: the staging directory.
      result: the directory to write the new checkpoint into.
      work: the directory for what the result is made of.
      groups: the groups that are on the disk.
      done: names of their tensors.
    """

    def __init__(self, destination: Path, fingerprint: str, *, overwrite: bool) -> None:
        self.path = staging_directory(destination)
        self.result = self.path / "result"
        self.work = self.path / "groups"
        self.groups: list[SavedGroup] = []
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
            self.groups = journal.from_json(state["groups"])
        else:
            self._write_journal()
            for path in (self.result, self.work, self.path / "replaced"):
                if path.exists():
                    shutil.rmtree(path)
        self.result.mkdir(exist_ok=True)
        self.work.mkdir(exist_ok=True)
        self.done = {name for group in self.groups for name in group.tensors}

    def forget_damaged(self, hasher: Hasher, report: PhaseProgress) -> None:
        """Forgets groups whose bytes are not those that were written, so that they are written again.

        Reads what an earlier process wrote, once.

        Args:
          hasher: computes the digests.
          report: called with "verify", the bytes read and the bytes to read.
        """
        found = [[hasher.part(self.path / e.file, e.offset, e.length) for e in group.extents] for group in self.groups]
        total, done = sum(extent.length for group in self.groups for extent in group.extents), 0
        kept: list[SavedGroup] = []
        for group, digests in zip(self.groups, found, strict=True):
            same = [digest.exception() is None and digest.result() for digest in digests]
            if same == [extent.sha256 for extent in group.extents]:
                kept.append(group)
            done += sum(extent.length for extent in group.extents)
            report("verify", done, total)
        if kept != self.groups:
            self.groups = kept
            self.done = {name for group in kept for name in group.tensors}
            self._write_journal()

    def record(self, names: Iterable[str], written: Iterable[Written]) -> None:
        """Writes to the journal that the tensors `names` are on the disk, when the digests of their bytes are known."""
        group = SavedGroup(tuple(names), tuple(each.extent() for each in written))
        self.groups.append(group)
        self.done |= set(group.tensors)
        self._write_journal()

    def commit(self) -> None:
        """Moves the result to the destination, replaces what is there, and removes the staging directory."""
        for file in self.result.iterdir():
            _sync(file)
        _sync(self.result)
        if not is_empty(self._destination):
            self._destination.rename(self.path / "replaced")
        self.result.rename(self._destination)
        _sync(self._destination.parent)
        self.discard()

    def discard(self) -> None:
        """Removes the staging directory."""
        shutil.rmtree(self.path)
        self.close()

    def close(self) -> None:
        """Unlocks the staging directory."""
        if self._holder is not None:
            self._holder.unlink(missing_ok=True)
            self._holder = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self) -> None:
        self._descriptor: int | None = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._holder: Path | None = None
        try:
            self._holder = file_lock.lock(self._descriptor, self.path / _LOCK)
        except BlockingIOError as error:
            self.close()
            who = f" ({error.strerror} {error.filename})" if error.filename else ""
            raise UserError(f"{self.path}: another process is working on this conversion{who}") from error

    def _read_journal(self) -> dict[str, Any] | None:
        """The journal of an earlier process; None if there was none. UserError if `path` is not a staging directory."""
        if not self.path.is_dir():
            if self.path.exists():
                raise UserError(
                    f"{self.path} is in the way: the conversion needs a directory of this name; move it or remove it"
                )
            return None
        try:
            state = journal.decode((self.path / JOURNAL).read_bytes(), JOURNAL)
            if state is not None and "groups" in state:
                return state
        except FileNotFoundError:
            # A process that was stopped at the start leaves only these.
            if {entry.name for entry in self.path.iterdir()} <= {_LOCK, f"{_LOCK}.holder", f"{JOURNAL}.new"}:
                return None
        raise UserError(
            f"{self.path} is in the way: this command did not make it, or its {JOURNAL} is damaged; "
            "move it or remove it"
        )

    def _write_journal(self) -> None:
        new = self.path / f"{JOURNAL}.new"
        with new.open("wb") as stream:
            stream.write(journal.encode({"fingerprint": self._fingerprint, "groups": journal.to_json(self.groups)}))
            stream.flush()
            os.fsync(stream.fileno())
        new.rename(self.path / JOURNAL)


def staging_directory(destination: Path) -> Path:
    """The staging directory of a conversion to `destination`."""
    return destination.with_name(f"{destination.name}.partial")


def remove_leftover(destination: Path) -> None:
    """Removes the staging directory beside a finished `destination` if a process was stopped while it removed it."""
    path = staging_directory(destination)
    if (path / JOURNAL).is_file() and not (path / "result").exists():
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
