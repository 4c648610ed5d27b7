"""Selection and attention on Hopper GPUs, without lists of what each query selected.

A query's selection is two numbers: the lowest score it takes, and the last position at which an equal one still counts.
With those, 16 neighbouring queries' scores are read once more to write down the union of what they select, a
membership bit of each query beside every position, and the 16 attend to the union together. With fewer queries a
sequence, as in decode, each attends to its own list.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import paging
from pallas_kernels.select_topk.mosaic_gpu import select_topk
from pallas_kernels.select_topk.thresholds import select_threshold
from pallas_kernels.select_topk.unions import build_unions
from pallas_kernels.sparse_attention.gather import GROUP
from pallas_kernels.sparse_attention.mosaic_gpu import sparse_attention
from pallas_kernels.sparse_attention.unions import union_attention

_LIST_MULTIPLE = 128
"""Lists of this many entries, or a multiple, need not be copied."""


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
    """See `api.topk_attention`; bfloat16 queries, keys and values of 128 elements a head."""
    batch, queries, heads, dim = q.shape
    if queries < GROUP:
        return sparse_attention(q, kv, select_topk(scores, lengths, top_k), page_table, scale=scale)
    padding = -queries % GROUP
    if padding:
        q, scores, lengths = (
            jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in (q, scores, lengths)
        )
    size = scores.shape[-1]
    rows, flat = scores.reshape(-1, size), lengths.reshape(-1)
    threshold, last_tie = select_threshold(rows, flat, top_k)
    limit = -(-min(GROUP * top_k, size) // _LIST_MULTIPLE) * _LIST_MULTIPLE
    positions, members, counts = build_unions(rows, threshold, last_tie, flat, group=GROUP, limit=limit)
    slots = paging.slots(page_table, positions.reshape(batch, -1, limit), kv.shape[1])
    out, lse = union_attention(q.reshape(-1, heads, dim), kv, slots.reshape(-1, limit), members, counts, scale=scale)
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3])
    return out[:, :queries], lse[:, :queries]
