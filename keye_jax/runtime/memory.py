"""What parameters, pages and steps take on each device."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import PagePool
from keye_jax.model.attention import queries_at_once
from keye_jax.model.params import parameter_arrays
from keye_jax.page_allocator import pages_for
from keye_jax.runtime.prefill import round_up
from keye_jax.sharding.mesh_rules import MeshRules
from keye_jax.sharding.step import StepSharding
from pallas_kernels.grouped_matmul import xla as grouped_matmul
from pallas_kernels.sparse_attention import xla as sparse_attention


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
    implementation: str,
    indexer_dtype: str | None = None,
    cache_dtype: str | None = None,
    activation_dtype: str | None = None,
) -> int:
    """An estimate of what a step of reading needs on a GPU besides its arguments, in bytes on one device.

    That is the most of three: scores of a block of queries, what they attend to where it is gathered or copied, or
    the experts' rows. XLA's compiler for one GPU differs by at most 5% for the released model, chunks of 1,024 to 8,192
    tokens and contexts of 32K to 256K; `python -m tests.gpu_compile.memory` compares.

    Args:
      chunk: prompt tokens that each device reads in one step.
      context: tokens of the whole prompt.
      implementation: of the kernels, as in `AttentionOptions.kernels`.
      indexer_dtype, cache_dtype: as for `pool_bytes`.
      activation_dtype: as in `AttentionOptions`.
    """
    step, item = StepSharding.prefill(rules), config.jax_dtype.itemsize
    tokens, portable = min(chunk, context), not implementation.startswith("mosaic")
    hidden = tokens * config.hidden_size * item
    attention = _attention_bytes(config, step, tokens, context, implementation, cache_dtype)
    if step.gathers_pages:
        # XLA's compiler gives two and more that share positions 1.29 GiB at 32K, 1.46 to 1.50 at 128K and 1.72 at 256K.
        attention += context * (index_row_bytes(config, indexer_dtype) + kv_row_bytes(config, rules, cache_dtype))
        attention += 2**26
    ranks = step.size(step.query_sequence)
    owners = step.size(tuple(dict.fromkeys((*step.query_sequence, *step.experts, *step.expert_hidden))))
    rows = int(tokens * ranks * config.num_experts_per_tok / owners * (1.5 if owners > 1 else 1))
    inner = config.moe_intermediate_size // step.size(step.expert_hidden)
    if portable:
        # XLA multiplies float8 in float32.
        shared = {"groups": config.num_experts // step.size(step.experts), "itemsize": 4 if activation_dtype else item}
        experts = max(
            grouped_matmul.gpu_bytes(rows, config.hidden_size, 2 * inner, **shared),
            grouped_matmul.gpu_bytes(rows, inner, config.hidden_size, **shared),
        )
    else:
        experts = rows * (config.hidden_size + inner) * item
    exchanged = 2 * ranks * hidden if ranks > 1 else 0
    return int(max(attention, experts + 2 * hidden + exchanged))


def _attention_bytes(
    config: KeyeConfig, step: StepSharding, tokens: int, context: int, implementation: str, cache_dtype: str | None
) -> int:
    """Of one layer's attention from `tokens` queries of one sequence to its context, on one device."""
    item, sa, heads = config.jax_dtype.itemsize, config.sa_config, config.num_attention_heads // step.size(step.heads)
    block = math.ceil(tokens / math.ceil(tokens / queries_at_once(implementation, context)))
    q = heads * config.head_dim
    kept = config.hidden_size + q + sa.indexer_num_heads * sa.indexer_head_dim
    # Positions that are selected, or bits of all where they take less.
    selected = 4 * sa.topk
    if implementation == "mosaic_gpu" and cache_dtype is None:
        selected = min(selected, context // 8)
    scoring = block * (4 * context + selected) + tokens * kept * item
    row = 2 * config.num_key_value_heads // step.size(step.kv_heads) * config.head_dim * item
    # Positions that are selected, and which of them are there; queries and what they attended to.
    kept = 5 * block * sa.topk + tokens * (config.hidden_size + 2 * q) * item
    if implementation == "mosaic_gpu" or (implementation == "mosaic_tpu" and cache_dtype is None):
        return max(scoring, kept + context * row) if cache_dtype else scoring
    return max(scoring, kept + sparse_attention.gpu_bytes(block, heads, context, sa.topk, row, item))


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
