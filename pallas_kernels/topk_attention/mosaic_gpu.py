"""The Hopper selection, then the Hopper sparse attention.

In prefill the selection passes bitmaps on, from which the lists of neighbouring queries are built. In decode, of few
queries, and where a bitmap is longer than a list of positions, it passes positions on.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.hopper import MULTIPROCESSORS
from pallas_kernels.select_topk.mosaic_gpu import select_bits, select_topk
from pallas_kernels.sparse_attention.mosaic_gpu import sparse_attention
from pallas_kernels.sparse_attention.mosaic_gpu.gather import GROUP
from pallas_kernels.sparse_attention.mosaic_gpu.prefill import bits_prefill


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
    batch, queries, size = scores.shape
    if queries % GROUP or batch * queries <= MULTIPROCESSORS or size > 32 * top_k:
        with jax.named_scope("selection"):
            indices = select_topk(scores, lengths, top_k)
        return sparse_attention(q, kv, indices, page_table, scale=scale)
    with jax.named_scope("selection"):
        limits = jnp.clip(lengths, 0, size).reshape(-1)
        reach = jnp.max(limits.reshape(-1, GROUP), axis=1)
        bits = select_bits(scores.reshape(-1, size), limits, reach, top_k)
    return bits_prefill(q, kv, bits, reach, page_table, top_k=top_k, scale=scale)
