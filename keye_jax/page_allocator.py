"""Which pages of a pool are free. It runs on the host, without JAX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

PAGE_SIZE = 64
"""Positions a page holds."""


def pages_for(tokens: int) -> int:
    """Pages that hold this number of tokens."""
    return -(-tokens // PAGE_SIZE)


class OutOfPages(Exception):
    """A shard of the pool has fewer free pages than were asked for."""


class PageAllocator:
    """Which pages of a pool are free, on the host: one free list a shard, and how many sequences hold each page.

    Along the axes of `cache_sequence` page j of a sequence lies on shard j modulo their number; all of a sequence's
    pages share one place along the axes of `batch`, its home.
    """

    def __init__(self, page_count: int, *, homes: int = 1, turns: int = 1):
        """Takes what the pool's sharding says.

        Args:
          page_count: of the pool, a multiple of the number of its shards.
          homes: parts that the pool is split into along `batch`.
          turns: parts that each home's pages are split into along `cache_sequence`.
        """
        self.page_count, self.homes, self.turns = page_count, homes, turns
        self._per_shard, rest = divmod(page_count, homes * turns)
        assert rest == 0, "a pool has the same number of pages on each shard"
        self._free = [
            list(reversed(range(shard * self._per_shard, (shard + 1) * self._per_shard)))
            for shard in range(homes * turns)
        ]
        self._holders: Counter[int] = Counter()

    def free_by_turn(self, home: int = 0) -> list[int]:
        """Pages that are free on each shard of this home."""
        return [len(self._free[home * self.turns + turn]) for turn in range(self.turns)]

    def free_pages(self, home: int = 0) -> int:
        """Pages that are free on the fullest shard of this home."""
        return min(self.free_by_turn(home))

    def holders(self, page: int) -> int:
        """How many hold this page."""
        return self._holders[page]

    def turn(self, page: int) -> int:
        """Which of its home's shards a page lies on."""
        return page // self._per_shard % self.turns

    def allocate(self, pages: int, *, home: int = 0, first: int = 0) -> np.ndarray:
        """Takes pages for one sequence.

        Args:
          pages: how many.
          home: the shard along `batch` on which the sequence lies.
          first: how many pages the sequence has already.

        Returns:
          int32 `[pages]`, for a page table.

        Raises:
          OutOfPages: a shard has too few. None is taken then.
        """
        shards = [home * self.turns + (first + j) % self.turns for j in range(pages)]
        wanted = Counter(shards)
        if any(len(self._free[shard]) < count for shard, count in wanted.items()):
            raise OutOfPages(f"{pages} pages were asked for on home {home}; {self.free_pages(home)} are free")
        taken = [self._free[shard].pop() for shard in shards]
        self._holders.update(taken)
        return np.asarray(taken, np.int32)

    def share(self, pages: Iterable[int]) -> None:
        """Counts one more holder of each of these pages."""
        for page in pages:
            assert self._holders[int(page)] > 0, "only a page that is held can be shared"
            self._holders[int(page)] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Counts one holder less of each of these pages. A page that nobody holds is free."""
        for page in map(int, pages):
            assert self._holders[page] > 0, "a page is released once by each of its holders"
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free[page // self._per_shard].append(page)
