"""The Hopper selection, then the Hopper sparse attention."""

import jax

from pallas_kernels.select_topk.mosaic_gpu import select_topk
from pallas_kernels.sparse_attention.mosaic_gpu import sparse_attention


def topk_attention(
    q: jax.Array,
    scores: jax.Array,
    lengths: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    *,
    top_k: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.topk_attention`; bfloat16 queries, keys and values with heads of 128 elements."""
    with jax.named_scope("selection"):
        indices = select_topk(scores, lengths, top_k)
    return sparse_attention(q, kv, indices, page_table, scale=scale)
