"""Exchanges between the devices of a mesh, inside `StepSharding.shard_map`. Over no axes each does nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

type Axes = tuple[str, ...]
"""Mesh axes, outermost first."""


def only(axes: Axes, among: Axes) -> Axes:
    """Those of `axes` that are `among` others."""
    return tuple(axis for axis in axes if axis in among)


def without(axes: Axes, others: Axes) -> Axes:
    """Those of `axes` that are not among `others`."""
    return tuple(axis for axis in axes if axis not in others)


def rank(axes: Axes) -> jax.Array | int:
    """This device's number along `axes`; 0 along none."""
    return jax.lax.axis_index(axes) if axes else 0


def all_gather(x: jax.Array, axes: Axes, axis: int) -> jax.Array:
    """The parts of all devices along `axes`, concatenated on dimension `axis` in the order of their ranks."""
    if not axes:
        return x
    # Not every platform's collectives know float8.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype.itemsize == 1 else x
    with jax.named_scope("collectives"):
        bits = jax.lax.all_gather(bits, axes, axis=axis, tiled=True)
    # Bits have no gradient, not even as what they were before.
    return bits if bits.dtype == x.dtype else jax.lax.bitcast_convert_type(bits, x.dtype)


def sum_over(x: jax.Array, axes: Axes, scatter: Axes = (), axis: int = 0) -> jax.Array:
    """The sum over `axes` and `scatter`. Along `scatter` each device keeps its own part of dimension `axis`."""
    with jax.named_scope("collectives"):
        if scatter:
            x = jax.lax.psum_scatter(x, scatter, scatter_dimension=axis, tiled=True)
        return jax.lax.psum(x, axes) if axes else x


def from_owner(x: jax.Array, owned: jax.Array, axes: Axes) -> jax.Array:
    """The bits of `x` from the one device along `axes` whose `owned` is true, zeros where no device's is.

    Args:
      x: `[n, ..., d]`, the last dimension a multiple of 4 bytes.
      owned: bool `[n]`.
    """
    if not axes:
        return x
    words = as_words(x)
    mask = owned.reshape(-1, *(1,) * (words.ndim - 1))
    with jax.named_scope("collectives"):
        return from_words(jax.lax.psum(jnp.where(mask, words, 0), axes), x.dtype)


def as_words(x: jax.Array) -> jax.Array:
    """The bits of `x [..., n]` as uint32 `[..., n * itemsize / 4]`, so that arrays of several types travel together."""
    per_word = 4 // x.dtype.itemsize
    if per_word > 1:
        x = x.reshape(*x.shape[:-1], -1, per_word)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def from_words(words: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Undoes `as_words`."""
    x = jax.lax.bitcast_convert_type(words, dtype)
    return x.reshape(*words.shape[:-1], -1) if x.ndim > words.ndim else x
