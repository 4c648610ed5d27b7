"""The KV cache: a pool of pages on the devices, which sequences hold which pages, and which pages are free.

Pages belong to no sequence. A step is told by `BatchMetadata` which pages its sequences hold, so sequences join, leave
and share pages without copying any. Over several devices each shard of the pool has its own free list, and the rules
alone say on which shard a page of a sequence must lie (`PageAllocator`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.config import KeyeConfig
from keye_jax.sharding.collectives import Axes
from keye_jax.sharding.mesh_rules import MeshRules
from keye_jax.sharding.step import StepSharding, spec

PAGE_SIZE = 64
"""Positions a page holds."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """What one decoder layer keeps of each token: in pages `[pages, PAGE_SIZE, ...]`, or of new tokens `[b, t, ...]`.

    Attributes:
      kv: `[..., 2 * kv_heads, head_dim]`; a token's row holds its keys, then its values, of all heads. Where heads are
        split over devices, each device's part of a row is like that: its keys, then its values.
      index_keys: `[..., indexer_head_dim]`.
      index_scales: float32 `[...]`, a factor on each index key; None unless they are float8.
    """

    kv: jax.Array
    index_keys: jax.Array
    index_scales: jax.Array | None = None

    @property
    def count(self) -> int:
        """How many pages there are."""
        return self.kv.shape[0]

    def write(self, slots: jax.Array, rows: Pages) -> Pages:
        """Pages with the rows of new tokens in them.

        Args:
          slots: int32 `[b, t]`, `page * PAGE_SIZE + offset`; a slot that is not in these pages is dropped.
          rows: `[b, t, ...]`.
        """

        def scatter(stored: jax.Array, new: jax.Array) -> jax.Array:
            flat = stored.reshape(self.count * PAGE_SIZE, *stored.shape[2:])
            return flat.at[slots].set(new.astype(stored.dtype), mode="drop").reshape(stored.shape)

        return jax.tree.map(scatter, self, rows)

    def specs(self, leading: tuple[Axes, ...], step: StepSharding) -> Any:
        """Partitions in place of the arrays, whose first dimensions are split over `leading`."""
        others = jax.tree.map(lambda _: spec(*leading), self)
        kv: Any = spec(*(leading[i] if i < len(leading) else () for i in range(2)), step.kv_heads)
        return dataclasses.replace(others, kv=kv)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagePool:
    """The pages of all layers; a page number means the same in each of them.

    Attributes:
      layers: `Pages` of each layer.
    """

    layers: tuple[Pages, ...]

    @property
    def page_count(self) -> int:
        """How many pages there are, on all devices together."""
        return self.layers[0].count

    @classmethod
    def create(
        cls, config: KeyeConfig, pages: int, dtype: jnp.dtype | None = None, *, indexer_dtype: str | None = None
    ) -> PagePool:
        """A pool of zeros.

        Args:
          pages: how many, on all devices together.
          dtype: of keys and values; the config's if left out.
          indexer_dtype: of index keys, "float8_e4m3fn"; None for `dtype`.
        """
        dtype = dtype or config.jax_dtype
        layers = tuple(
            Pages(
                kv=jnp.zeros((pages, PAGE_SIZE, 2 * config.num_key_value_heads, config.head_dim), dtype),
                index_keys=jnp.zeros((pages, PAGE_SIZE, config.sa_config.indexer_head_dim), indexer_dtype or dtype),
                index_scales=jnp.zeros((pages, PAGE_SIZE), jnp.float32) if indexer_dtype else None,
            )
            for _ in range(config.num_hidden_layers)
        )
        return cls(layers)

    def shardings(self, rules: MeshRules) -> Any:
        """Shardings in place of the arrays: they follow from the rules alone. None where there is no mesh."""
        pages = rules.axes("batch") + rules.cache_sequence

        def of(layer: Pages) -> Any:
            others = jax.tree.map(lambda _: rules.over(pages), layer)
            kv: Any = rules.over(pages, (), rules.axes("kv_heads"))
            return dataclasses.replace(others, kv=kv)

        return PagePool(tuple(of(layer) for layer in self.layers))

    def keys(self, layer: int, page_table: np.ndarray, rules: MeshRules) -> jax.Array:
        """The keys of a sequence in a layer, `[m * PAGE_SIZE, kv_heads, head_dim]`.

        Args:
          page_table: int32 `[m]`.
        """
        rows = self.layers[layer].kv[page_table]
        rows = rows.reshape(len(page_table) * PAGE_SIZE, rules.size("kv_heads"), 2, -1, rows.shape[-1])
        return rows[:, :, 0].reshape(rows.shape[0], -1, rows.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchMetadata:
    """What the rows of a step are: each is a run of new tokens of one sequence.

    Attributes:
      page_table: int32 `[s, m]`, the page that holds positions `j * PAGE_SIZE` and on of each of s sequences.
      start: int32 `[b]`, the position of each row's first token.
      count: int32 `[b]`, how many of the row's t tokens there are; 0 in a row that is idle.
      sequence: int32 `[b]`, the sequence that each row belongs to; None where row i belongs to sequence i.
    """

    page_table: jax.Array
    start: jax.Array
    count: jax.Array
    sequence: jax.Array | None = None

    def tables(self, page_table: jax.Array) -> jax.Array:
        """The rows of a page table `[s, m]` that belong to the step's rows, `[b, m]`."""
        return page_table if self.sequence is None else page_table[self.sequence]

    def valid(self, tokens: int) -> jax.Array:
        """Which of each row's tokens there are, bool `[b, tokens]`."""
        return jnp.arange(tokens) < self.count[:, None]

    def slots(self, page_table: jax.Array, pages: int, tokens: int) -> jax.Array:
        """Where the step's tokens belong, int32 `[b, tokens]`; out of bounds, so dropped, where that is not here.

        Args:
          page_table: int32 `[s, m]`; entries that are no page of 0 to `pages - 1` are not here.
          pages: how many there are here.
          tokens: of each row.
        """
        positions = self.start[:, None] + jnp.arange(tokens)
        capacity = page_table.shape[1] * PAGE_SIZE
        column = jnp.clip(positions, 0, capacity - 1) // PAGE_SIZE
        page = jnp.take_along_axis(self.tables(page_table), column, axis=1)
        here = self.valid(tokens) & (positions < capacity) & (page >= 0) & (page < pages)
        return jnp.where(here, page * PAGE_SIZE + positions % PAGE_SIZE, pages * PAGE_SIZE)


class OutOfPages(Exception):
    """A shard of the pool has fewer free pages than were asked for."""


class PageAllocator:
    """Which pages of a pool are free, on the host: one free list a shard, and how many sequences hold each page.

    Along the axes of `cache_sequence` page j of a sequence lies on shard j modulo their number; all of a sequence's
    pages share one place along the axes of `batch`, its home.
    """

    def __init__(self, page_count: int, rules: MeshRules):
        """Args: page_count: of the pool, a multiple of the number of its shards."""
        self.homes, self.turns = rules.size("batch"), rules.parts(rules.cache_sequence)
        self.page_count = page_count
        self._per_shard, rest = divmod(page_count, self.homes * self.turns)
        assert rest == 0, "a pool has the same number of pages on each shard"
        self._free = [
            list(reversed(range(shard * self._per_shard, (shard + 1) * self._per_shard)))
            for shard in range(self.homes * self.turns)
        ]
        self._holders: Counter[int] = Counter()

    def free_pages(self, home: int = 0) -> int:
        """Pages that are free on the fullest shard of this home."""
        return min(len(self._free[home * self.turns + turn]) for turn in range(self.turns))

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


def pages_for(tokens: int) -> int:
    """Pages that hold this number of tokens."""
    return -(-tokens // PAGE_SIZE)


def bytes_per_token(config: KeyeConfig, dtype: jnp.dtype | None = None, *, indexer_dtype: str | None = None) -> int:
    """Bytes that one cached token takes in all layers; arguments as for `PagePool.create`."""
    one = jax.eval_shape(lambda: PagePool.create(config, 1, dtype, indexer_dtype=indexer_dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one)) // PAGE_SIZE
