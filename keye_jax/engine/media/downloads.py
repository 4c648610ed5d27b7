"""The folder for downloads of a process, which does not stay behind for long if the process is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from keye_jax import file_lock

_PREFIX, _LOCK = "keye-jax-", "lock"


class DownloadFolder:
    """A new folder among the temporary ones of the system. Folders of processes that have ended are removed first.

    A folder belongs to whoever holds the lock of its file `lock`, which ends with a process.

    Attributes:
      path: of the folder that holds nothing but downloads.
    """

    def __init__(self) -> None:
        _remove_abandoned()
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self.path = self._folder / "files"
        self.path.mkdir()
        unlocked = self._folder / "unlocked"
        self._lock = os.open(unlocked, os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(OSError):  # a file system that fails
            file_lock.lock(self._lock, self._folder / _LOCK)
            unlocked.rename(self._folder / _LOCK)  # others look only at this name, so they never find it unlocked

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)


def _remove_abandoned() -> None:
    """Removes folders of this user whose process has ended."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is no such folder, or its process lives
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                file_lock.lock(lock, folder / _LOCK)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
