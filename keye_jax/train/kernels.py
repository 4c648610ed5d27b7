"""The forward pass of sparse attention by the operations of `pallas_kernels`, where no indexer learns from it.

They give the results and the selection, and no gradients: the backward pass takes the selection as a mask.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from keye_jax.kv_cache import PAGE_SIZE
from keye_jax.train.blocks import equal_blocks, scan
from pallas_kernels.indexer_scores import indexer_scores
from pallas_kernels.select_topk import select_topk
from pallas_kernels.sparse_attention import sparse_attention


def attend(
    q: jax.Array,
    index_q: jax.Array,
    gates: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index_keys: jax.Array,
    start: jax.Array,
    first: jax.Array,
    *,
    width: int,
    top_k: int,
    scale: float,
    index_scale: float,
    block_bytes: int,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attends to the `top_k` keys of each query's own and earlier positions that score highest.

    Args:
      q, index_q, gates: as of `keye_jax.train.attention.Queries`, b rows of t queries.
      k, v, index_keys: of all samples, one after the other: `[1, s, kv_heads, d]` and `[1, s, di]`, s and width
        multiples of `PAGE_SIZE`.
      start: int32 `[b]`, the position of each row's first query in its sample.
      first: int32 `[b]`, where the keys of each row's sample begin, a multiple of `PAGE_SIZE`.
      width: how many keys are looked at from there.
      scale, index_scale: factors on the dot products of attention and of the indexer.
      block_bytes: most bytes of the scores of one block of queries.
      implementation: of the operations.

    Returns:
      `[b, t, n, d]`, the log-sum-exps float32 `[b, t, n]`, and the selected positions int32 `[b, t, k]`, -1 for none.
    """
    rows, tokens = q.shape[:2]
    kv = jnp.concatenate([k, v], axis=2).reshape(-1, PAGE_SIZE, 2 * k.shape[2], k.shape[3])
    index_pages = index_keys.reshape(-1, PAGE_SIZE, index_keys.shape[-1])
    # Positions after a sample's end lie after all of its queries: whatever page is there, nobody sees it.
    table = jnp.minimum(first[:, None] // PAGE_SIZE + jnp.arange(width // PAGE_SIZE), len(kv) - 1)
    blocks = equal_blocks(tokens, block_bytes // (4 * rows * width))
    size = tokens // blocks

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(rows, blocks, size, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, tokens, *x.shape[3:])

    def run(_: None, block: Any) -> tuple[None, Any]:
        (q, index_q, gates), offset = block
        begin = start + offset
        scores = indexer_scores(
            index_q, gates, index_pages, table, begin, scale=index_scale, fill=False, implementation=implementation
        )
        lengths = begin[:, None] + jnp.arange(1, size + 1)
        selected = select_topk(scores, lengths, min(top_k, width), implementation=implementation)
        out, lse = sparse_attention(q, kv, selected, table, scale=scale, implementation=implementation)
        return None, (out, lse, selected)

    items = (jax.tree.map(split, (q, index_q, gates)), jnp.arange(blocks) * size)
    return jax.tree.map(join, scan(run, None, items)[1])


def selected_mask(selected: jax.Array, begin: jax.Array, width: int) -> jax.Array:
    """Which of the `width` keys from a position on are selected.

    Args:
      selected: int32 `[b, q, k]`, positions, none twice; -1 for none.
      begin: int32 `[b or 1, 1, 1]`, the position of the first key.

    Returns:
      bool `[b, q, width]`.
    """
    rows, queries = selected.shape[:2]
    columns = jnp.where(selected < 0, width, selected - begin)
    row, query = jnp.arange(rows)[:, None, None], jnp.arange(queries)[None, :, None]
    return jnp.zeros((rows, queries, width), bool).at[row, query, columns].set(True, mode="drop")
