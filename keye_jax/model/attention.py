"""Grouped-query attention over the cache: sparse through the indexer's selection, or dense."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.cache import PAGE_SIZE, LayerCache
from keye_jax.config import KeyeConfig
from keye_jax.model.indexer import Indexer
from keye_jax.model.layers import Linear, RMSNorm
from keye_jax.model.rope import apply_rope
from pallas_kernels.dispatch import available
from pallas_kernels.flash_attention import paged_flash_attention
from pallas_kernels.indexer_scores import indexer_scores
from pallas_kernels.select_topk import select_topk
from pallas_kernels.topk_attention import topk_attention

_SCORE_BYTES = {"mosaic_gpu": 2**30, "mosaic_tpu": 2**30}
_FEW_SCORE_BYTES = 64 * 2**20
"""What the scores of one block of queries may take: at 128K tokens those of 2,048, enough to fill a GPU, or of 128."""

DENSE_BELOW = {"mosaic_gpu": 16_384}
"""Longest context, in tokens, at which dense attention is the faster one, by the implementation of the sparse one."""


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """How attention is computed; static in every compiled step.

    Attributes:
      attention: "sparse", the model as released, or "dense", every visible key, for comparison.
      implementation: name of the kernels' implementation, or None for the best there is.
      dense_below: contexts of up to so many tokens are attended to densely by a "sparse" model; None takes what was
        measured to be faster (`DENSE_BELOW`), 0 always selects, as released.
      indexer_dtype: of index queries and keys, and of the cache's: "float8_e4m3fn", as the publisher serves them, less
        exact, or None for the parameters'.
      intermediates: whether layers also return what they computed on the way (needs memory for all scores).
    """

    attention: Literal["sparse", "dense"] = "sparse"
    implementation: str | None = None
    dense_below: int | None = None
    indexer_dtype: Literal["float8_e4m3fn"] | None = None
    intermediates: bool = False

    @property
    def kernels(self) -> str:
        """Name of the implementation that comes first."""
        return self.implementation or available()[0]

    def for_context(self, tokens: int) -> AttentionOptions:
        """The options of a step whose context has at most so many tokens: whether it attends sparsely is settled."""
        limit = DENSE_BELOW.get(self.kernels, 0) if self.dense_below is None else self.dense_below
        dense = self.attention == "dense" or (tokens <= limit and not self.intermediates)
        return dataclasses.replace(self, attention="dense" if dense else "sparse", dense_below=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a step's new tokens stand: at `start` to `start + count - 1` of their sequences (int32 `[b]` each)."""

    page_table: jax.Array
    start: jax.Array
    count: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionIntermediates:
    """What an attention layer computed on the way.

    Attributes:
      query: `[b, t, n, d]`, after norm and rope.
      lse: float32 `[b, t, n]`, log-sum-exp of the scaled dot products.
      index_scores: float32 `[b, t, s]`, -inf after the query; None when dense.
      selected: int32 `[b, t, top_k]`, -1 where there are fewer; None when dense.
    """

    query: jax.Array
    lse: jax.Array
    index_scores: jax.Array | None
    selected: jax.Array | None


class Attention(nnx.Module):
    """The projections of a decoder layer's attention."""

    def __init__(self, config: KeyeConfig, *, rngs: nnx.Rngs):
        dtype = config.jax_dtype
        hidden, head = {"embed": config.hidden_size}, {"head_dim": config.head_dim}
        heads = {"heads": config.num_attention_heads} | head
        kv_heads = {"kv_heads": config.num_key_value_heads} | head
        self.top_k = config.sa_config.topk
        self.scale = config.head_dim**-0.5
        self.q_proj = Linear(hidden, heads, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(hidden, kv_heads, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(hidden, kv_heads, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(heads, hidden, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, axis="head_dim", dtype=dtype)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, axis="head_dim", dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        indexer: Indexer,
        angles: jax.Array,
        index_angles: jax.Array,
        cache: LayerCache,
        placement: Placement,
        options: AttentionOptions,
    ) -> tuple[jax.Array, LayerCache, AttentionIntermediates | None]:
        """Attends from new tokens to the cache and themselves.

        Args:
          x: `[b, t, embed]`, the normed layer input.
          angles, index_angles: float32 rotary angles `[b, t, head_dim / 2]`, `[b, t, indexer_head_dim / 2]`.
          cache: what the layer holds of earlier tokens.

        Returns:
          `[b, t, embed]`, the cache with the new tokens, and intermediates if asked for.
        """
        q = apply_rope(self.q_norm(self.q_proj(x)), angles)
        k = apply_rope(self.k_norm(self.k_proj(x)), angles)
        with jax.named_scope("indexer"):
            index_q, gates, index_keys, index_scales = indexer(x, index_angles, dtype=options.indexer_dtype)
        cache = cache.append(
            placement.page_table, placement.start, placement.count, k, self.v_proj(x), index_keys, index_scales
        )
        if options.attention == "dense":
            with jax.named_scope("attention"):
                out, lse = paged_flash_attention(
                    q,
                    cache.kv,
                    placement.page_table,
                    placement.start,
                    scale=self.scale,
                    implementation=options.implementation,
                )
            found = AttentionIntermediates(q, lse, None, None)
        else:
            found, out = attend_sparse(
                q,
                index_q,
                gates,
                cache,
                placement,
                top_k=self.top_k,
                scale=self.scale,
                index_scale=indexer.scale,
                options=options,
            )
        return self.o_proj(out), cache, found if options.intermediates else None


def attend_sparse(
    q: jax.Array,
    index_q: jax.Array,
    gates: jax.Array,
    cache: LayerCache,
    placement: Placement,
    *,
    top_k: int,
    scale: float,
    index_scale: float,
    options: AttentionOptions,
) -> tuple[AttentionIntermediates | None, jax.Array]:
    """Scores, selects and attends, a block of queries at a time.

    Memory: the scores of one block of queries, the smaller the longer the context; never those of all queries.

    Args:
      q: `[b, t, n, d]` queries.
      index_q, gates: index queries `[b, t, ni, di]` and their gates float32 `[b, t, ni]`, times float8 queries' scales.
      cache: holds the keys of the whole context, the new tokens' included.

    Returns:
      intermediates if asked for, and the attention output `[b, t, n, d]`.
    """
    table, kwargs = placement.page_table, {"implementation": options.implementation}

    def attend(
        q: jax.Array, index_q: jax.Array, gates: jax.Array, offset: jax.Array | int
    ) -> tuple[AttentionIntermediates, jax.Array]:
        start = placement.start + offset
        with jax.named_scope("indexer"):
            scores = indexer_scores(
                index_q,
                gates,
                cache.index_keys,
                table,
                start,
                scale=index_scale,
                key_scales=cache.index_scales,
                fill=options.intermediates,
                **kwargs,
            )
        lengths = jnp.minimum(start[:, None] + jnp.arange(q.shape[1]) + 1, scores.shape[-1])
        with jax.named_scope("attention"):
            out, lse = topk_attention(q, scores, lengths, cache.kv, table, top_k=top_k, scale=scale, **kwargs)
        selected = select_topk(scores, lengths, top_k, **kwargs) if options.intermediates else None
        return AttentionIntermediates(q, lse, scores, selected), out

    batch, queries = q.shape[:2]
    score_bytes = _SCORE_BYTES.get(options.kernels, _FEW_SCORE_BYTES)
    block = max(1, score_bytes // (4 * batch * table.shape[1] * PAGE_SIZE))
    if options.intermediates or queries <= block:
        return attend(q, index_q, gates, 0)

    blocks = math.ceil(queries / block)
    block = math.ceil(queries / blocks)
    padding = ((0, 0), (0, blocks * block - queries))
    q, index_q, gates = (jnp.pad(x, padding + ((0, 0),) * (x.ndim - 2)) for x in (q, index_q, gates))

    def attend_block(i: jax.Array, out: jax.Array) -> jax.Array:
        """Overwrites a block's queries with what they attended to."""
        first = i * block
        q, *index = (jax.lax.dynamic_slice_in_dim(x, first, block, axis=1) for x in (out, index_q, gates))
        return jax.lax.dynamic_update_slice_in_dim(out, attend(q, *index, offset=first)[1], first, axis=1)

    # In place: the program of a step would hold an output buffer of zeros for every layer from its beginning.
    return None, jax.lax.fori_loop(0, blocks, attend_block, q)[:, :queries]
