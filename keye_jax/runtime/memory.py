"""What parameters, pages and steps take on each device."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import PagePool
from keye_jax.model.params import parameter_arrays
from keye_jax.page_allocator import pages_for
from keye_jax.runtime.prefill import round_up
from keye_jax.sharding.mesh_rules import MeshRules
from keye_jax.sharding.step import StepSharding


def weight_bytes(config: KeyeConfig, rules: MeshRules, *, dtype: str | None = None, only: tuple[str, ...] = ()) -> int:
    """Bytes of the parameters on one device.

    Args:
      rules: how they lie over devices.
      dtype: of the parameters that have not fewer bits; the config's if left out.
      only: names of modules; of these alone, if given.
    """
    return sum(
        math.prod(_shard_shape(stored.shape, rules.sharding(*stored.axes)))
        * jnp.dtype(stored.dtype or dtype or config.dtype).itemsize
        for path, stored in parameter_arrays(config, rules).items()
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
    cache_dtype: str | None = None,
) -> int:
    """Bytes on one device of the pages of a number of sequences of `tokens` tokens each.

    Args:
      rules, dtype: as for `weight_bytes`.
      indexer_dtype: of index keys, if not `dtype`.
      cache_dtype: of keys and values, if not `dtype`.
    """
    homes, turns = rules.size("batch"), rules.parts(rules.cache_sequence)
    per_shard = -(-sequences // homes) * -(-pages_for(round_up(tokens)) // turns)
    return shard_bytes(config, per_shard, rules, dtype=dtype, indexer_dtype=indexer_dtype, cache_dtype=cache_dtype)


def shard_bytes(
    config: KeyeConfig,
    pages: int,
    rules: MeshRules,
    *,
    dtype: Any = None,
    indexer_dtype: str | None = None,
    cache_dtype: str | None = None,
) -> int:
    """Bytes on one device of a pool that has a number of pages on each shard; arguments as for `pool_bytes`."""
    count = pages * rules.size("batch") * rules.parts(rules.cache_sequence)
    dtypes = {"indexer_dtype": indexer_dtype, "cache_dtype": cache_dtype}
    pool = jax.eval_shape(lambda: PagePool.create(config, count, jnp.dtype(dtype or config.dtype), **dtypes))
    if rules.sharding() is None:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pool))
    shardings = jax.tree.leaves(pool.shardings(rules))
    return sum(
        math.prod(_shard_shape(leaf.shape, sharding)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(pool), shardings, strict=True)
    )


def prefill_workspace_bytes(
    config: KeyeConfig,
    rules: MeshRules,
    chunk: int,
    context: int,
    *,
    indexer_dtype: str | None = None,
    cache_dtype: str | None = None,
) -> int:
    """An estimate of what a step of reading needs on a GPU besides its arguments, in bytes on one device.

    That is scores of a block of queries, or the experts' rows.

    Args:
      chunk: prompt tokens that each device reads in one step.
      context: tokens of the whole prompt.
      indexer_dtype, cache_dtype: as for `pool_bytes`.
    """
    step, item = StepSharding.prefill(rules), config.jax_dtype.itemsize
    ranks = step.size(step.query_sequence)
    owners = step.size(tuple(dict.fromkeys((*step.query_sequence, *step.experts, *step.expert_hidden))))
    # One H200 needed 1.13 GiB at 128K and 1.12 GiB at 256K, where a block of scores takes one; XLA's compiler gives
    # two and more that share positions 1.29 GiB at 32K, 1.46 to 1.50 at 128K and 1.72 at 256K.
    attention = min(2**30, 4 * min(chunk, context) * context) + 2**27
    stored = index_row_bytes(config, indexer_dtype) + kv_row_bytes(config, rules, cache_dtype)
    whole = context * stored + 2**27 if step.gathers_pages else 0
    tokens = min(chunk, context) * ranks
    rows = tokens * config.num_experts_per_tok / owners * (1.5 if owners > 1 else 1)
    widths = 2 * config.hidden_size + 2 * config.moe_intermediate_size
    exchanged = 2 * tokens * config.hidden_size * item if ranks > 1 else 0
    return int(max(attention + whole, rows * widths * item + exchanged))


def decode_workspace_bytes(config: KeyeConfig, rules: MeshRules, batch: int, context: int) -> int:
    """An estimate of what a step of decoding needs on a GPU besides its arguments, in bytes on one device.

    That is scores, what is selected, and logits.

    Args:
      batch: sequences.
      context: tokens of each.
    """
    step = StepSharding.decode(rules)
    each = batch / step.size(step.batch)
    scores = 4 * context / step.size(step.cache_sequence) + config.sa_config.topk * kv_row_bytes(config, rules)
    return int(2 * each * scores + 3 * 4 * batch * config.vocab_size + 64 * 2**20)


def encode_workspace_bytes(config: KeyeConfig, patches: int) -> int:
    """An estimate of what the vision encoder needs besides its weights, in bytes on one device.

    For the released encoder XLA's compiler for CPUs, which computes in float32, takes 101,753 bytes for each patch of
    an image of 81,920. That is 15 hidden states and two inner ones. Small images, of which a step has 8,192 patches in
    all, need a quarter more.

    Args:
      patches: that a device encodes in one step.
    """
    vision = config.vision_config
    return patches * (15 * vision.hidden_size + 2 * vision.intermediate_size) * config.jax_dtype.itemsize


def kv_row_bytes(config: KeyeConfig, rules: MeshRules, cache_dtype: str | None = None) -> int:
    """Bytes of a token's keys and values in one layer on one device; float8 ones have float32 scales."""
    head = config.head_dim + 4 if cache_dtype else config.head_dim * config.jax_dtype.itemsize
    return 2 * config.num_key_value_heads * head // rules.size("kv_heads")


def index_row_bytes(config: KeyeConfig, indexer_dtype: str | None) -> int:
    """Bytes of a token's index key in one layer; a float8 one has a float32 scale."""
    dim = config.sa_config.indexer_head_dim
    return dim + 4 if indexer_dtype else dim * config.jax_dtype.itemsize


def _shard_shape(shape: tuple[int, ...], sharding: jax.sharding.Sharding | None) -> tuple[int, ...]:
    return shape if sharding is None else sharding.shard_shape(shape)
