"""Selection without sorting: the threshold by counting, then the chosen positions from words of bits.

Every step is a pass over all rows at once, and the number of steps does not depend on the scores.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.meshes import vary_like

_DIGIT_BITS = 4
"""Bits of the threshold that one pass over the scores finds. It counts against `2 ** bits - 1` candidates."""
_WORD = 32
"""Positions of one word."""


def select_topk(scores: jax.Array, lengths: jax.Array, k: int) -> jax.Array:
    """See `api.select_topk`.

    Memory: the result, at most the scores once more as integers, and one word for 32 scores a few times.
    """
    leading, size = scores.shape[:-1], scores.shape[-1]
    scores, lengths = scores.reshape(-1, size), jnp.clip(lengths, 0, size).reshape(-1)
    wanted = jnp.minimum(lengths, k)
    # Computed once: what is compared with the threshold must be the same to the bit.
    keys = jax.lax.optimization_barrier(_ordered_integers(scores, lengths))
    threshold = _threshold(keys, wanted)
    keys = jnp.pad(keys, ((0, 0), (0, -size % _WORD)))
    above, equal = _pack(keys > threshold[:, None]), _pack(keys == threshold[:, None])
    # Of those that equal the threshold, the lowest positions fill up what is wanted.
    missing = wanted - jnp.sum(_count(above), axis=-1, dtype=jnp.int32)
    before = jnp.cumsum(_count(equal), axis=-1, dtype=jnp.int32) - _count(equal)
    chosen = above | _lowest(equal, missing[:, None] - before)
    return _positions(chosen, wanted, k).reshape(*leading, k)


def _ordered_integers(scores: jax.Array, lengths: jax.Array) -> jax.Array:
    """uint32 in the order of the scores; 0, which is below that of every score, behind the length."""
    scores = jnp.where(scores == 0, 0.0, jnp.where(jnp.isnan(scores), jnp.inf, scores))
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    keys = jnp.where(bits >> 31 == 0, bits | np.uint32(1 << 31), ~bits)
    return jnp.where(jnp.arange(scores.shape[-1]) < lengths[:, None], keys, np.uint32(0))


def _threshold(keys: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest number that at least `wanted` keys of a row reach, uint32 `[rows]`."""

    def digit(index: jax.Array, threshold: jax.Array) -> jax.Array:
        shift = jnp.asarray(32 - _DIGIT_BITS * (index + 1), jnp.uint32)
        digits = jnp.arange(1, 1 << _DIGIT_BITS, dtype=jnp.uint32)
        candidates = threshold[:, None] + (digits << shift)
        # One reduction of several arrays reads the keys once.
        reached = [(keys >= candidates[:, i, None]).astype(jnp.int32) for i in range(len(digits))]
        zeros = [np.int32(0)] * len(digits)
        counts = jnp.stack(jax.lax.reduce(reached, zeros, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], [1]))
        found = jnp.sum(counts >= wanted, axis=0, dtype=jnp.uint32)
        return threshold + (found << shift)

    threshold = vary_like(jnp.zeros(len(keys), jnp.uint32), keys)
    return jax.lax.fori_loop(0, 32 // _DIGIT_BITS, digit, threshold)


def _pack(flags: jax.Array) -> jax.Array:
    """bool `[rows, 32 * w]` as words uint32 `[rows, w]`; the lowest bit is the first flag."""
    flags = flags.reshape(len(flags), -1, _WORD)
    return jnp.sum(flags.astype(jnp.uint32) << jnp.arange(_WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def _count(words: jax.Array) -> jax.Array:
    return jax.lax.population_count(words).astype(jnp.int32)


def _find(words: jax.Array, rank: jax.Array) -> jax.Array:
    """The place of the set bit of each word before which there are `rank` others, int32; any place if there is none."""
    place = jnp.zeros_like(rank)
    for width in (16, 8, 4, 2, 1):
        below = _count((words >> place.astype(jnp.uint32)) & np.uint32((1 << width) - 1))
        later = rank >= below
        rank = jnp.where(later, rank - below, rank)
        place = jnp.where(later, place + width, place)
    return place


def _lowest(words: jax.Array, count: jax.Array) -> jax.Array:
    """The lowest `count` of the set bits of each word; none if `count` is below 1."""
    first_left_out = _find(words, jnp.maximum(count, 0)).astype(jnp.uint32)
    some = words & ((np.uint32(1) << first_left_out) - np.uint32(1))
    return jnp.where(count >= _count(words), words, some)


def _positions(words: jax.Array, number: jax.Array, k: int) -> jax.Array:
    """The positions of the first `number` set bits of each row's words in order, then -1: int32 `[rows, k]`."""
    rows, width = words.shape
    # Each of k ranks looks among the ends of parts of a row for its part, then among that part's words for its word.
    part = math.isqrt(width - 1) + 1
    words = jnp.pad(words, ((0, 0), (0, -width % part)))
    ends = jnp.cumsum(_count(words), axis=-1, dtype=jnp.int32).reshape(rows, -1, part)
    rank = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (rows, k))
    row = jnp.arange(rows)[:, None]
    at = jnp.sum(ends[:, None, :, -1] <= rank[..., None], axis=-1, dtype=jnp.int32)
    at = jnp.minimum(at, ends.shape[1] - 1)
    word = at * part + jnp.sum(ends[row, at] <= rank[..., None], axis=-1, dtype=jnp.int32)
    word = jnp.minimum(word, words.shape[1] - 1)
    chosen = words[row, word]
    rank_in_word = rank - (ends.reshape(rows, -1)[row, word] - _count(chosen))
    return jnp.where(rank < number[:, None], word * _WORD + _find(chosen, rank_in_word), -1)
