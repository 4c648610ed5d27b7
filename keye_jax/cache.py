"""The decoder's cache: keys, values and index keys in pages, an explicit pytree in and out of every step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.config import KeyeConfig
from keye_jax.model.parallel import Parallel, spec
from pallas_kernels import paging

PAGE_SIZE = 64
"""Positions a page holds."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one decoder layer keeps.

    Attributes:
      kv: `[pages, PAGE_SIZE, 2 * kv_heads, head_dim]`; a token's row holds its keys, then its values, of all heads.
        Where heads are split over devices, each device's part of a row is like that: its keys, then its values.
      index_keys: `[pages, PAGE_SIZE, indexer_head_dim]`.
      index_scales: float32 `[pages, PAGE_SIZE]`, a factor on each index key; None unless they are float8.
    """

    kv: jax.Array
    index_keys: jax.Array
    index_scales: jax.Array | None = None

    def append(
        self,
        page_table: jax.Array,
        start: jax.Array,
        count: jax.Array,
        kv: jax.Array,
        index_keys: jax.Array,
        index_scales: jax.Array | None = None,
        *,
        order: np.ndarray | None = None,
    ) -> LayerCache:
        """Writes the first `count` of t new tokens of each sequence at positions `start` and on.

        Tokens before position 0 or behind the last page are dropped: a part of a cache begins at a position of its own.

        Args:
          page_table: int32 `[b, m]`.
          start, count: int32 `[b]`.
          kv: `[b, t, 2 * kv_heads, head_dim]`, rows as they are kept.
          index_keys: `[b, t, indexer_head_dim]`.
          index_scales: float32 `[b, t]`, where the cache has them.
          order: int32 `[t]`, where each of the tokens stands among them; as they come if left out.
        """
        pages = self.kv.shape[0]
        offsets = jnp.arange(kv.shape[1]) if order is None else jnp.asarray(order)
        capacity = page_table.shape[1] * PAGE_SIZE
        positions = start[:, None] + offsets
        there = (offsets < count[:, None]) & (positions >= 0) & (positions < capacity)
        slots = paging.slots(page_table, jnp.clip(positions, 0, capacity - 1), PAGE_SIZE)
        slots = jnp.where(there, slots, pages * PAGE_SIZE)  # out of bounds: dropped

        def write(stored: jax.Array, new: jax.Array) -> jax.Array:
            rows = stored.reshape(pages * PAGE_SIZE, *stored.shape[2:])
            return rows.at[slots].set(new.astype(stored.dtype), mode="drop").reshape(stored.shape)

        scales = self.index_scales
        assert (scales is None) == (index_scales is None)
        return LayerCache(
            kv=write(self.kv, kv),
            index_keys=write(self.index_keys, index_keys),
            index_scales=None if scales is None or index_scales is None else write(scales, index_scales),
        )

    def specs(self, parallel: Parallel) -> Any:
        """Partitions in place of the arrays."""
        kv: Any = spec(parallel.pages, (), parallel.kv_heads)
        others = jax.tree.map(lambda _: spec(parallel.pages), self)
        return dataclasses.replace(others, kv=kv)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The cache of a batch of sequences.

    Attributes:
      layers: one `LayerCache` a layer.
      page_table: int32 `[b, m]`, which page holds positions `i * PAGE_SIZE` and on.
      lengths: int32 `[b]`, tokens each sequence holds.
    """

    layers: tuple[LayerCache, ...]
    page_table: jax.Array
    lengths: jax.Array

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have."""
        return self.page_table.shape[1] * PAGE_SIZE

    @classmethod
    def create(
        cls,
        config: KeyeConfig,
        batch: int,
        capacity: int,
        dtype: jnp.dtype | None = None,
        *,
        indexer_dtype: str | None = None,
        parallel: Parallel | None = None,
    ) -> Cache:
        """An empty cache for `batch` sequences of up to `capacity` tokens each.

        Args:
          dtype: of keys and values; the config's if left out.
          indexer_dtype: of index keys, "float8_e4m3fn", or None for `dtype`.
          parallel: how it will lie over devices: each one's pages are one piece of the arrays, and all have as many.
        """
        dtype = dtype or config.jax_dtype
        over_sequences, over_positions = (
            (parallel.size(parallel.batch), parallel.size(parallel.cache_sequence)) if parallel else (1, 1)
        )
        per_sequence = math.ceil(capacity / (PAGE_SIZE * over_positions)) * over_positions
        pages = batch * per_sequence
        layers = tuple(
            LayerCache(
                kv=jnp.zeros((pages, PAGE_SIZE, 2 * config.num_key_value_heads, config.head_dim), dtype),
                index_keys=jnp.zeros((pages, PAGE_SIZE, config.sa_config.indexer_head_dim), indexer_dtype or dtype),
                index_scales=jnp.zeros((pages, PAGE_SIZE), jnp.float32) if indexer_dtype else None,
            )
            for _ in range(config.num_hidden_layers)
        )
        page_table = jnp.arange(pages, dtype=jnp.int32).reshape(
            over_sequences, over_positions, batch // over_sequences, -1
        )
        page_table = page_table.swapaxes(1, 2).reshape(batch, per_sequence)
        return cls(layers, page_table, jnp.zeros(batch, jnp.int32))

    def shardings(self, parallel: Parallel) -> Any:
        """Shardings in place of the arrays."""
        copied: Any = parallel.sharding()
        layers = [
            jax.tree.map(lambda part: jax.NamedSharding(parallel.mesh, part), x.specs(parallel)) for x in self.layers
        ]
        return Cache(tuple(layers), copied, copied)

    def keys(self, layer: int, sequence: int, parallel: Parallel | None = None) -> jax.Array:
        """Keys of a sequence in a layer, `[capacity, kv_heads, head_dim]`."""
        rows = self.layers[layer].kv[self.page_table[sequence]]
        parts = parallel.size(parallel.kv_heads) if parallel else 1
        rows = rows.reshape(self.capacity, parts, 2, -1, rows.shape[-1])
        return rows[:, :, 0].reshape(self.capacity, -1, rows.shape[-1])


def bytes_per_token(config: KeyeConfig, dtype: jnp.dtype | None = None, *, indexer_dtype: str | None = None) -> int:
    """Bytes that one cached token takes in all layers; arguments as for `Cache.create`."""
    one = jax.eval_shape(lambda: Cache.create(config, 1, PAGE_SIZE, dtype, indexer_dtype=indexer_dtype).layers)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one)) // PAGE_SIZE
