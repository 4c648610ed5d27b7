"""Exact selection as a mask, which takes an accelerator a few passes over the scores."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

_BITS = 4
"""Bits that one pass over the scores settles: a pass counts against `2**_BITS - 1` candidates at once."""


def topk_mask(scores: jax.Array, k: int) -> jax.Array:
    """The k highest of each row's scores, of equal ones the first (0.0 equals -0.0): what `select_topk` selects.

    Args:
      scores: floating-point `[..., s]`, -inf where a query sees nothing; s is above k.

    Returns:
      bool `[..., s]`. Where fewer than k are seen, others are among the k; the caller masks them.
    """
    scores = jnp.where(scores == 0, 0.0, scores)  # both ways order -0.0 below 0.0
    # Computed once: what is compared with the k-th highest must be the same to the bit.
    scores = jax.lax.optimization_barrier(scores)
    if scores.dtype != jnp.float32:
        return mask_by_sorting(scores, k)
    # An accelerator sorts rows in dozens of kernels. A CPU counts more slowly than it sorts.
    return jax.lax.platform_dependent(
        scores, cpu=lambda x: mask_by_sorting(x, k), default=lambda x: mask_by_counting(x, k)
    )


def mask_by_sorting(scores: jax.Array, k: int) -> jax.Array:
    """`topk_mask` with `lax.top_k`, which prefers lower positions among equal values."""
    values, places = jax.lax.top_k(scores, k)
    return _mask(scores, values[..., -1], places[..., -1])


def mask_by_counting(scores: jax.Array, k: int) -> jax.Array:
    """`topk_mask` of float32 scores by radix selection: each pass counts what lies above some candidates."""
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
    return _mask(keys, threshold, place)


def _mask(scores: jax.Array, threshold: jax.Array, place: jax.Array) -> jax.Array:
    """Scores above the k-th highest, and those equal to it up to its place."""
    threshold, place = threshold[..., None], place[..., None]
    return (scores > threshold) | ((scores == threshold) & (jnp.arange(scores.shape[-1]) <= place))


def _count(masks: list[jax.Array]) -> list[jax.Array]:
    """How many of each mask `[..., s]` are true, int32 `[...]`, in one pass over what they are made of."""
    numbers = tuple(mask.astype(jnp.int32) for mask in masks)

    def add(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return list(jax.lax.reduce(numbers, (jnp.int32(0),) * len(numbers), add, (numbers[0].ndim - 1,)))


def _number_of(conditions: Iterable[jax.Array]) -> jax.Array:
    """How many of the conditions hold, int32 in their shape."""
    return functools.reduce(jnp.add, (condition.astype(jnp.int32) for condition in conditions))
