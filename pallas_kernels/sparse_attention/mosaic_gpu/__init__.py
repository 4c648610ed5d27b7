"""Sparse attention on Hopper GPUs (Pallas Mosaic GPU).

`prefill` serves unions of neighbouring queries, with the kernels of `unions` and `attend`. `decode` serves queries one
at a time, and `decode_float8` those with keys and values in float8. Unions copy float8 to bfloat16 first: neighbouring
queries read a position many times, and its copy is written once.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import paging, portable
from pallas_kernels.sparse_attention.mosaic_gpu.decode import attend_single
from pallas_kernels.sparse_attention.mosaic_gpu.decode_float8 import attend_single_float8
from pallas_kernels.sparse_attention.mosaic_gpu.gather import GROUP
from pallas_kernels.sparse_attention.mosaic_gpu.prefill import sparse_prefill

_COPY_BYTES = 2**30
"""Of the contexts that are copied to bfloat16 together; one sequence's may be longer."""


def sparse_attention(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    page_table: jax.Array,
    kv_scales: jax.Array | None = None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.sparse_attention`. It is fastest if neighbouring queries select the same positions.

    Args:
      q: bfloat16 `[b, t, n, 128]`.
      kv: bfloat16 `[p, page_size, 2 * k, 128]` pages. A row holds the keys of all k heads, then their values. n / k is
        at most 64. With scales they are float8_e4m3fn.
      indices: int32 `[b, t, top_k]`, the positions that a query attends to. A position appears at most once; -1 is
        ignored.
      page_table: int32 `[b, m]`.
      kv_scales: float32 `[p, page_size, 2 * k]`, factors on each head's keys and values. For fewer than 16 queries of a
        sequence those of values are factors on the weights before they are rounded to bfloat16, so the result is that
        of "xla" where scales are powers of two. For more, the contexts are copied to bfloat16.
      scale: factor on the dot products, above 0.

    Returns:
      bfloat16 `[b, t, n, 128]`, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`. A query with no
      selected position gets zeros and -inf.

    Raises:
      NotImplementedError: dtypes or sizes that the kernels do not take.
    """
    if kv_scales is None:
        run = attend_single if q.shape[1] < GROUP else sparse_prefill
        return run(q, kv, indices, page_table, scale=scale)
    if q.shape[1] < GROUP:
        return attend_single_float8(q, kv, kv_scales, indices, page_table, scale=scale)

    def attend(some: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Copies wait for the selection: the scores' memory is free then.
        q, indices, table = jax.lax.optimization_barrier(some)
        copied = paging.scaled(kv[table], kv_scales[table], q.dtype).reshape(-1, *kv.shape[1:])
        own = jnp.arange(table.size, dtype=table.dtype).reshape(table.shape)
        return sparse_prefill(q, copied, indices, own, scale=scale)

    batch, width = page_table.shape
    fits = max(1, _COPY_BYTES // (width * kv.shape[1] * paging.scaled_row_bytes(kv, q.dtype)))
    if batch <= fits:
        return attend((q, indices, page_table))
    at_once = next(count for count in range(fits, 0, -1) if batch % count == 0)
    blocks = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), (q, indices, page_table))
    out, lse = portable.map_blocks(attend, blocks, q)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])
