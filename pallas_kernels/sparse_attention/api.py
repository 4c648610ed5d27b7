"""Attention of each query to its own set of keys."""

import jax

from pallas_kernels.dispatch import dispatch


def sparse_attention(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    page_table: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the selected positions only, grouped-query, for prefill and decode.

    Memory: the results and a workspace that does not grow with the context.

    Args:
      q: `[b, t, n, d]`.
      kv: `[p, page_size, 2 * k, d]` pages; a row holds the keys of all k heads, then their values.
      indices: int32 `[b, t, top_k]` positions each query attends to, all its heads alike, none twice; -1 is ignored.
      page_table: int32 `[b, m]`.
      scale: factor on the dot products.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      `[b, t, n, d]` in the dtype of q, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`. A query
      with no selected position gets zeros and -inf.
    """
    run = dispatch("sparse_attention.sparse_attention", ("mosaic_gpu", "mosaic_tpu", "xla"), implementation)
    return run(q, kv, indices, page_table, scale=scale)
