"""Indexer scores on Hopper GPUs (Pallas Mosaic GPU): `prefill` for several queries per sequence, `decode` for one.

In both, queries stay in shared memory and keys are streamed through it. `products` multiplies them with wgmma, and
`epilogues` applies relu and gates and sums the heads in registers. Interpret mode cannot run these two modules: they
are `inline_mgpu` bodies.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.wgmma import ROWS
from pallas_kernels.indexer_scores.mosaic_gpu.decode import decode_scores
from pallas_kernels.indexer_scores.mosaic_gpu.prefill import prefill_scores


def indexer_scores(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    page_table: jax.Array,
    query_start: jax.Array,
    *,
    scale: float,
    key_scales: jax.Array | None = None,
    fill: bool = True,
    skip_below: int = 0,
) -> jax.Array:
    """See `api.indexer_scores`.

    Args:
      q: bf16 or float8_e4m3fn `[b, t, n, d]`.
      weights: bf16 or fp32 `[b, t, n]`.
      keys: `[p, page_size, d]`, in the dtype of q.
      page_table: int32 `[b, m]`.
      query_start: int32 `[b]`.
      scale: factor on the sum.
      key_scales: fp32 `[p, page_size]`, or None.
      fill: whether positions after a query's own are written.
      skip_below: blocks of queries that all lie below this position are not scored, if there are several queries.

    Returns:
      float32 `[b, t, m * page_size]`; -inf after a query's own position.

    Raises:
      NotImplementedError: dtypes or sizes that the kernels do not take. The device is not checked.
    """
    _, queries, heads, dim = q.shape
    page_size = keys.shape[1]
    length = page_table.shape[1] * page_size
    if q.dtype != keys.dtype or q.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        raise NotImplementedError(f"takes bf16 or e4m3 queries and keys, not {q.dtype} and {keys.dtype}")
    if weights.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"takes bf16 or fp32 gates, not {weights.dtype}")
    dim_step = 32 // q.dtype.itemsize
    if not 8 <= heads <= 64 or not 32 <= dim <= 128 or dim % dim_step:
        raise NotImplementedError(
            f"takes 8 to 64 heads of 32 to 128 elements (a multiple of {dim_step}), not {heads} of {dim}"
        )
    if length % ROWS or page_size < 8 or page_size & (page_size - 1):
        raise NotImplementedError(f"takes pages of a power of two from 8, and whole tiles, not {page_size}")
    if key_scales is not None and page_size < 32:
        raise NotImplementedError(
            f"takes scales in pages of 32 keys or more, not {page_size}: TMA writes whole 128 bytes"
        )
    run = decode_scores if queries == 1 and heads % 8 == 0 else functools.partial(prefill_scores, skip_below=skip_below)
    if key_scales is not None:
        key_scales = key_scales.astype(jnp.float32)
    return run(
        q,
        weights,
        keys,
        page_table.astype(jnp.int32),
        query_start.astype(jnp.int32),
        key_scales,
        scale=float(scale),
        fill=fill,
    )
