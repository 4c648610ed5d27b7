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
    """Grouped-query softmax attention to selected positions only, for prefill and decode.

    Memory: the results, and a workspace that does not grow with the context.

    Args:
      q: `[b, t, n, d]`.
      kv: `[p, page_size, 2 * k, d]` pages. A row holds the keys of all k heads, then their values.
      indices: int32 `[b, t, top_k]`, the positions that a query attends to, the same for all its heads. A position
        appears at most once; -1 is ignored.
      page_table: int32 `[b, m]`.
      scale: factor on the dot products.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      `[b, t, n, d]` in the dtype of q, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`. A query
      with no selected position gets zeros and -inf.

    Raises:
      UnsupportedError: the implementation does not exist, or none supports the arguments.
      ValueError: `implementation` is no implementation's name.
    """
    return dispatch("sparse_attention", implementation)(q, kv, indices, page_table, scale=scale)
