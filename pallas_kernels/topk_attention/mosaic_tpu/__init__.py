"""Selection and attention on TPUs: neighbouring queries attend together to the union of what they select.

`unions.py` finds the thresholds of a block of neighbouring queries, and lists each position that at least one of them
selected, with the bits of the queries that did. `attention.py` copies the listed rows of keys and values into VMEM and
multiplies them for all queries of the block. The bits mask what a query did not select, so the result is exact.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.select_topk.mosaic_tpu import select_topk
from pallas_kernels.sparse_attention.mosaic_tpu import sparse_attention
from pallas_kernels.topk_attention.mosaic_tpu.attention import union_attention
from pallas_kernels.topk_attention.mosaic_tpu.unions import select_unions

__all__ = ["topk_attention"]

_FEWEST_QUERIES = 16


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
    """See `api.topk_attention`.

    Raises:
      NotImplementedError: dtypes or sizes that the kernels do not take.
    """
    if q.shape[1] < _FEWEST_QUERIES:
        return sparse_attention(q, kv, select_topk(scores, lengths, top_k), page_table, scale=scale)
    table = jnp.clip(page_table, 0, kv.shape[0] - 1)
    unions = select_unions(scores, lengths, table, top_k, page_size=kv.shape[1])
    return union_attention(q, kv, table, unions, scale=scale)
