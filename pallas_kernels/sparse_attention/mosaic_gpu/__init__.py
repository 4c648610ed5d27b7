"""Sparse attention on Hopper GPUs (Pallas Mosaic GPU).

`prefill` serves unions of neighbouring queries, with the kernels of `unions` and `attend`. `decode` serves queries one
at a time, and `decode_float8` those with keys and values in float8.
"""

import jax

from pallas_kernels.sparse_attention.mosaic_gpu.decode import attend_single
from pallas_kernels.sparse_attention.mosaic_gpu.decode_float8 import attend_single_float8
from pallas_kernels.sparse_attention.mosaic_gpu.gather import GROUP
from pallas_kernels.sparse_attention.mosaic_gpu.prefill import sparse_prefill


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
        at most 64. With scales they are float8_e4m3fn, for fewer than 16 queries of a sequence.
      indices: int32 `[b, t, top_k]`, the positions that a query attends to. A position appears at most once; -1 is
        ignored.
      page_table: int32 `[b, m]`.
      kv_scales: float32 `[p, page_size, 2 * k]`, factors on each head's keys and values. Those of values are factors on
        the weights before they are rounded to bfloat16, so the result is that of "xla" where scales are powers of two.
      scale: factor on the dot products, above 0.

    Returns:
      bfloat16 `[b, t, n, 128]`, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`. A query with no
      selected position gets zeros and -inf.

    Raises:
      NotImplementedError: dtypes or sizes that the kernels do not take.
    """
    if kv_scales is not None:
        if q.shape[1] >= GROUP:
            raise NotImplementedError(f"keys and values have scales, and {q.shape[1]} queries attend together")
        return attend_single_float8(q, kv, kv_scales, indices, page_table, scale=scale)
    run = attend_single if q.shape[1] < GROUP else sparse_prefill
    return run(q, kv, indices, page_table, scale=scale)
