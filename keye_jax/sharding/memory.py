"""What parameters and cache take on each device."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from keye_jax.cache import Cache
from keye_jax.config import KeyeConfig
from keye_jax.model.parallel import Parallel
from keye_jax.runner import round_up
from keye_jax.sharding.layout import Layout, parameter_axes


def weight_bytes(
    config: KeyeConfig, layout: Layout | None = None, *, dtype: str | None = None, only: tuple[str, ...] = ()
) -> int:
    """Bytes of the parameters on one device.

    Args:
      layout: how they lie over devices; None for all on one.
      dtype: of the parameters; the config's if left out.
      only: names of modules; of these alone, if given.
    """
    itemsize = jnp.dtype(dtype or config.dtype).itemsize
    arrays = (
        (shape, axes)
        for path, (shape, axes) in parameter_axes(config).items()
        if not only or not set(only).isdisjoint(path)
    )
    if layout is None:
        return sum(math.prod(shape) for shape, _ in arrays) * itemsize
    return sum(math.prod(layout.sharding(*axes).shard_shape(shape)) for shape, axes in arrays) * itemsize


def cache_bytes(
    config: KeyeConfig,
    batch: int,
    context: int,
    layout: Layout | None = None,
    *,
    dtype: Any = None,
    indexer_dtype: str | None = None,
) -> int:
    """Bytes on one device of the cache of `batch` sequences of `context` tokens each; arguments as `weight_bytes`'.

    Args:
      indexer_dtype: of index keys, if not `dtype`.
    """
    parallel = Parallel.of(layout, batch, 1) if layout else None
    create = functools.partial(
        Cache.create,
        config,
        batch,
        round_up(context),
        jnp.dtype(dtype or config.dtype),
        indexer_dtype=indexer_dtype,
        parallel=parallel,
    )
    cache = jax.eval_shape(create)
    leaves = jax.tree.leaves(cache)
    if parallel is None:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    shardings = jax.tree.leaves(cache.shardings(parallel))
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(leaves, shardings, strict=True)
    )
