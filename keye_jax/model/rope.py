"""Rotary position embeddings: three-dimensional in the decoder, two-dimensional in the vision encoder.

Angles are float32. Rotation is "rotate half": with x1, x2 the halves of a head,
`[x1 * cos - x2 * sin, x2 * cos + x1 * sin]` (RoFormer, arXiv 2104.09864; sections as in Qwen2-VL, arXiv 2409.12191).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def mrope_angles(positions: jax.Array, section: tuple[int, ...], theta: float) -> jax.Array:
    """Angles of frequencies `theta^(-2i / d)`, each following one of three positions.

    Args:
      positions: int32 `[3, ...]`: time, row, column.
      section: how many frequencies follow each; contiguous, d / 2 in all.
      theta: base of the frequencies.

    Returns:
      float32 `[..., d / 2]`.
    """
    frequencies = sum(section)
    inverse = theta ** -(np.arange(frequencies, dtype=np.float64) / frequencies)
    followed = jnp.take(positions, np.repeat(np.arange(3), section), axis=0)  # [d / 2, ...]
    return jnp.moveaxis(followed, 0, -1).astype(jnp.float32) * inverse.astype(np.float32)


def vision_angles(rows: jax.Array, columns: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Angles of a vision head: the first half of the frequencies follow the row, the others the column.

    Args:
      rows, columns: int32 `[...]`, place of each patch in its grid.

    Returns:
      float32 `[..., head_dim / 2]`.
    """
    count = head_dim // 4
    inverse = theta ** -(np.arange(count, dtype=np.float64) / count)
    places = jnp.stack([rows, columns], axis=-1).astype(jnp.float32)
    return (places[..., None] * inverse.astype(np.float32)).reshape(*rows.shape, head_dim // 2)


def apply_rope(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates heads `x [..., n, d]` by `angles [..., d / 2]`, in float32; the dtype of x comes back."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
