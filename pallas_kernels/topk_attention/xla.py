"""The portable selection, then the portable sparse attention."""

import jax

from pallas_kernels.select_topk.xla import select_topk
from pallas_kernels.sparse_attention.xla import sparse_attention


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
    with jax.named_scope("selection"):
        indices = select_topk(scores, lengths, top_k)
    return sparse_attention(q, kv, indices, page_table, scale=scale)
