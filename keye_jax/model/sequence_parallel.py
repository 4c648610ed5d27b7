"""Attention over a cache whose positions, heads and sequences lie on different devices.

A prompt: each device takes stripes of the chunk's queries (`Parallel.token_order`), and for the time of a layer it has
the keys of the whole context. Decoding: each device scores and selects among its own positions, all exchange the scores
of what they selected, and each attends to those of the exact selection that it has; parts are combined by their
log-sum-exps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from keye_jax.cache import PAGE_SIZE, LayerCache
from keye_jax.model.parallel import Parallel, all_gather, as_words, from_words, rank, spec
from pallas_kernels.flash_attention import paged_flash_attention
from pallas_kernels.indexer_scores import indexer_scores
from pallas_kernels.select_topk import select_topk
from pallas_kernels.sparse_attention import sparse_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projected:
    """What a layer computes from its new tokens.

    Attributes:
      q: `[b, t, n, d]`.
      k, v: `[b, t, kv_heads, d]`.
      index_q, gates: index queries `[b, t, ni, di]`, and their gates float32 `[b, t, ni]`.
      index_keys: `[b, t, di]`.
      index_scales: float32 `[b, t]`, factors on float8 index keys, or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    index_q: jax.Array
    gates: jax.Array
    index_keys: jax.Array
    index_scales: jax.Array | None

    @property
    def kv(self) -> jax.Array:
        """Rows as the cache keeps them, `[b, t, 2 * kv_heads, d]`."""
        return jnp.concatenate([self.k, self.v], axis=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attended:
    """What attention gives.

    Attributes:
      out: `[b, t, n, d]`.
      lse: float32 `[b, t, n]`, log-sum-exp of the scaled dot products.
      index_scores: float32 `[b, t, s]`, or None if not asked for.
      selected: int32 `[b, t, top_k]`, or None if not asked for.
    """

    out: jax.Array
    lse: jax.Array
    index_scores: jax.Array | None = None
    selected: jax.Array | None = None


type Attend = Callable[[jax.Array, jax.Array, jax.Array, LayerCache, jax.Array, jax.Array], Attended]
"""`(q, index_q, gates, cache, page_table, start)`, on one device: attention to all of a cache."""


def read_chunk(
    attend: Attend,
    new: Projected,
    cache: LayerCache,
    page_table: jax.Array,
    start: jax.Array,
    count: jax.Array,
    *,
    parallel: Parallel,
    intermediates: bool,
) -> tuple[Attended, LayerCache]:
    """Writes a chunk's keys and values, and attends from its queries.

    Memory: keys, values and index keys of the layer's whole context on each device, for the time of the layer.

    Args:
      attend: what a device does with its queries, of several sequences with starts of their own.
      new: tokens in `Parallel.token_order`.
      page_table: int32 `[b, m]`.
      start, count: int32 `[b]`; the chunk stands at `start` to `start + count - 1`.
      intermediates: whether all of `Attended` is wanted.

    Returns:
      what it gives, in the same order, and the cache.
    """
    p = parallel
    ranks = p.size(p.query_sequence)

    def body(
        new: Projected, cache: LayerCache, table: jax.Array, start: jax.Array, count: jax.Array
    ) -> tuple[Attended, LayerCache]:
        rows = new.kv, new.index_keys, new.index_scales
        rows = jax.tree.map(lambda x: all_gather(x, p.query_sequence, axis=1), rows)
        order = p.token_order(new.q.shape[1] * ranks)
        # The context before the chunk is gathered, not after: that can begin while the chunk's keys are computed.
        whole = jax.tree.map(lambda x: all_gather(x, p.cache_sequence, axis=0), cache)
        here, own_start = _own_part(table, start, p)
        cache = cache.append(here, own_start, count, *rows, order=order)
        table = table - rank(p.batch) * whole.kv.shape[0]
        whole = whole.append(table, start, count, *rows, order=order) if p.cache_sequence else cache

        batch, tokens = new.q.shape[:2]
        stripe = p.stripe(tokens * ranks)
        stripes = tokens // stripe

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(batch * stripes, stripe, *x.shape[2:])

        offsets = (jnp.arange(stripes) * ranks + rank(p.query_sequence)) * stripe
        # A stripe behind the chunk's end costs least at the beginning, where it sees little.
        starts = jnp.where(offsets < count[:, None], start[:, None] + offsets, 0).reshape(-1)
        tables = jnp.repeat(table, stripes, axis=0)
        found = attend(split(new.q), split(new.index_q), split(new.gates), whole, tables, starts)
        return jax.tree.map(lambda x: x.reshape(batch, tokens, *x.shape[2:]), found), cache

    call = p.shard_map(
        body,
        (_new_specs(new, p), cache.specs(p), spec(p.batch), spec(p.batch), spec(p.batch)),
        (_attended_specs(p, intermediates), cache.specs(p)),
    )
    return call(new, cache, page_table, start, count)


def decode_step(
    new: Projected,
    cache: LayerCache,
    page_table: jax.Array,
    start: jax.Array,
    count: jax.Array,
    *,
    top_k: int | None,
    scale: float,
    index_scale: float,
    implementation: str | None,
    parallel: Parallel,
    intermediates: bool,
) -> tuple[Attended, LayerCache]:
    """Writes one token of each sequence, and attends from it.

    What travels, for each sequence: the scores of `top_k` candidates of each part of the cache, and each part's output
    and log-sum-exps.

    Args:
      top_k: how many positions to attend to, or None for all.
      others: as `read_chunk`'s.
    """
    p = parallel
    kwargs: dict[str, Any] = {"implementation": implementation}

    def body(
        new: Projected, cache: LayerCache, table: jax.Array, start: jax.Array, count: jax.Array
    ) -> tuple[Attended, LayerCache]:
        here, own_start = _own_part(table, start, p)
        cache = cache.append(here, own_start, count, new.kv, new.index_keys, new.index_scales)
        size = here.shape[1] * PAGE_SIZE
        visible = jnp.clip(own_start + 1, 0, size)
        if top_k is None:
            with jax.named_scope("attention"):
                out, lse = paged_flash_attention(new.q, cache.kv, here, visible - 1, scale=scale, **kwargs)
                return Attended(*_merge(out, lse, p)), cache
        with jax.named_scope("indexer"):
            # A part that the sequence has not reached is scored as if it held one token, which is not looked at.
            last = jnp.maximum(visible - 1, 0)
            scores = indexer_scores(
                new.index_q,
                new.gates,
                cache.index_keys,
                here,
                last,
                scale=index_scale,
                key_scales=cache.index_scales,
                **kwargs,
            )
        with jax.named_scope("selection"):
            candidates = select_topk(scores, visible[:, None], min(top_k, size), **kwargs)
            selected = _exact_selection(scores, candidates, top_k, implementation, p)
        with jax.named_scope("attention"):
            out, lse = sparse_attention(new.q, cache.kv, selected, here, scale=scale, **kwargs)
            found = Attended(*_merge(out, lse, p))
        if intermediates:
            scores = jnp.where(jnp.arange(size) < visible[:, None, None], scores, -jnp.inf)
            found = dataclasses.replace(
                found,
                index_scores=all_gather(scores, p.cache_sequence, axis=2),
                selected=_positions_of_all(selected, top_k, size, p),
            )
        return found, cache

    call = p.shard_map(
        body,
        (_new_specs(new, p), cache.specs(p), spec(p.batch), spec(p.batch), spec(p.batch)),
        (_attended_specs(p, intermediates and top_k is not None), cache.specs(p)),
    )
    return call(new, cache, page_table, start, count)


def _own_part(table: jax.Array, start: jax.Array, parallel: Parallel) -> tuple[jax.Array, jax.Array]:
    """The page table of this device's positions in its own pages, and where the new tokens stand among them."""
    number, parts = rank(parallel.cache_sequence), parallel.size(parallel.cache_sequence)
    pages = table.shape[1] // parts
    here = jax.lax.dynamic_slice_in_dim(table, number * pages, pages, axis=1)
    first_page = rank(parallel.pages) * table.shape[0] * pages
    return here - first_page, start - number * pages * PAGE_SIZE


def _exact_selection(
    scores: jax.Array, candidates: jax.Array, top_k: int, implementation: str | None, parallel: Parallel
) -> jax.Array:
    """Which of this device's candidates are among the `top_k` best of all devices', int32 `[b, 1, top_k]`; -1: others'.

    Candidates are in the order of their positions, on each device and from one to the next. So selecting among them
    decides ties as selecting among all positions does.

    Args:
      scores: float32 `[b, 1, s]`, of this device's positions.
      candidates: int32 `[b, 1, c]`, its best positions in ascending order, then -1.
    """
    axes = parallel.cache_sequence
    if not axes:
        return candidates
    best = jnp.take_along_axis(scores, jnp.maximum(candidates, 0), axis=2)
    best = all_gather(jnp.where(candidates >= 0, best, -jnp.inf), axes, axis=2)
    chosen = select_topk(best, jnp.full(best.shape[:2], best.shape[2]), top_k, implementation=implementation)
    each = candidates.shape[2]
    own = chosen - rank(axes) * each
    position = jnp.take_along_axis(candidates, jnp.clip(own, 0, each - 1), axis=2)
    return jnp.where((chosen >= 0) & (own >= 0) & (own < each), position, -1)


def _positions_of_all(selected: jax.Array, top_k: int, size: int, parallel: Parallel) -> jax.Array:
    """The selected positions of all devices, int32 `[b, 1, top_k]`, in ascending order, then -1."""
    positions = jnp.where(selected >= 0, selected + rank(parallel.cache_sequence) * size, jnp.iinfo(jnp.int32).max)
    positions = jnp.sort(all_gather(positions, parallel.cache_sequence, axis=2), axis=2)[..., :top_k]
    positions = jnp.where(positions < jnp.iinfo(jnp.int32).max, positions, -1)
    return jnp.pad(positions, ((0, 0), (0, 0), (0, top_k - positions.shape[2])), constant_values=-1)


def _merge(out: jax.Array, lse: jax.Array, parallel: Parallel) -> tuple[jax.Array, jax.Array]:
    """Attention to the keys of all devices from that to each one's, in float32; one with no key has an lse of -inf."""
    axes = parallel.cache_sequence
    if not axes:
        return out, lse
    words = jnp.concatenate([as_words(out), as_words(lse[..., None])], axis=-1)
    words = all_gather(words[None], axes, axis=0)
    outs, lses = from_words(words[..., :-1], out.dtype), from_words(words[..., -1:], lse.dtype)[..., 0]
    total = jax.nn.logsumexp(lses, axis=0)
    weights = jnp.exp(lses - jnp.where(jnp.isfinite(total), total, 0.0))
    return jnp.sum(weights[..., None] * outs.astype(jnp.float32), axis=0).astype(out.dtype), total


def _new_specs(new: Projected, parallel: Parallel) -> Any:
    """Partitions in place of the arrays of a `Projected`."""
    tokens = (parallel.batch, parallel.query_sequence)
    of_tokens = jax.tree.map(lambda _: spec(*tokens), new)
    q: Any = spec(*tokens, parallel.heads)
    kv: Any = spec(*tokens, parallel.kv_heads)
    return dataclasses.replace(of_tokens, q=q, k=kv, v=kv)


def _attended_specs(parallel: Parallel, intermediates: bool) -> Any:
    """Partitions in place of the arrays of an `Attended`."""
    tokens = (parallel.batch, parallel.query_sequence)
    by_head: Any = spec(*tokens, parallel.heads)
    found: Any = spec(*tokens) if intermediates else None
    return Attended(by_head, by_head, found, found)
