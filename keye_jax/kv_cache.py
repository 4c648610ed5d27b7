"""The KV cache: a pool of pages on the devices, and which sequences of a step hold which pages.

Pages belong to no sequence. A step is told by `BatchMetadata` which pages its sequences hold, so sequences join, leave
and share pages without copying any. Which pages are free, `keye_jax.page_allocator` knows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.config import KeyeConfig
from keye_jax.page_allocator import PAGE_SIZE
from keye_jax.sharding.collectives import Axes
from keye_jax.sharding.mesh_rules import MeshRules
from keye_jax.sharding.step import StepSharding, spec
from pallas_kernels.indexer_scores import quantize
from pallas_kernels.paging import scaled
from pallas_kernels.portable import on_tpus

_ROW = 128
"""Elements of a row of index keys."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """What one decoder layer keeps of each token: in pages `[pages, PAGE_SIZE, ...]`, or of new tokens `[b, t, ...]`.

    Attributes:
      kv: `[..., 2 * kv_heads, head_dim]`; a token's row holds its keys, then its values, of all heads. Where heads are
        split over devices, each device's part of a row is like that: its keys, then its values.
      index_keys: `[..., indexer_head_dim]`. In the pages of a pool several positions share a row of 128 elements:
        `[pages, PAGE_SIZE * indexer_head_dim / 128, 128]`, the same bytes. A TPU pads rows to 128, or else puts pages
        where a page's keys are not together. `index_pages` has them as `[pages, PAGE_SIZE, indexer_head_dim]`.
      index_scales: float32 `[...]`, a factor on each index key; None unless they are float8.
      kv_scales: float32 `[..., 2 * kv_heads]`, a factor on each head's key and value, in the order of `kv`; None unless
        they are float8.
    """

    kv: jax.Array
    index_keys: jax.Array
    index_scales: jax.Array | None = None
    kv_scales: jax.Array | None = None

    @property
    def count(self) -> int:
        """How many pages there are."""
        return self.kv.shape[0]

    @property
    def index_pages(self) -> jax.Array:
        """The index keys of pages, `[pages, PAGE_SIZE, indexer_head_dim]`."""
        return self.index_keys.reshape(self.count, PAGE_SIZE, -1)

    def in_cache_dtype(self, cache_dtype: str | None) -> Pages:
        """Rows of new tokens as a cache keeps them: keys and values in "float8_e4m3fn" with scales, or as they are.

        The scales are powers of two, as those of `pallas_kernels.quantize`: what a head's key or value becomes follows
        from it alone, and becomes itself again.
        """
        if cache_dtype is None:
            return self
        kv, scales = quantize(self.kv)
        return dataclasses.replace(self, kv=kv, kv_scales=scales)

    def write(self, slots: jax.Array, rows: Pages) -> Pages:
        """Pages with the rows of new tokens in them.

        Args:
          slots: int32 `[b, t]`, `page * PAGE_SIZE + offset`; a slot that is not in these pages is dropped.
          rows: `[b, t, ...]`.
        """

        def scatter(stored: jax.Array, new: jax.Array) -> jax.Array:
            new = new.astype(stored.dtype)
            if stored.shape[2:] == new.shape[2:]:
                return _write_rows(stored, slots, new)
            return on_tpus(_write_parts_of_rows, _write_rows, stored, slots, new)

        return jax.tree.map(scatter, self, rows)

    def specs(self, leading: tuple[Axes, ...], step: StepSharding) -> Any:
        """Partitions in place of the arrays, whose first dimensions are split over `leading`."""
        others = jax.tree.map(lambda _: spec(*leading), self)
        kv: Any = spec(*(leading[i] if i < len(leading) else () for i in range(2)), step.kv_heads)
        return dataclasses.replace(others, kv=kv, kv_scales=None if self.kv_scales is None else kv)


def _write_rows(stored: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
    """Pages `[p, ...]` with `new [b, t, ...]` at `slots [b, t]` of them."""
    flat = stored.reshape(-1, *new.shape[2:])
    return flat.at[slots].set(new, mode="drop").reshape(stored.shape)


def _write_parts_of_rows(stored: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
    """`_write_rows` where several positions share a row of `stored`, without another view of the pages.

    On a TPU any other view is a copy of all pages. Positions that share a row are written one after the other.
    """
    rows = stored.reshape(-1, stored.shape[-1])
    dim = new.shape[-1]
    per_row = rows.shape[1] // dim
    wide = jnp.tile(new, per_row)
    for part in range(per_row):
        own = jnp.arange(rows.shape[1]) // dim == part
        place = jnp.where(slots % per_row == part, slots // per_row, len(rows))
        old = rows.at[place].get(mode="fill", fill_value=0)
        rows = rows.at[place].set(jnp.where(own, wide, old), mode="drop")
    return rows.reshape(stored.shape)


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
        cls,
        config: KeyeConfig,
        pages: int,
        dtype: jnp.dtype | None = None,
        *,
        indexer_dtype: str | None = None,
        cache_dtype: str | None = None,
    ) -> PagePool:
        """A pool of zeros.

        Args:
          pages: how many, on all devices together.
          dtype: of keys, values and index keys; the config's if left out.
          indexer_dtype: of index keys, "float8_e4m3fn"; None for `dtype`.
          cache_dtype: of keys and values, "float8_e4m3fn"; None for `dtype`.
        """
        dtype, rows = dtype or config.jax_dtype, 2 * config.num_key_value_heads
        index_dim = config.sa_config.indexer_head_dim
        # Positions whose index keys share a row.
        shared = _ROW // index_dim if _ROW % index_dim == 0 and PAGE_SIZE * index_dim % _ROW == 0 else 1
        layers = tuple(
            Pages(
                kv=jnp.zeros((pages, PAGE_SIZE, rows, config.head_dim), cache_dtype or dtype),
                index_keys=jnp.zeros((pages, PAGE_SIZE // shared, shared * index_dim), indexer_dtype or dtype),
                index_scales=jnp.zeros((pages, PAGE_SIZE), jnp.float32) if indexer_dtype else None,
                kv_scales=jnp.zeros((pages, PAGE_SIZE, rows), jnp.float32) if cache_dtype else None,
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
            return dataclasses.replace(others, kv=kv, kv_scales=None if layer.kv_scales is None else kv)

        return PagePool(tuple(of(layer) for layer in self.layers))

    def keys(self, layer: int, page_table: np.ndarray, rules: MeshRules) -> jax.Array:
        """The keys of a sequence in a layer, `[m * PAGE_SIZE, kv_heads, head_dim]`.

        Args:
          page_table: int32 `[m]`.
        """
        pages = self.layers[layer]
        scales = None if pages.kv_scales is None else pages.kv_scales[page_table]
        rows = scaled(pages.kv[page_table], scales, jnp.dtype(jnp.float32))
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


def bytes_per_token(config: KeyeConfig, dtype: jnp.dtype | None = None, **dtypes: str | None) -> int:
    """Bytes that one cached token takes in all layers; arguments as for `PagePool.create`."""
    one = jax.eval_shape(lambda: PagePool.create(config, 1, dtype, **dtypes))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one)) // PAGE_SIZE
