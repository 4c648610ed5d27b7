"""Small file systems of this process alone, for tests of full and read-only disks."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path

_MS_REC, _MS_PRIVATE, _MS_RDONLY, _MS_REMOUNT = 1 << 14, 1 << 18, 1, 1 << 5


@functools.cache
def allowed() -> bool:
    """Whether a process may have mounts of its own here."""
    program = "from tests.convert import mounts; mounts.separate()"
    command = [sys.executable, "-c", program]
    return sys.platform == "linux" and subprocess.run(command, capture_output=True, check=False).returncode == 0


def separate() -> None:
    """Gives this process mounts of its own. Raises OSError where that is not allowed."""
    os.unshare(os.CLONE_NEWNS)
    _mount("none", Path("/"), "", _MS_REC | _MS_PRIVATE, "")


def mount(directory: Path, options: str) -> None:
    """Mounts an empty tmpfs on `directory`, which is made. `options`: such as "size=1m,nr_inodes=100"."""
    directory.mkdir(parents=True, exist_ok=True)
    _mount("none", directory, "tmpfs", 0, options)


def remount(directory: Path, options: str, *, read_only: bool = False) -> None:
    """Changes the limits of a tmpfs."""
    _mount("none", directory, "tmpfs", _MS_REMOUNT | (_MS_RDONLY if read_only else 0), options)


def unmount(directory: Path) -> None:
    """Takes a tmpfs away."""
    _check(ctypes.CDLL(None, use_errno=True).umount(str(directory).encode()))


def _mount(source: str, target: Path, kind: str, flags: int, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [each.encode() for each in (source, str(target), kind)]
    _check(libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None))


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
