"""Selection and attention on TPUs: neighbouring queries attend together to the union of what they select.

`unions.py` finds the thresholds of a block of neighbouring queries, and lists each position that at least one of them
selected, with the bits of the queries that did. `attention.py` copies the listed rows of keys and values into VMEM and
multiplies them for all queries of the block. The bits mask what a query did not select, so the result is exact.

In decode, `select_topk` and `sparse_attention` follow each other. SparseCores select where docs/tpu.md expects them to
take less time than the TensorCore.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.select_topk import mosaic_tpu, sparse_core
from pallas_kernels.sparse_attention.mosaic_tpu import sparse_attention
from pallas_kernels.topk_attention.mosaic_tpu.attention import union_attention
from pallas_kernels.topk_attention.mosaic_tpu.unions import select_unions

__all__ = ["topk_attention"]

_FEWEST_QUERIES = 16
_MOST_ROWS_V5P = 8
"""Rows of scores that the SparseCores of v5p select sooner than its TensorCores. Later generations have no limit."""


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
        return sparse_attention(q, kv, _select(scores, lengths, top_k), page_table, scale=scale)
    table = jnp.clip(page_table, 0, kv.shape[0] - 1)
    unions = select_unions(scores, lengths, table, top_k, page_size=kv.shape[1])
    return union_attention(q, kv, table, unions, scale=scale)


def _select(scores: jax.Array, lengths: jax.Array, top_k: int) -> jax.Array:
    """See `select_topk`."""
    rows, size = lengths.size, scores.shape[-1]
    if _on_sparse_cores(rows) and sparse_core.holds(rows, size, top_k):
        return sparse_core.select_topk(scores, lengths, top_k)
    return mosaic_tpu.select_topk(scores, lengths, top_k)


def _on_sparse_cores(rows: int) -> bool:
    """Whether the current mesh's device, else the default device, has SparseCores that select so many rows sooner."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # No TPU: kernels are interpreted, and the interpreter does not run SparseCores.
        return False
    return info.sparse_core is not None and (info.generation > 5 or rows <= _MOST_ROWS_V5P)
