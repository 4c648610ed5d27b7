"""Portable selection: by counting on GPUs, where sorting is slow, and with `lax.top_k` elsewhere."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import portable
from pallas_kernels.select_topk import counting


def select_topk(scores: jax.Array, lengths: jax.Array, k: int) -> jax.Array:
    """See `api.select_topk`."""
    return portable.on_gpus(
        functools.partial(counting.select_topk, k=k), functools.partial(_sort, k=k), scores, lengths
    )


def _sort(scores: jax.Array, lengths: jax.Array, *, k: int) -> jax.Array:
    """With `lax.top_k`, which prefers lower positions among equal values."""
    size = scores.shape[-1]
    lengths = jnp.minimum(lengths, size)
    # top_k orders -0.0 below 0.0, and NaN by its sign.
    scores = jnp.where(scores == 0, 0.0, jnp.where(jnp.isnan(scores), jnp.inf, scores))
    # A valid -inf wins against the masked scores, which have higher positions.
    scores = jnp.where(jnp.arange(size) < lengths[..., None], scores, -jnp.inf)
    _, positions = jax.lax.top_k(scores, min(k, size))
    positions = jnp.sort(jnp.where(positions < lengths[..., None], positions, size), axis=-1)
    positions = jnp.where(positions < size, positions, -1)
    padding = [(0, 0)] * (positions.ndim - 1) + [(0, k - positions.shape[-1])]
    return jnp.pad(positions, padding, constant_values=-1).astype(jnp.int32)
