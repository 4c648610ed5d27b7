"""Exact selection as a threshold, which is small to keep and quick to apply again.

A query's selection is all keys that score above its threshold, and of those that score the same the first few. So two
numbers a query stand for `top_k` positions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_BITS = 4
"""Bits that one pass over the scores settles: a pass counts against `2**_BITS - 1` candidates at once."""


def topk_threshold(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k-th highest of each row's scores, of equal ones the first (0.0 equals -0.0), as `select_topk` orders them.

    Args:
      scores: floating-point `[..., s]`, -inf where a query sees nothing; s is above k.

    Returns:
      that score, `[...]`, -inf if fewer than k are seen, and its place, int32 `[...]`.
    """
    scores = jnp.where(scores == 0, 0.0, scores)  # both ways order -0.0 below 0.0
    if scores.dtype != jnp.float32:
        return threshold_by_sorting(scores, k)
    # An accelerator sorts rows in dozens of kernels. A CPU counts as slowly as it sorts.
    return jax.lax.platform_dependent(
        scores, cpu=lambda x: threshold_by_sorting(x, k), default=lambda x: threshold_by_counting(x, k)
    )


def selected(scores: jax.Array, threshold: jax.Array, place: jax.Array) -> jax.Array:
    """Which scores `[..., s]` are at or above the threshold that `topk_threshold` found, bool `[..., s]`.

    Those of -inf are counted in where fewer than k are seen; the caller masks what a query does not see.
    """
    threshold, place = threshold[..., None], place[..., None]
    return (scores > threshold) | ((scores == threshold) & (jnp.arange(scores.shape[-1]) <= place))


def threshold_by_sorting(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`topk_threshold` with `lax.top_k`, which prefers lower positions among equal values."""
    values, places = jax.lax.top_k(scores, k)
    return values[..., -1], places[..., -1]


def threshold_by_counting(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`topk_threshold` of float32 scores by radix selection: each pass counts what lies above some candidates."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    # Of floats as integers, the order of negative ones is reversed, and the sign bit counts as the largest.
    keys = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
    threshold = jnp.zeros(scores.shape[:-1], jnp.uint32)
    above = jnp.zeros(scores.shape[:-1], jnp.int32)  # how many keys are above all that begin as the threshold does
    for shift in range(32 - _BITS, -1, -_BITS):
        candidates = [threshold | jnp.uint32(digit << shift) for digit in range(1, 2**_BITS)]
        counts = _count([keys >= candidate[..., None] for candidate in candidates])
        digit = _number_of(count >= k for count in counts)
        above = jnp.max(jnp.stack([above, *(jnp.where(count < k, count, 0) for count in counts)]), axis=0)
        threshold |= digit.astype(jnp.uint32) << shift
    equal = keys == threshold[..., None]
    place, at, rank = jnp.zeros_like(above), jnp.arange(scores.shape[-1]), k - above
    for shift in range((scores.shape[-1] - 1).bit_length() // _BITS * _BITS, -1, -_BITS):
        candidates = [place | digit << shift for digit in range(1, 2**_BITS)]
        counts = _count([equal & (at < candidate[..., None]) for candidate in candidates])
        place |= _number_of(count < rank for count in counts) << shift
    bits = jnp.where(threshold >> 31 == 1, threshold ^ jnp.uint32(1 << 31), ~threshold)
    return jax.lax.bitcast_convert_type(bits, jnp.float32), jnp.minimum(place, scores.shape[-1] - 1)


def _count(masks: list[jax.Array]) -> list[jax.Array]:
    """How many of each mask `[..., s]` are true, int32 `[...]`, in one pass over what they are made of."""
    numbers = tuple(mask.astype(jnp.int32) for mask in masks)

    def add(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return list(jax.lax.reduce(numbers, (jnp.int32(0),) * len(numbers), add, (numbers[0].ndim - 1,)))


def _number_of(conditions) -> jax.Array:
    return sum(condition.astype(jnp.int32) for condition in conditions)
