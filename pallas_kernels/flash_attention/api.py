"""Dense attention without the matrix of scores."""

import jax

from pallas_kernels.dispatch import dispatch


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """Bidirectional softmax attention (FlashAttention's online softmax), as in the vision encoder.

    Memory: the result and a workspace that grows with t, not with t * s.

    Args:
      q: `[b, t, n, d]`.
      k, v: `[b, s, k, d]`, n a multiple of k.
      lengths: int32 `[b]`, how many of the s keys are there.
      scale: factor on the dot products.
      implementation: None, "cudnn", "mosaic_tpu" or "xla".

    Returns:
      `[b, t, n, d]` in the dtype of q.
    """
    return dispatch("flash_attention.flash_attention", ("cudnn", "mosaic_tpu", "xla"), implementation)(
        q, k, v, lengths, scale=scale
    )


def paged_flash_attention(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    query_start: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal softmax attention over paged keys and values: for short contexts, and to compare sparse attention with.

    Args:
      q: `[b, t, n, d]`.
      kv: `[p, page_size, 2 * k, d]` pages; a row holds the keys of all k heads, then their values.
      page_table: int32 `[b, m]`.
      query_start: int32 `[b]`; query t stands at `query_start + t` and sees positions up to its own, none if below 0.
      scale: factor on the dot products.
      implementation: None, "mosaic_gpu", "cudnn", "mosaic_tpu" or "xla".

    Returns:
      `[b, t, n, d]` in the dtype of q, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`. A query
      that sees nothing gets zeros and -inf.
    """
    run = dispatch(
        "flash_attention.paged_flash_attention", ("mosaic_gpu", "cudnn", "mosaic_tpu", "xla"), implementation
    )
    return run(q, kv, page_table, query_start, scale=scale)
