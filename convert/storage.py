"""What file systems refuse, in sentences, and the checks of a destination that can be made before the work."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from keye_jax.errors import UserError

# What a machine can answer although the program and its arguments are right.
_CODES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV),
    *(errno.EACCES, errno.EPERM, errno.EBUSY, errno.EXDEV, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOLCK),
    *(errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.EOPNOTSUPP, errno.ENOTCONN, errno.EHOSTDOWN),
)
# "No space left on device" is said of blocks and of inodes alike.
_WORDS = {errno.ENOSPC: "no space left on the disk, or no free inodes", errno.EDQUOT: "the disk quota is used up"}


class BucketError(OSError):
    """A bucket cannot be read or written. The message names the object and says what the server said.

    Its number is that of a failing disk, so who catches errors of the machine catches this one.
    """

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)

    def __str__(self) -> str:
        return str(self.strerror)


def reason(error: BaseException) -> str | None:
    """What the file system said, with the file if that is known; None if `error` is not about a file system.

    Libraries put the system's words into exceptions of their own, so causes and texts are looked through.
    """
    for each in _chain(error):
        if isinstance(each, BucketError):
            return str(each)
        if isinstance(each, OSError) and each.errno is not None:
            words = _WORDS.get(each.errno) or each.strerror or os.strerror(each.errno)
            return words if each.filename is None else f"{words}: {os.fsdecode(each.filename)}"
    text = "\n".join(str(each) for each in _chain(error))
    for code in _CODES:
        if f"{os.strerror(code)}" in text:
            found = re.search(r'"((?:file://)?/[^"]+)"', text)
            words = _WORDS.get(code) or os.strerror(code)
            return words if found is None else f"{words}: {found[1].removeprefix('file://')}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, what it holds, and its causes."""
    pending, seen = [error], set()
    while pending:
        each = pending.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if isinstance(each, BaseExceptionGroup):
            pending += each.exceptions
        pending += [cause for cause in (each.__cause__, each.__context__) if cause is not None]


def read_bytes(path: Path) -> bytes:
    """The content of a small file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def resolve(option: str, path: str | Path) -> Path:
    """`path`, absolute, with `~` and links resolved. It may not exist.

    Raises:
      UserError: the system cannot look it up: a loop of links, too long a name, a bad disk.
    """
    found = Path(path)
    try:
        found = Path(os.path.realpath(found.expanduser()))
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        return found
    except (OSError, RuntimeError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{option} {path} cannot be used: {said}") from error
    return found


def existing_parent(path: Path) -> Path:
    """The nearest directory above `path` that exists.

    Raises:
      UserError: something else than a directory is in the way.
    """
    for parent in path.parents:
        if parent.is_dir():
            return parent
        if os.path.lexists(parent):
            raise UserError(f"{path} cannot be made: {parent} is not a directory")
    raise UserError(f"{path} cannot be made: no directory above it exists")


def check_writable(option: str, path: Path) -> None:
    """Checks that a directory can be made at `path`, by making one beside it for a moment.

    Raises:
      UserError: the file system is read-only or full, permission is missing, or the name is too long.
    """
    parent = existing_parent(path)
    try:
        for name in path.relative_to(parent).parts:
            if len(os.fsencode(name)) > os.pathconf(parent, "PC_NAME_MAX"):
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        Path(tempfile.mkdtemp(prefix=".keye-jax-", dir=parent)).rmdir()
    except OSError as error:
        words = _WORDS.get(error.errno or 0) or error.strerror or error
        raise UserError(f"{option} {path} cannot be made in {parent}: {words}") from error


def check_space(option: str, path: Path, needed: int, *, reclaimed: int = 0) -> None:
    """Checks the free space where `path` is to be.

    Args:
      option: what the user calls it.
      needed: bytes.
      reclaimed: bytes that are there already or will be free.

    Raises:
      UserError: there is too little.
    """
    free = shutil.disk_usage(path if path.is_dir() else existing_parent(path)).free + reclaimed
    if free < needed:
        raise UserError(f"{option} {path} needs {needed:,} bytes and its filesystem has {free:,} bytes free")
