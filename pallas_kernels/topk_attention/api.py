"""Selection and attention in one operation, so that an accelerator need not write out the selections."""

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
    """`sparse_attention` to the result of `select_topk`: each query attends to its `top_k` highest scores.

    Memory: the results, and a workspace: at most the selected positions, int32 `[b, t, top_k]`, and what
    `sparse_attention` takes.

    Args:
      q: `[b, t, n, d]`.
      scores: float32 `[b, t, s]`.
      lengths: int32 `[b, t]`, the number of positions that a query sees, from 0 to s.
      kv: `[p, page_size, 2 * k, d]` pages. A row holds the keys of all k heads, then their values.
      page_table: int32 `[b, m]`.
      top_k: number of positions that a query attends to; all that it sees if they are fewer.
      scale: factor on the dot products.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      `[b, t, n, d]` in the dtype of q, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`. A query
      that sees nothing gets zeros and -inf.

    Raises:
      UnsupportedError: the implementation does not exist, or none supports the arguments.
      ValueError: `implementation` is no implementation's name.
    """
    run = dispatch("topk_attention", implementation)
    return run(q, scores, lengths, kv, page_table, top_k=top_k, scale=scale)
