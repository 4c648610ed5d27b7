"""Pages of the pool on the host: who holds them, which are free, and which hold a prefix that may be reused.

A prefix is reused in blocks, runs of tokens of one size at absolute multiples of it. A block stays in the prefix index
after its last sequence has left, until its pages are needed. Then the block that has been unheld for the longest time
goes first.

This is host code without JAX, clock or threads: the same calls give the same pages on every host.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from keye_jax.page_allocator import PAGE_SIZE, OutOfPages, PageAllocator

type Program = Literal["large", "small"]
"""Which of the two programs reads a chunk. They may differ in bits."""

type BlockKey = tuple[bytes, Program]
"""Hash of all tokens up to the end of a block, and the program that wrote it."""


class Block(NamedTuple):
    """A block of a prompt in the prefix index.

    Attributes:
      key: what it holds.
      home: the shard along `batch` that its pages are on.
      pages: those of its tokens, in order.
    """

    key: BlockKey
    home: int
    pages: tuple[int, ...]


class PageManager:
    """Pages that sequences hold, pages that are free, and the prefix index.

    The index itself holds each of its pages once, beside the sequences that use it. A block is unheld when only the
    index holds it.
    """

    def __init__(self, pages_per_shard: int, *, homes: int = 1, turns: int = 1, block_tokens: int = 512):
        """Takes the pool as `PageAllocator` does.

        Args:
          pages_per_shard: of the pool.
          homes, turns: as in `PageAllocator`.
          block_tokens: size of a block, a multiple of `PAGE_SIZE`.
        """
        self.block_pages = block_tokens // PAGE_SIZE
        self._allocator = PageAllocator(pages_per_shard * homes * turns, homes=homes, turns=turns)
        self._blocks: dict[BlockKey, Block] = {}
        self._block_at: dict[int, Block] = {}  # by its first page
        # The longest unheld block comes first.
        self._unheld: list[OrderedDict[BlockKey, Block]] = [OrderedDict() for _ in range(homes)]
        self._unheld_pages = [[0] * turns for _ in range(homes)]
        self.version = 0
        """Changes when a block enters or leaves the index."""

    @property
    def page_count(self) -> int:
        """Pages of the pool."""
        return self._allocator.page_count

    @property
    def free_pages(self) -> int:
        """Pages without content that may be reused, and that nobody holds."""
        return sum(sum(self._allocator.free_by_turn(home)) for home in range(self._allocator.homes))

    @property
    def cached_pages(self) -> int:
        """Pages of unheld blocks. They are given away when there are no free ones."""
        return sum(map(sum, self._unheld_pages))

    def room(self, home: int) -> int:
        """Pages that a home could give: those of its fullest shard, in which free and unheld ones are counted."""
        return min(self._room(home))

    def match(self, keys: Sequence[BlockKey]) -> tuple[Block, ...]:
        """The longest run of a prompt's blocks, from its first one, that the index has on one home."""
        found: list[Block] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None or block.home != (found or [block])[0].home:
                break
            found.append(block)
        return tuple(found)

    def fits(self, pages: int, home: int, *, first: int = 0, prefix: Sequence[Block] = ()) -> bool:
        """Whether `allocate` would succeed."""
        room = self._room(home)
        for block in prefix:
            if block.key in self._unheld[home]:
                for page in block.pages:
                    room[self._allocator.turn(page)] -= 1
        return all(missing <= there for missing, there in zip(self._missing(pages, first, prefix), room, strict=True))

    def allocate(self, pages: int, home: int, *, first: int = 0, prefix: Sequence[Block] = ()) -> tuple[int, ...]:
        """Takes pages for a sequence.

        Args:
          pages: how many the sequence is to have.
          home: where they are, and those of `prefix`.
          first: how many it has already; 0 if there is a prefix.
          prefix: blocks of `match` that its first pages are shared with.

        Returns:
          the pages that it did not have, in order.

        Raises:
          OutOfPages: a shard has too few. None is taken then.
        """
        if not self.fits(pages, home, first=first, prefix=prefix):
            raise OutOfPages(f"{pages} pages were asked for on home {home}; it has room for {self.room(home)}")
        shared = [page for block in prefix for page in block.pages]
        self._allocator.share(shared)
        for block in prefix:
            if self._unheld[home].pop(block.key, None):
                self._count_unheld(block, -1)
        first += len(shared)
        missing = self._missing(pages, first)
        while any(count > free for count, free in zip(missing, self._allocator.free_by_turn(home), strict=True)):
            self._evict(home)
        return (*shared, *self._allocator.allocate(pages - first, home=home, first=first).tolist())

    def add(self, key: BlockKey, home: int, pages: tuple[int, ...]) -> None:
        """Puts a block into the index, unless it is there already.

        Args:
          pages: those of the block. A sequence holds them, and nothing else will be written into them.
        """
        if key not in self._blocks:
            block = Block(key, home, pages)
            self._blocks[key] = self._block_at[pages[0]] = block
            self._allocator.share(pages)
            self.version += 1

    def release(self, pages: Sequence[int]) -> None:
        """Takes all of a sequence's pages back. Those in the index stay there, unheld if no other sequence has them."""
        # From the end: a block is only found after those before it, so they must leave the index after it.
        for page in reversed(pages):
            self._allocator.release((page,))
            block = self._block_at.get(page)
            if block and self._allocator.holders(page) == 1:
                self._unheld[block.home][block.key] = block
                self._count_unheld(block, 1)

    def _room(self, home: int) -> list[int]:
        """As `room`, of each shard."""
        free = self._allocator.free_by_turn(home)
        return [count + unheld for count, unheld in zip(free, self._unheld_pages[home], strict=True)]

    def _missing(self, pages: int, first: int, prefix: Sequence[Block] = ()) -> list[int]:
        """Pages that a sequence of `pages` pages takes of each shard after the ones it has."""
        first, turns = first + len(prefix) * self.block_pages, self._allocator.turns
        # Of the first n pages of a sequence, (n - turn) / turns rounded up are on a shard.
        return [(first - turn) // -turns - (pages - turn) // -turns for turn in range(turns)]

    def _evict(self, home: int) -> None:
        _, block = self._unheld[home].popitem(last=False)
        self._count_unheld(block, -1)
        del self._blocks[block.key], self._block_at[block.pages[0]]
        self._allocator.release(block.pages)
        self.version += 1

    def _count_unheld(self, block: Block, sign: int) -> None:
        for page in block.pages:
            self._unheld_pages[block.home][self._allocator.turn(page)] += sign
