"""Attention to a chunk of keys with transposed scores, for the dense and the sparse kernels of TPUs.

Keys lie in sublanes and rows in lanes; a row is one head of one query. So a row's maximum and sum need no exchange of
lanes, and the product of values and weights has as many columns as there are rows, which fills a matrix unit of
256 x 256. With weights times values, the head's 128 elements would fill half of it. A tile's scores are computed while
the tile before it goes through the softmax.

Arrays are references: q `[parts, rows, depth]`, keys `[parts, chunk, depth]`, values `[parts, depth, chunk]`. A part is
`depth / d` key heads, of which a row's query is zero where other heads' keys are. The state of the softmax is float32:
attended `[parts, depth, rows]`, and the largest scores and the totals of weights, `[parts, 1, rows]` each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kernel_call import interpreted
from pallas_kernels.tpu import MASKED, precision

KEYS = 512
"""Keys that are multiplied at once."""


def state_shapes(parts: int, depth: int, rows: int) -> list[Any]:
    """Scratch for the state of the softmax."""
    of_rows = pltpu.VMEM((parts, 1, rows), jnp.float32)
    return [pltpu.VMEM((parts, depth, rows), jnp.float32), of_rows, of_rows]


def score_shapes(chunk: int, tile: int) -> list[Any]:
    """Scratch for the scores of two tiles. The last eight rows hold the largest scores."""
    return [pltpu.VMEM((chunk + 8, tile), jnp.float32)] * 2


def reset(state: tuple[Any, Any, Any]) -> None:
    acc, largest, total = state
    acc[...] = jnp.zeros_like(acc)
    total[...] = jnp.zeros_like(total)
    largest[...] = jnp.full_like(largest, MASKED)


def split(rows: Any, keys: Any, values: Any) -> None:
    """Takes the heads of rows `[chunk, 2 * k, d]` apart, keys before values, and transposes values."""
    kv_heads, dim = rows.shape[1] // 2, rows.shape[2]
    pack = keys.shape[2] // dim
    for first in range(0, 2 * kv_heads, 2):
        for head, found in enumerate(_two_heads(rows, first), first):
            part, place = divmod(head % kv_heads, pack)
            some = slice(place * dim, (place + 1) * dim)
            if head < kv_heads:
                keys[part, :, some] = found
            else:
                values[part, some] = jnp.transpose(found)


def _two_heads(rows: Any, first: int) -> list[jax.Array]:
    """Heads `first` and `first + 1`, `[n, d]` each, of a reference to rows `[n, heads, d]`; `first` is even."""
    # The interpreter cannot read a reference as words.
    if rows.dtype != jnp.bfloat16 or interpreted("mosaic_tpu"):
        return [rows[:, first], rows[:, first + 1]]
    n, heads, dim = rows.shape
    words = rows.bitcast(jnp.uint32).reshape(n * heads // 2, dim)
    return _halves(words[pl.ds(first // 2, n, stride=heads // 2)])


def _halves(words: jax.Array) -> list[jax.Array]:
    """Two bfloat16 arrays of one of uint32, as a TPU packs two rows: the first in the low bits."""
    halves = words << 16, words & jnp.uint32(0xFFFF0000)
    return [jax.lax.bitcast_convert_type(half, jnp.float32).astype(jnp.bfloat16) for half in halves]


def _eight_rows(combine: Any, x: jax.Array) -> jax.Array:
    """`[8, m]` of `[n, m]`: row i combines the rows whose number is i modulo 8."""
    return functools.reduce(combine, [x[n : n + 8] for n in range(0, x.shape[0], 8)])


def attend_to_chunk(
    q: Any,
    keys: Any,
    values: Any,
    state: tuple[Any, Any, Any],
    scores: tuple[Any, Any],
    *,
    scale: float,
    mask: Callable[[jax.Array, Any, int], jax.Array] | None = None,
    columns: Callable[[Any, Any], tuple[jax.Array, jax.Array]] | None = None,
    beside: Callable[[Any, int, int], None] | None = None,
) -> None:
    """Adds the attention to a chunk of keys to the state.

    Args:
      q, keys, values, state: see the module.
      scores: scratch for two tiles of rows, as of `score_shapes`. A tile divides the rows.
      scale: factor on the dot products, above 0.
      mask: of scores `[keys, tile]`, the tile's first row in its part, and the first key of the chunk.
      columns: of the tile's first row and a slice of keys: what to put beside the keys, `[keys, c]`, and beside the
        rows, `[tile, c]`. Their product is added to the scores.
      beside: called with a pair of tiles, one of its turns and the number of its turns, to issue other work there.
    """
    acc, largest, total = state
    even, odd = scores
    (parts, rows, _), chunk, tile = q.shape, keys.shape[1], even.shape[1]
    steps, turns = parts * (rows // tile), pl.cdiv(chunk, KEYS)
    exponent = scale * math.log2(math.e)
    dot = functools.partial(jax.lax.dot_general, precision=precision(keys.dtype), preferred_element_type=jnp.float32)

    def rows_of(step: jax.Array | int) -> tuple[Any, Any]:
        """The part of a step, and its first row."""
        if rows == tile:
            return step, 0
        first = step % (rows // tile) * tile
        return step // (rows // tile), first if isinstance(first, int) else pl.multiple_of(first, tile)

    def score(step: jax.Array | int, first_key: int, target: Any) -> None:
        """Writes the scores of a tile of rows and `KEYS` keys, and the largest of every eighth key."""
        part, first = rows_of(step)
        some = pl.ds(first_key, min(KEYS, chunk - first_key))
        left, right = keys[part, some], q[part, pl.ds(first, tile)]
        if columns is not None:
            of_keys, of_rows = columns(first, some)
            left, right = jnp.concatenate([left, of_keys], axis=1), jnp.concatenate([right, of_rows], axis=1)
        found = dot(left, right, (((1,), (1,)), ((), ())))
        if mask is not None:
            found = mask(found, first, first_key)
        most = _eight_rows(jnp.maximum, found)
        target[some] = found
        target[chunk:] = jnp.maximum(target[chunk:], most) if first_key else most

    def attend(step: jax.Array | int, source: Any, target: Any = None) -> None:
        """Attention of the rows whose scores are in `source`. The next rows' scores go to `target`."""
        part, first = rows_of(step)
        some = pl.ds(first, tile)
        old = largest[part, :, some]
        new = jnp.maximum(old, jnp.max(source[chunk:], axis=0, keepdims=True))
        correction = jnp.exp2((old - new) * exponent)
        attended, sums = acc[part, :, some] * correction, jnp.zeros((8, tile), jnp.float32)
        for turn in range(turns):
            first_key = turn * KEYS
            if beside is not None and (target is not None or source is odd):
                beside(step // 2, turns * int(source is odd) + turn, 2 * turns)
            if target is not None:
                score(step + 1, first_key, target)
            of = pl.ds(first_key, min(KEYS, chunk - first_key))
            weights = jnp.exp2((source[of] - new) * exponent)
            sums += _eight_rows(jnp.add, weights)
            attended += dot(values[part, :, of], weights.astype(values.dtype), (((1,), (0,)), ((), ())))
        acc[part, :, some] = attended
        total[part, :, some] = total[part, :, some] * correction + jnp.sum(sums, axis=0, keepdims=True)
        largest[part, :, some] = new

    def attend_twice(pair: jax.Array, _: None) -> None:
        attend(2 * pair, even, odd)
        attend(2 * pair + 1, odd, even)

    for first_key in range(0, chunk, KEYS):
        score(0, first_key, even)
    jax.lax.fori_loop(0, (steps - 1) // 2, attend_twice, None)
    if steps % 2:
        attend(steps - 1, even)
    else:
        attend(steps - 2, even, odd)
        attend(steps - 1, odd)


def finish(state: tuple[Any, Any, Any], out: Any, lse: Any, *, scale: float) -> None:
    """Writes attention `[parts, rows, d]` and log-sum-exps `[parts, 1, rows]`: zeros and -inf where all is masked."""
    acc, largest, total = state
    (parts, depth, rows), dim = acc.shape, out.shape[2]
    pack = depth // dim

    def finish_part(part: jax.Array, _: None) -> None:
        found = largest[part] > MASKED / 2
        head = jax.lax.broadcasted_iota(jnp.int32, (dim, rows), 1) // (rows // pack)
        own = [jnp.where(head == n, acc[part, n * dim : (n + 1) * dim], 0.0) for n in range(pack)]
        attended = jnp.where(found, functools.reduce(jnp.add, own) / total[part], 0.0)
        out[part] = jnp.transpose(attended).astype(out.dtype)
        lse[part] = jnp.where(found, largest[part] * scale + jnp.log(total[part]), -jnp.inf)

    jax.lax.fori_loop(0, parts, finish_part, None)
