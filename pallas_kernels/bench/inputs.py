"""Random inputs at the released model's sizes. Everything here can be jitted, and runs on the device.

The released model: 32 query heads on 4 key/value heads of 128, an indexer of 16 heads of 64, top_k 2048, 128 experts of
2048 x 768, 8 a token; bfloat16 in, float32 accumulation.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

PAGE_SIZE = 64
TOP_K = 2048
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
INDEX_HEADS, INDEX_DIM = 16, 64
INDEX_SCALE, SCALE = INDEX_DIM**-0.5, HEAD_DIM**-0.5
EXPERTS, EXPERTS_PER_TOKEN, HIDDEN, EXPERT_HIDDEN = 128, 8, 2048, 768
VISION_HEADS, VISION_DIM = 16, 72

NEIGHBOURS = 16
CLUSTERED = 8192
"""Clustered selections: 16 neighbouring queries select so many keys together, as in the released model at 128K."""
UNRELATED = 1 << 30
"""Instead of `CLUSTERED`: queries share what they share by chance."""

_TILE_ELEMENTS = 1 << 28
_BISECTIONS = 10


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Random numbers; of very large arrays a part, which is then repeated along the first axis."""
    per_row = math.prod(shape[1:])
    rows = min(shape[0], max(1, _TILE_ELEMENTS // per_row))
    part = jax.random.normal(jax.random.key(seed), (rows, *shape[1:]), dtype)
    return jnp.tile(part, (-(-shape[0] // rows),) + (1,) * (len(shape) - 1))[: shape[0]]


def page_table(batch: int, context: int) -> jax.Array:
    """int32 `[batch, context / PAGE_SIZE]`: all pages, in random order."""
    pages = batch * context // PAGE_SIZE
    return jax.random.permutation(jax.random.key(9), pages).astype(jnp.int32).reshape(batch, -1)


def pages(seed: int, batch: int, context: int, *row: int) -> jax.Array:
    """A pool `[batch * context / PAGE_SIZE, PAGE_SIZE, *row]`."""
    return normal(seed, batch * context // PAGE_SIZE, PAGE_SIZE, *row)


def index_queries(queries: int, keys: jax.Array, seen: jax.Array, union: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index queries and gates of one sequence of which `NEIGHBOURS` neighbours select about `union` keys together.

    Each is a mixture of what its group has in common and of its own noise; how much of either is found by bisection.

    Args:
      queries: how many, a multiple of `NEIGHBOURS`.
      keys: `[s, INDEX_DIM]` index keys, in the order of their positions.
      seen: how many of the keys are seen.
      union: size of the union; `UNRELATED` for queries with nothing in common.

    Returns:
      `[1, queries, INDEX_HEADS, INDEX_DIM]` and float32 `[1, queries, INDEX_HEADS]`.
    """
    groups = queries // NEIGHBOURS
    common = normal(3, groups, 1, INDEX_HEADS, INDEX_DIM + 1, dtype=jnp.float32)
    noise = normal(4, groups, NEIGHBOURS, INDEX_HEADS, INDEX_DIM + 1, dtype=jnp.float32)

    def mix(common: jax.Array, noise: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed = jnp.sqrt(1 - share**2) * common + share * noise
        return mixed[..., :INDEX_DIM].astype(jnp.bfloat16), mixed[..., INDEX_DIM]

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        small = union_size(*mix(common[0], noise[0], middle), keys, jnp.full(NEIGHBOURS, seen)) < union
        return jnp.where(small, middle, low), jnp.where(small, high, middle)

    share, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.float32(0), jnp.float32(1)))
    share = jnp.where(union >= UNRELATED, 1.0, share)
    q, gates = mix(common, noise, share)
    return q.reshape(1, queries, INDEX_HEADS, INDEX_DIM), gates.reshape(1, queries, INDEX_HEADS)


def union_size(q: jax.Array, gates: jax.Array, keys: jax.Array, lengths: jax.Array) -> jax.Array:
    """How many of keys `[s, d]` are selected by at least one of queries q `[t, n, d]`; query t sees `lengths[t]`."""
    dots = jnp.einsum("tnd,sd->tns", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.einsum("tns,tn->ts", jax.nn.relu(dots), gates)
    seen = jnp.arange(len(keys)) < lengths[:, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    threshold = jax.lax.top_k(scores, min(TOP_K, len(keys)))[0][:, -1:]
    return jnp.sum(jnp.any(seen & (scores >= threshold), axis=0))


def spread_positions(batch: int, context: int) -> jax.Array:
    """Selected positions of one query a sequence, int32 `[batch, 1, TOP_K]`: one in each of TOP_K equal stretches."""
    stretch = context // TOP_K
    inside = jax.random.randint(jax.random.key(5), (batch, 1, TOP_K), 0, stretch)
    return (jnp.arange(TOP_K) * stretch + inside).astype(jnp.int32)
