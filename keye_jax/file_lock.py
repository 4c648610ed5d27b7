"""Locks a file against other processes, also where the file system has no `flock`, as some NFS mounts."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from pathlib import Path

_NO_FLOCK = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


def lock(descriptor: int, path: Path) -> Path | None:
    """Locks the open file `path` until `descriptor` is closed, or the process ends.

    Without `flock`, the file `<path>.holder` is the lock. It names host and process. One whose process ended on this
    host is taken over; one of another host stays until somebody removes it.

    Returns:
      The file that the caller removes in order to unlock; None where closing does that.

    Raises:
      BlockingIOError: another process holds the lock.
      OSError: the file system fails.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return _hold(path.with_name(f"{path.name}.holder"))
    return None


# What this process has held, with its number: in a container that starts again, another has the same one.
_held: set[tuple[int, Path]] = set()


def _hold(holder: Path) -> Path:
    while True:
        try:
            descriptor = os.open(holder, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError as error:
            try:
                held = holder.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:  # it was unlocked just now
                continue
            host, _, process = held.strip().rpartition(" ")
            if host != socket.gethostname() or _lives(process, holder):
                who = " ".join(held.split())[:80] or "another process"
                raise BlockingIOError(errno.EAGAIN, f"{who} holds it; if it has ended, remove", holder) from error
            holder.unlink(missing_ok=True)
            continue
        try:
            os.write(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode())
        except OSError:  # a full disk
            holder.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        _held.add((os.getpid(), holder.absolute()))
        return holder


def _lives(process: str, holder: Path) -> bool:
    if not re.fullmatch("[1-9][0-9]{0,8}", process):
        return True
    if int(process) == os.getpid():
        return (os.getpid(), holder.absolute()) in _held
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
