"""Random inputs at the released model's sizes (`pallas_kernels.shapes`). All functions can be jitted."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.shapes import KEYE_VL_2 as MODEL
from pallas_kernels.shapes import PAGE_SIZE

NEIGHBOURS = 16
"""Neighbouring queries whose selections are counted together."""
CLUSTERED = 8192
"""Clustered selections: the number of keys that 16 neighbours select together, as in the released model at 128K."""
UNRELATED = 1 << 30
"""In place of a number of keys: queries are independent, and share keys only by chance."""

_TILE_ELEMENTS = 1 << 28
_BISECTIONS = 10


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Normal random numbers. In a very large array, a random part is repeated along the first axis."""
    per_row = math.prod(shape[1:])
    rows = min(shape[0], max(1, _TILE_ELEMENTS // per_row))
    part = jax.random.normal(jax.random.key(seed), (rows, *shape[1:]), dtype)
    return jnp.tile(part, (-(-shape[0] // rows),) + (1,) * (len(shape) - 1))[: shape[0]]


def quantized(
    seed: int, kind: str, rows: int | None, columns: int, inputs: int, outputs: int
) -> tuple[jax.Array, jax.Array]:
    """Values and scales of one matrix for each expert; see `QuantizedMatrices`.

    Args:
      kind: "fp8", "int8" or "int4".
      rows, columns: inputs and outputs that share a scale; None for all inputs.
      inputs, outputs: of a matrix.
    """
    if kind == "fp8":
        values = (normal(seed, MODEL.experts, inputs, outputs) * 64).astype(jnp.float8_e4m3fn)
    elif kind == "int8":
        values = (normal(seed, MODEL.experts, inputs, outputs) * 40).astype(jnp.int8)
    else:
        values = jax.random.bits(jax.random.key(seed), (MODEL.experts, inputs // 2, outputs), jnp.uint8)
    grid = MODEL.experts, inputs // (rows or inputs), outputs // columns
    scales = jax.random.uniform(jax.random.key(seed + 1), grid, minval=0.5, maxval=2.0) * inputs**-0.5 / 64
    return values, scales.astype(jnp.float32 if kind == "fp8" else jnp.bfloat16)


def page_table(batch: int, context: int) -> jax.Array:
    """int32 `[batch, context / PAGE_SIZE]`: all page numbers, in random order."""
    pages = batch * context // PAGE_SIZE
    return jax.random.permutation(jax.random.key(9), pages).astype(jnp.int32).reshape(batch, -1)


def pages(seed: int, batch: int, context: int, *row: int) -> jax.Array:
    """Random pages `[batch * context / PAGE_SIZE, PAGE_SIZE, *row]`."""
    return normal(seed, batch * context // PAGE_SIZE, PAGE_SIZE, *row)


def index_queries(queries: int, keys: jax.Array, seen: jax.Array, union: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index queries and gates of one sequence whose groups of `NEIGHBOURS` queries select about `union` keys together.

    A query is a mixture of its group's common part and its own noise. Bisection finds the proportion.

    Args:
      queries: number of queries t, a multiple of `NEIGHBOURS`.
      keys: `[s, d]` index keys, in the order of their positions.
      seen: int32 scalar, the number of keys that the queries see.
      union: int32 scalar, size of the union; `UNRELATED` for queries with nothing in common.

    Returns:
      `[1, t, n, d]` queries and float32 `[1, t, n]` gates.
    """
    groups = queries // NEIGHBOURS
    common = normal(3, groups, 1, MODEL.index_heads, MODEL.index_dim + 1, dtype=jnp.float32)
    noise = normal(4, groups, NEIGHBOURS, MODEL.index_heads, MODEL.index_dim + 1, dtype=jnp.float32)

    def mix(common: jax.Array, noise: jax.Array, noise_part: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed = jnp.sqrt(1 - noise_part**2) * common + noise_part * noise
        return mixed[..., : MODEL.index_dim].astype(jnp.bfloat16), mixed[..., MODEL.index_dim]

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        small = union_size(*mix(common[0], noise[0], middle), keys, jnp.full(NEIGHBOURS, seen)) < union
        return jnp.where(small, middle, low), jnp.where(small, high, middle)

    noise_part, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.float32(0), jnp.float32(1)))
    noise_part = jnp.where(union >= UNRELATED, 1.0, noise_part)
    q, gates = mix(common, noise, noise_part)
    return q.reshape(1, queries, MODEL.index_heads, MODEL.index_dim), gates.reshape(1, queries, MODEL.index_heads)


def union_size(q: jax.Array, gates: jax.Array, keys: jax.Array, lengths: jax.Array) -> jax.Array:
    """The number of keys `[s, d]` that at least one of q `[t, n, d]` selects. Query t sees `lengths[t]` keys."""
    dots = jnp.einsum("tnd,sd->tns", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.einsum("tns,tn->ts", jax.nn.relu(dots), gates)
    seen = jnp.arange(len(keys)) < lengths[:, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    threshold = jax.lax.top_k(scores, min(MODEL.top_k, len(keys)))[0][:, -1:]
    return jnp.sum(jnp.any(seen & (scores >= threshold), axis=0))


def spread_positions(batch: int, context: int) -> jax.Array:
    """Selected positions of one query per sequence, int32 `[batch, 1, top_k]`: one in each of top_k equal stretches."""
    stretch = context // MODEL.top_k
    inside = jax.random.randint(jax.random.key(5), (batch, 1, MODEL.top_k), 0, stretch)
    return (jnp.arange(MODEL.top_k) * stretch + inside).astype(jnp.int32)
