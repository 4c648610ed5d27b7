"""Selection and attention together, for which an accelerator need not write out what each query selected."""

import jax

from pallas_kernels.dispatch import dispatch


def topk_attention(
    q: jax.Array,
    scores: jax.Array,
    lengths: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    *,
    top_k: int,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`sparse_attention` to what `select_topk` selects: each query attends to its `top_k` highest scores.

    Args:
      q: `[b, t, n, d]`.
      scores: float32 `[b, t, s]`.
      lengths: int32 `[b, t]`, how many of the s positions each query sees.
      kv: `[p, page_size, 2 * k, d]` pages; a row holds the keys of all k heads, then their values.
      page_table: int32 `[b, m]`.
      top_k: how many positions a query attends to; all it sees when they are fewer.
      scale: factor on the dot products.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      `[b, t, n, d]` in the dtype of q, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`.
    """
    run = dispatch("topk_attention.topk_attention", ("mosaic_gpu", "mosaic_tpu", "xla"), implementation)
    return run(q, scores, lengths, kv, page_table, top_k=top_k, scale=scale)
