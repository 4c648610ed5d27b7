"""Selection among keys that several devices hold, each of them every n-th page of a sequence.

Each device scores its own positions. All exchange the scores, or of many scores the best, and each gets those positions
of the exact selection that it has.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from keye_jax.kv_cache import PAGE_SIZE
from keye_jax.sharding.collectives import Axes, all_gather, as_words, from_words, rank
from pallas_kernels.dispatch import resolve
from pallas_kernels.select_topk import select_topk

_EXCHANGED_BYTES = 2 * 2**20
"""Most bytes of the scores of all devices that are exchanged whole.

Above it each device offers its best, whose number does not grow with the context. That takes two more selections in
each layer, one after the other.
"""


def select_split(scores: jax.Array, lengths: jax.Array, top_k: int, axes: Axes, preferred: str | None) -> jax.Array:
    """`select_topk` among the positions of all devices along `axes`, which hold a sequence's pages in turns.

    What travels: all scores if they are few, or scores and positions of `top_k` candidates of each device.

    Args:
      scores: float32 `[b, 1, s]`, of this device's positions.
      lengths: int32 `[b, 1]`, how many of them each query sees.
      preferred: implementation, as in `AttentionOptions`.

    Returns:
      int32 `[b, 1, top_k]`, those of this device's positions that are selected, -1 in the places of others'.
    """
    implementation = resolve("select_topk", preferred)
    if 4 * scores.size * _devices(axes) <= _EXCHANGED_BYTES:
        return _select_among_all(scores, lengths, top_k, axes, implementation)
    return _select_among_best(scores, lengths, top_k, axes, implementation)


def _select_among_all(
    scores: jax.Array, lengths: jax.Array, top_k: int, axes: Axes, implementation: str | None
) -> jax.Array:
    """`select_split` that selects among the scores of all devices."""
    # What no query sees stands behind all that is seen, so it is selected only where there is too little of that.
    scores = scores_of_all(jnp.where(jnp.arange(scores.shape[-1]) < lengths[..., None], scores, -jnp.inf), axes)
    selected = select_topk(scores, jnp.full_like(lengths, scores.shape[-1]), top_k, implementation=implementation)
    page, offset = jnp.divmod(selected, PAGE_SIZE)
    turn, device = jnp.divmod(page, _devices(axes))
    position = turn * PAGE_SIZE + offset
    own = (selected >= 0) & (device == rank(axes)) & (position < lengths[..., None])
    return jnp.where(own, position, -1)


def _select_among_best(
    scores: jax.Array, lengths: jax.Array, top_k: int, axes: Axes, implementation: str | None
) -> jax.Array:
    """`select_split` that selects among the best of each device, which is exact too."""
    each = min(top_k, scores.shape[-1])
    candidates = select_topk(scores, lengths, each, implementation=implementation)
    best = jnp.take_along_axis(scores, jnp.maximum(candidates, 0), axis=2)
    best = jnp.where(candidates >= 0, best, -jnp.inf)
    offered = jnp.stack([as_words(best[..., None]), as_words(position_of_all(candidates, axes)[..., None])], axis=-1)
    offered = all_gather(offered[..., 0, :], axes, axis=2)
    best, position = from_words(offered[..., :1], jnp.float32)[..., 0], from_words(offered[..., 1:], jnp.int32)[..., 0]
    all_of_them = jnp.full(best.shape[:2], best.shape[2])
    chosen = select_topk(best, all_of_them, top_k, implementation=implementation)
    lowest = jnp.where(chosen >= 0, jnp.take_along_axis(best, jnp.maximum(chosen, 0), axis=2), jnp.inf).min(axis=2)
    # Candidates are not in the order of their positions, so ties for the last places are decided by position here.
    # Positions are exact in float32 up to 2^24. Places without a candidate come last.
    tie = jnp.where((best == lowest[..., None]) & (best > -jnp.inf), -position.astype(jnp.float32), -jnp.inf)
    order = jnp.where(best > lowest[..., None], 1.0, tie)
    chosen = select_topk(order, all_of_them, top_k, implementation=implementation)
    own = chosen - rank(axes) * each
    selected = jnp.take_along_axis(candidates, jnp.clip(own, 0, each - 1), axis=2)
    return jnp.where((chosen >= 0) & (own >= 0) & (own < each), selected, -1)


def position_of_all(position: jax.Array, axes: Axes) -> jax.Array:
    """Positions in their sequence from those among the pages of this device, which has every n-th page."""
    page, offset = jnp.divmod(position, PAGE_SIZE)
    return (page * _devices(axes) + rank(axes)) * PAGE_SIZE + offset


def scores_of_all(scores: jax.Array, axes: Axes) -> jax.Array:
    """Scores `[b, t, s]` of the pages of this device to those of all, `[b, t, devices * s]`."""
    pages = scores.reshape(*scores.shape[:2], -1, 1, PAGE_SIZE)
    return all_gather(pages, axes, axis=3).reshape(*scores.shape[:2], -1)


def positions_of_all(selected: jax.Array, axes: Axes) -> jax.Array:
    """The selected positions of all devices, int32 `[b, t, top_k]`, in ascending order, then -1."""
    if not axes:
        return selected
    nowhere, top_k = jnp.iinfo(jnp.int32).max, selected.shape[2]
    positions = jnp.where(selected >= 0, position_of_all(selected, axes), nowhere)
    positions = jnp.sort(all_gather(positions, axes, axis=2), axis=2)[..., :top_k]
    return jnp.where(positions < nowhere, positions, -1)


def _devices(axes: Axes) -> int:
    return jax.lax.axis_size(axes) if axes else 1
