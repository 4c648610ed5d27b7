"""Grouped-query attention over the cache: sparse through the indexer's selection, or dense."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.cache import PAGE_SIZE, LayerCache
from keye_jax.config import KeyeConfig
from keye_jax.model.indexer import Indexer
from keye_jax.model.layers import Linear, RMSNorm
from keye_jax.model.parallel import Parallel
from keye_jax.model.rope import apply_rope
from keye_jax.model.sequence_parallel import Attended, Projected, decode_step, read_chunk
from pallas_kernels.dispatch import available
from pallas_kernels.flash_attention import paged_flash_attention
from pallas_kernels.indexer_scores import indexer_scores
from pallas_kernels.select_topk import select_topk
from pallas_kernels.topk_attention import topk_attention

_SCORE_BYTES = {"mosaic_gpu": 2**30, "mosaic_tpu": 2**31}
_FEW_SCORE_BYTES = 64 * 2**20
"""What the scores of one block of queries may take: at 128K tokens those of 2,048, enough to fill a GPU, or of 128.

On TPUs 2,048 queries at 256K tokens are one block: v5e's compiler aborts on the loop over two of 1,024.
"""

_DENSE_BYTES = 2**30
"""What copies of the contexts of several sequences, read densely at once, may take."""

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

    def for_context(self, tokens: int, *, split: bool = False) -> AttentionOptions:
        """The options of a step whose context has at most so many tokens: whether it attends sparsely is settled.

        Args:
          split: whether devices have stripes of its queries. Each stripe would attend densely to a copy of all keys of
            its own, which `DENSE_BELOW` does not count: only the option "dense" is dense then.
        """
        limit = DENSE_BELOW.get(self.kernels, 0) if self.dense_below is None else self.dense_below
        dense = self.attention == "dense" or (tokens <= limit and not split and not self.intermediates)
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
        parallel: Parallel | None = None,
    ) -> tuple[jax.Array, LayerCache, AttentionIntermediates | None]:
        """Attends from new tokens to the cache and themselves.

        Args:
          x: `[b, t, embed]`, the normed layer input.
          angles, index_angles: float32 rotary angles `[b, t, head_dim / 2]`, `[b, t, indexer_head_dim / 2]`.
          cache: what the layer holds of earlier tokens.
          parallel: how the arrays lie over devices; None for one device.

        Returns:
          `[b, t, embed]`, the cache with the new tokens, and intermediates if asked for.
        """
        q = apply_rope(self.q_norm(self.q_proj(x)), angles)
        k = apply_rope(self.k_norm(self.k_proj(x)), angles)
        with jax.named_scope("indexer"):
            index_q, gates, index_keys, index_scales = indexer(x, index_angles, dtype=options.indexer_dtype)
        new = Projected(q, k, self.v_proj(x), index_q, gates, index_keys, index_scales)
        sparse, where = options.attention == "sparse", (placement.page_table, placement.start)
        attend = functools.partial(
            attend_sparse if sparse else attend_dense,
            top_k=self.top_k,
            scale=self.scale,
            index_scale=indexer.scale,
            options=options,
        )
        if parallel is None:
            cache = cache.append(*where, placement.count, new.kv, index_keys, index_scales)
            found = attend(q, index_q, gates, cache, *where)
        elif x.shape[1] == 1:
            found, cache = decode_step(
                new,
                cache,
                *where,
                placement.count,
                top_k=self.top_k if sparse else None,
                scale=self.scale,
                index_scale=indexer.scale,
                implementation=options.implementation,
                parallel=parallel,
                intermediates=options.intermediates,
            )
        else:
            found, cache = read_chunk(
                attend,
                new,
                cache,
                *where,
                placement.count,
                parallel=parallel,
                intermediates=options.intermediates and sparse,
            )
        intermediates = AttentionIntermediates(q, found.lse, found.index_scores, found.selected)
        return self.o_proj(found.out), cache, intermediates if options.intermediates else None


def attend_dense(
    q: jax.Array,
    index_q: jax.Array,
    gates: jax.Array,
    cache: LayerCache,
    page_table: jax.Array,
    start: jax.Array,
    *,
    scale: float,
    options: AttentionOptions,
    **sparse: float,
) -> Attended:
    """Attends to all that each query sees. Takes what `attend_sparse` does; the indexer's arguments are not used."""
    del index_q, gates, sparse

    def attend(q: jax.Array, table: jax.Array, start: jax.Array) -> Attended:
        with jax.named_scope("attention"):
            return Attended(
                *paged_flash_attention(q, cache.kv, table, start, scale=scale, implementation=options.implementation)
            )

    row_bytes = math.prod(cache.kv.shape[2:]) * cache.kv.dtype.itemsize
    at_once = _DENSE_BYTES // (page_table.shape[1] * PAGE_SIZE * row_bytes) if q.shape[1] > 1 else len(q)
    return _in_turns(attend, max(1, at_once), q, page_table, start)


def attend_sparse(
    q: jax.Array,
    index_q: jax.Array,
    gates: jax.Array,
    cache: LayerCache,
    page_table: jax.Array,
    start: jax.Array,
    *,
    top_k: int,
    scale: float,
    index_scale: float,
    options: AttentionOptions,
) -> Attended:
    """Scores, selects and attends, a block of queries at a time.

    Memory: the scores of one block of queries, the smaller the longer the context; never those of all queries.

    Args:
      q: `[b, t, n, d]` queries.
      index_q, gates: index queries `[b, t, ni, di]` and their gates float32 `[b, t, ni]`, times float8 queries' scales.
      cache: holds the keys of the whole context, the new tokens' included.
      page_table: int32 `[b, m]`.
      start: int32 `[b]`, position of each sequence's first query.

    Returns:
      the attention output, and scores and selection if the options ask for intermediates.
    """
    kwargs = {"implementation": options.implementation}

    def attend(q: jax.Array, index_q: jax.Array, gates: jax.Array, table: jax.Array, start: jax.Array) -> Attended:
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
        if not options.intermediates:
            return Attended(out, lse)
        return Attended(out, lse, scores, select_topk(scores, lengths, top_k, **kwargs))

    batch, queries = q.shape[:2]
    score_bytes = _SCORE_BYTES.get(options.kernels, _FEW_SCORE_BYTES)
    at_once = max(1, score_bytes // (4 * page_table.shape[1] * PAGE_SIZE))
    if options.intermediates or batch * queries <= at_once:
        return attend(q, index_q, gates, page_table, start)
    if batch > 1 and queries <= at_once:
        return _in_turns(attend, at_once // queries, q, index_q, gates, page_table, start)

    blocks = math.ceil(queries / max(1, at_once // batch))
    block = math.ceil(queries / blocks)
    padding = ((0, 0), (0, blocks * block - queries))
    q, index_q, gates = (jnp.pad(x, padding + ((0, 0),) * (x.ndim - 2)) for x in (q, index_q, gates))

    def attend_block(i: jax.Array, done: Attended) -> Attended:
        first = i * block
        part_q, part_index_q, part_gates = (_part(x, first, block, 1) for x in (done.out, index_q, gates))
        return _overwrite(done, attend(part_q, part_index_q, part_gates, page_table, start + first), first, 1)

    done = jax.lax.fori_loop(0, blocks, attend_block, _begun(q))
    return Attended(done.out[:, :queries], done.lse[:, :queries])


def _in_turns(attend: Callable[..., Attended], at_once: int, q: jax.Array, *others: jax.Array) -> Attended:
    """`attend` on at most so many sequences, the first dimension of all arguments, at a time."""
    batch = len(q)
    if batch <= at_once:
        return attend(q, *others)
    at_once = next(count for count in range(at_once, 0, -1) if batch % count == 0)

    def turn(i: jax.Array, done: Attended) -> Attended:
        first = i * at_once
        return _overwrite(done, attend(*(_part(x, first, at_once, 0) for x in (done.out, *others))), first, 0)

    return jax.lax.fori_loop(0, batch // at_once, turn, _begun(q))


# In place of queries: the program of a step would hold output buffers of zeros for every layer from its beginning.


def _begun(q: jax.Array) -> Attended:
    return Attended(q, q[..., 0].astype(jnp.float32))


def _part(x: jax.Array, first: jax.Array, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis)


def _overwrite(done: Attended, part: Attended, first: jax.Array, axis: int) -> Attended:
    """`done` with a part of its queries overwritten with what they attended to."""
    out, lse = (
        jax.lax.dynamic_update_slice_in_dim(old, new, first, axis)
        for old, new in ((done.out, part.out), (done.lse, part.lse))
    )
    return Attended(out, lse)
