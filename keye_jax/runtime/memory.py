"""What parameters and pages take on each device."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import PagePool
from keye_jax.model.params import parameter_axes
from keye_jax.page_allocator import pages_for
from keye_jax.runtime.prefill import round_up
from keye_jax.sharding.mesh_rules import MeshRules


def weight_bytes(config: KeyeConfig, rules: MeshRules, *, dtype: str | None = None, only: tuple[str, ...] = ()) -> int:
    """Bytes of the parameters on one device.

    Args:
      rules: how they lie over devices.
      dtype: of the parameters; the config's if left out.
      only: names of modules; of these alone, if given.
    """
    itemsize = jnp.dtype(dtype or config.dtype).itemsize
    return itemsize * sum(
        math.prod(_shard_shape(shape, rules.sharding(*axes)))
        for path, (shape, axes) in parameter_axes(config).items()
        if not only or not set(only).isdisjoint(path)
    )


def pool_bytes(
    config: KeyeConfig,
    sequences: int,
    tokens: int,
    rules: MeshRules,
    *,
    dtype: Any = None,
    indexer_dtype: str | None = None,
) -> int:
    """Bytes on one device of the pages of a number of sequences of `tokens` tokens each.

    Args:
      rules, dtype: as for `weight_bytes`.
      indexer_dtype: of index keys, if not `dtype`.
    """
    homes, turns = rules.size("batch"), rules.parts(rules.cache_sequence)
    per_shard = -(-sequences // homes) * -(-pages_for(round_up(tokens)) // turns)
    pool = jax.eval_shape(
        lambda: PagePool.create(
            config, per_shard * homes * turns, jnp.dtype(dtype or config.dtype), indexer_dtype=indexer_dtype
        )
    )
    if rules.sharding() is None:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pool))
    shardings = jax.tree.leaves(pool.shardings(rules))
    return sum(
        math.prod(_shard_shape(leaf.shape, sharding)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(pool), shardings, strict=True)
    )


def _shard_shape(shape: tuple[int, ...], sharding: jax.sharding.Sharding | None) -> tuple[int, ...]:
    return shape if sharding is None else sharding.shard_shape(shape)
