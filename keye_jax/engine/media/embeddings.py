"""Embeddings of images and videos that were encoded before."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Protocol


class _Array(Protocol):
    @property
    def nbytes(self) -> int: ...


class EmbeddingCache[ArrayT: _Array]:
    """Arrays by the hash of the medium that they were made from. Any thread may use it.

    Beyond `max_bytes`, those go first that were used least recently.

    Args:
      max_bytes: limit on the sizes of the arrays together, in bytes; 0 keeps none.

    Attributes:
      hits, misses: how often `get` found an array, and how often it did not.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._arrays: OrderedDict[bytes, ArrayT] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    @property
    def nbytes(self) -> int:
        """The size of all arrays that are kept."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, media_hash: bytes) -> bool:
        """Whether a medium's array is kept; does not count as a use."""
        return media_hash in self._arrays

    def get(self, media_hash: bytes) -> ArrayT | None:
        """The array of a medium, None if it is not kept."""
        with self._lock:
            found = self._arrays.get(media_hash)
            if found is None:
                self.misses += 1
            else:
                self.hits += 1
                self._arrays.move_to_end(media_hash)
            return found

    def put(self, media_hash: bytes, array: ArrayT) -> None:
        """Keeps an array, unless it is larger than the whole cache."""
        with self._lock:
            if (old := self._arrays.pop(media_hash, None)) is not None:
                self._bytes -= old.nbytes
            if array.nbytes > self._max_bytes:
                return
            self._arrays[media_hash] = array
            self._bytes += array.nbytes
            while self._bytes > self._max_bytes:
                _, oldest = self._arrays.popitem(last=False)
                self._bytes -= oldest.nbytes
