"""Memory that this process shares with its workers, of a fixed size."""

from __future__ import annotations

import dataclasses
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Hashable

import numpy as np

_PAGE = 4096


@dataclasses.dataclass(eq=False)
class _Want:
    """A wish for memory that waits."""

    owner: Hashable
    size: int
    offset: int | None = None


class Arena:
    """Shared memory that is taken and freed in blocks. The kernel frees it when the last process ends, however it ends.

    It has no name, so that nothing is left behind, and is not part of /dev/shm, which containers keep small.

    Args:
      size: bytes.
      share: bytes that one owner may hold. A larger block is given to an owner that holds none.

    Attributes:
      descriptor: of the file that a worker maps.
      size: bytes.
      used, peak: bytes that are taken now, and that were taken at most.
    """

    def __init__(self, size: int, share: int):
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("keye-jax")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        self.size = size // _PAGE * _PAGE
        os.ftruncate(self.descriptor, self.size)
        self._map = mmap.mmap(self.descriptor, self.size)
        self._share = share
        self._blocks: dict[int, tuple[int, Hashable]] = {}
        self._held: dict[Hashable, int] = {}
        self._waiting: list[_Want] = []
        self._changed = threading.Condition()
        self.used = self.peak = 0

    def take(self, owner: Hashable, size: int, stopped: Callable[[], bool]) -> int | None:
        """Waits for a block, and returns where it begins; None if `stopped` is or becomes true.

        Who asked first is given memory first, but for owners that hold their share. `wake` makes `stopped` be called.

        Args:
          owner: who holds the block.
          size: bytes, at most the arena's.
        """
        want = _Want(owner, -(-size // _PAGE) * _PAGE)
        with self._changed:
            if stopped():
                return None
            self._waiting.append(want)
            self._grant()
            while want.offset is None:
                if stopped():
                    self._waiting.remove(want)
                    self._grant()
                    return None
                self._changed.wait()
        return want.offset

    def free(self, offset: int) -> None:
        """Frees a block."""
        with self._changed:
            size, owner = self._blocks.pop(offset)
            self.used -= size
            self._held[owner] -= size
            if not self._held[owner]:
                del self._held[owner]
            self._grant()

    def wake(self) -> None:
        """Makes those that wait look whether they are to stop."""
        with self._changed:
            self._changed.notify_all()

    def view(self, offset: int, size: int) -> np.ndarray:
        """Bytes of a block, uint8 [size]."""
        return np.frombuffer(self._map, np.uint8, size, offset)

    def close(self) -> None:
        """Closes the descriptor. The memory stays while a view of it is in use."""
        os.close(self.descriptor)

    def _grant(self) -> None:
        for want in list(self._waiting):
            held = self._held.get(want.owner, 0)
            if held and held + want.size > self._share:
                continue
            if (offset := self._gap(want.size)) is None:
                break
            self._blocks[offset] = want.size, want.owner
            self._held[want.owner] = held + want.size
            self.used += want.size
            self.peak = max(self.peak, self.used)
            want.offset = offset
            self._waiting.remove(want)
        self._changed.notify_all()

    def _gap(self, size: int) -> int | None:
        """The lowest place that has `size` free bytes."""
        end = 0
        for offset in sorted(self._blocks):
            if offset - end >= size:
                return end
            end = offset + self._blocks[offset][0]
        return end if self.size - end >= size else None
