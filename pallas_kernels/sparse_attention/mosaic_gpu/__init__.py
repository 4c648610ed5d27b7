"""Sparse attention on Hopper GPUs (Pallas Mosaic GPU).

`prefill` serves unions of neighbouring queries, with the kernels of `unions` and `attend`. `decode` serves queries one
at a time.
"""

import jax

from pallas_kernels.sparse_attention.mosaic_gpu.decode import attend_single
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
        at most 64.
      indices: int32 `[b, t, top_k]`, the positions that a query attends to. A position appears at most once; -1 is
        ignored.
      page_table: int32 `[b, m]`.
      scale: factor on the dot products, above 0.

    Returns:
      bfloat16 `[b, t, n, 128]`, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`. A query with no
      selected position gets zeros and -inf.

    Raises:
      NotImplementedError: scales, or dtypes or sizes that the kernels do not take.
    """
    if kv_scales is not None:
        raise NotImplementedError("keys and values have scales")
    run = attend_single if q.shape[1] < GROUP else sparse_prefill
    return run(q, kv, indices, page_table, scale=scale)
