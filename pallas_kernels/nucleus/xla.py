"""Portable implementation: candidates by selection, and a search for what they do not settle."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nucleus.api import MOST_TOP_K
from pallas_kernels.select_topk.xla import select_topk

_SEARCHED_BITS, _BITS_PER_PASS = 21, 3
"""Bits of a logit that the search for a large nucleus settles, in all and in one pass over the logits.

One pass compares the logits with 2^3 - 1 values at once. Of 2 to 6 bits a pass, 3 were the fastest in sum on one H100.
"""
_SIGN = np.uint32(1 << 31)


def nucleus(
    logits: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    active: jax.Array,
    *,
    select: Callable[..., jax.Array] = select_topk,
) -> tuple[jax.Array, jax.Array]:
    """See `api.nucleus`.

    The `MOST_TOP_K` likeliest tokens of a row settle all but a nucleus of more tokens than that.

    Args:
      select: `select_topk` of some implementation.
    """
    vocab = logits.shape[1]
    count = min(MOST_TOP_K, vocab)
    top = jnp.max(logits, axis=-1, keepdims=True)
    found = select(logits[:, None], jnp.where(active != 0, vocab, 0)[:, None], count)[:, 0]
    candidates = -jnp.sort(-jnp.take_along_axis(logits, found, axis=1), axis=1)
    limited = top_k > 0
    kept = jnp.arange(count) < jnp.where(limited, top_k, count)[:, None]
    mass = jnp.where(kept, jnp.exp(candidates - top), 0.0)
    reached = jnp.cumsum(mass, axis=1)
    total = jnp.where(limited, reached[:, -1], jnp.sum(jnp.exp(logits - top), axis=-1))
    target = jnp.where(top_p < 1, top_p * total, jnp.inf)
    kept &= reached - mass < target[:, None]
    # The first candidate stays, whatever rounding makes of a tiny target.
    number = jnp.maximum(jnp.sum(kept, axis=1, keepdims=True), 1)
    last = jnp.take_along_axis(candidates, number - 1, axis=1)[:, 0]
    if count < vocab:
        beyond = _lowest_of_nucleus(logits, top, target)
        last = jnp.where(limited | (reached[:, -1] >= target), last, beyond)
    # Computed once: what is compared with the span must be the same to the bit.
    return jax.lax.optimization_barrier((top[:, 0], top[:, 0] - last))


def _lowest_of_nucleus(logits: jax.Array, top: jax.Array, target: jax.Array) -> jax.Array:
    """The lowest logit from which on the likelihoods `exp(logits - top)` sum up to a row's target or more.

    It is cut to its upper `_SEARCHED_BITS` bits, in passes over the logits.

    Args:
      logits: float32 `[b, vocab]`.
      top: float32 `[b, 1]`.
      target: float32 `[b]`; where it is infinite, the result is below all logits.

    Returns:
      float32 `[b]`.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    order = jnp.where(bits >> 31 == 1, ~bits, bits | _SIGN)  # as integers of the same order
    mass = jnp.exp(logits - top)
    threshold = jnp.zeros(len(logits), jnp.uint32)
    for shift in range(32 - _BITS_PER_PASS, 31 - _SEARCHED_BITS, -_BITS_PER_PASS):
        digits = [np.uint32(digit << shift) for digit in range(1, 2**_BITS_PER_PASS)]
        terms = [jnp.where(order >= (threshold + digit)[:, None], mass, 0.0) for digit in digits]
        sums = jax.lax.reduce(terms, [jnp.float32(0)] * len(terms), _add_each, [1])
        # Sums fall with the digit: the number of those that reach the target is the threshold's.
        hits = [jnp.where(found >= target, np.uint32(1 << shift), np.uint32(0)) for found in sums]
        threshold += functools.reduce(jnp.add, hits)
    lowest = jnp.where(threshold >> 31 == 1, threshold ^ _SIGN, ~threshold)
    lowest = jax.lax.bitcast_convert_type(lowest, jnp.float32)
    # Rounding may leave all of a row below its target: then all of it is kept.
    return jnp.where(jnp.isfinite(target) & (threshold > 0), lowest, -jnp.inf)


def _add_each(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(a, b, strict=True)]
