"""Indexer scores on Hopper GPUs, in Pallas Mosaic GPU: `prefill` for several queries a sequence, `decode` for one.

Both stream keys through shared memory past queries that stay there, multiply them with wgmma (`products`) and rectify,
gate and sum the heads in registers (`epilogues`). Interpret mode cannot run them: those two are `inline_mgpu` bodies.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.indexer_scores.mosaic_gpu.decode import decode_scores
from pallas_kernels.indexer_scores.mosaic_gpu.prefill import prefill_scores
from pallas_kernels.indexer_scores.mosaic_gpu.products import ROWS


def indexer_scores(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    page_table: jax.Array,
    query_start: jax.Array,
    *,
    scale: float,
    key_scales: jax.Array | None = None,
) -> jax.Array:
    """`scale * sum_n weights[b,t,n] * relu(q[b,t,n] . keys[b,s])`, causal; see `api.indexer_scores`.

    Args:
      q: bf16 `[b, t, n, d]`.
      weights: bf16 or fp32 `[b, t, n]`.
      keys: bf16 `[p, page_size, d]`.
      page_table: int32 `[b, m]`.
      query_start: int32 `[b]`.
      scale: factor on the sum.

    Returns:
      float32 `[b, t, m * page_size]`; -inf after a query's own position.

    Raises:
      NotImplementedError: dtypes or sizes this kernel is not made for (it does not look at the device).
    """
    return _dispatch(q, weights, keys, page_table, query_start, scale=scale, key_scales=key_scales, fill=True)


def indexer_scores_unfilled(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    page_table: jax.Array,
    query_start: jax.Array,
    *,
    scale: float,
    key_scales: jax.Array | None = None,
) -> jax.Array:
    """`indexer_scores` for a caller that reads only positions up to each query's own; the others are undefined.

    Worth it where the page table reaches far beyond the queries: nothing is written there.
    """
    return _dispatch(q, weights, keys, page_table, query_start, scale=scale, key_scales=key_scales, fill=False)


def _dispatch(q, weights, keys, page_table, query_start, *, scale, key_scales, fill):
    _, queries, heads, dim = q.shape
    page_size = keys.shape[1]
    if key_scales is not None:
        raise NotImplementedError("takes no scales of keys")
    length = page_table.shape[1] * page_size
    if q.dtype != jnp.bfloat16 or keys.dtype != jnp.bfloat16 or weights.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"takes bf16 queries and keys, not {q.dtype} and {keys.dtype}, gates {weights.dtype}")
    if not 8 <= heads <= 64 or not 32 <= dim <= 128 or dim % 16:
        raise NotImplementedError(f"takes 8 to 64 heads of 32 to 128 elements (a multiple of 16), not {heads} of {dim}")
    if length % ROWS or (page_size % ROWS and ROWS % page_size) or page_size % 8:
        raise NotImplementedError(
            f"takes pages that divide 64 or are multiples of it, and whole tiles, not {page_size}"
        )
    run = decode_scores if queries == 1 and heads % 8 == 0 else prefill_scores
    return run(
        q, weights, keys, page_table.astype(jnp.int32), query_start.astype(jnp.int32), scale=float(scale), fill=fill
    )
