"""The decoder's cache: keys, values and index keys in pages, an explicit pytree in and out of every step."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from keye_jax.config import KeyeConfig
from pallas_kernels import paging

PAGE_SIZE = 64
"""Positions a page holds."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one decoder layer keeps.

    Attributes:
      kv: `[pages, PAGE_SIZE, 2 * kv_heads, head_dim]`; a token's row holds its keys, then its values, of all heads.
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
        k: jax.Array,
        v: jax.Array,
        index_keys: jax.Array,
        index_scales: jax.Array | None = None,
    ) -> LayerCache:
        """Writes the first `count` of t new tokens of each sequence at positions `start` and on.

        Args:
          page_table: int32 `[b, m]`.
          start, count: int32 `[b]`.
          k, v: `[b, t, kv_heads, head_dim]`.
          index_keys: `[b, t, indexer_head_dim]`.
          index_scales: float32 `[b, t]`, where the cache has them.
        """
        pages = self.kv.shape[0]
        offsets = jnp.arange(k.shape[1])
        slots = paging.slots(page_table, start[:, None] + offsets, PAGE_SIZE)
        slots = jnp.where(offsets < count[:, None], slots, pages * PAGE_SIZE)  # out of bounds: dropped

        def write(stored: jax.Array, new: jax.Array) -> jax.Array:
            rows = stored.reshape(pages * PAGE_SIZE, *stored.shape[2:])
            return rows.at[slots].set(new.astype(stored.dtype), mode="drop").reshape(stored.shape)

        scales = self.index_scales
        assert (scales is None) == (index_scales is None)
        return LayerCache(
            kv=write(self.kv, jnp.concatenate([k, v], axis=2)),
            index_keys=write(self.index_keys, index_keys),
            index_scales=None if scales is None or index_scales is None else write(scales, index_scales),
        )


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
    ) -> Cache:
        """An empty cache for `batch` sequences of up to `capacity` tokens each.

        Args:
          dtype: of keys and values; the config's if left out.
          indexer_dtype: of index keys, "float8_e4m3fn", or None for `dtype`.
        """
        dtype = dtype or config.jax_dtype
        per_sequence = math.ceil(capacity / PAGE_SIZE)
        pages = batch * per_sequence
        layers = tuple(
            LayerCache(
                kv=jnp.zeros((pages, PAGE_SIZE, 2 * config.num_key_value_heads, config.head_dim), dtype),
                index_keys=jnp.zeros((pages, PAGE_SIZE, config.sa_config.indexer_head_dim), indexer_dtype or dtype),
                index_scales=jnp.zeros((pages, PAGE_SIZE), jnp.float32) if indexer_dtype else None,
            )
            for _ in range(config.num_hidden_layers)
        )
        page_table = jnp.arange(pages, dtype=jnp.int32).reshape(batch, per_sequence)
        return cls(layers, page_table, jnp.zeros(batch, jnp.int32))


def bytes_per_token(config: KeyeConfig, dtype: jnp.dtype | None = None, *, indexer_dtype: str | None = None) -> int:
    """Bytes that one cached token takes in all layers; arguments as for `Cache.create`."""
    one = jax.eval_shape(lambda: Cache.create(config, 1, PAGE_SIZE, dtype, indexer_dtype=indexer_dtype).layers)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one)) // PAGE_SIZE
