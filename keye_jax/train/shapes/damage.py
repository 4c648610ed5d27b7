"""What a low-quality video does to frames: blur, colour at half the resolution, noise, and 8 x 8 blocks."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

# BT.601, as video has it: luma Y and colour differences Cb and Cr of RGB, all of the same range (full swing).
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
_TO_RGB = np.linalg.inv(_TO_YCC.astype(np.float64)).astype(np.float32)

_BLOCK = 8
_MOST_BLUR = 0.25
"""Weight of each neighbour of a pixel, of rows and of columns."""

_MOST_NOISE = 4.0
"""Standard deviation of the noise of the luma. The noise is uniform, which is quick to draw."""

_NOISE = np.array([1, 4, 4], np.float32)
"""Noise of luma and colours beside that of the luma. The mean of four pixels halves that of the colours."""

_STEPS = (1.0, 24.0)
"""Least and largest step of quantisation of the luma; of colours it is half as large again."""


def _cosines() -> np.ndarray:
    """The orthonormal discrete cosine transform of `_BLOCK` values, float32 [_BLOCK, _BLOCK]."""
    number = np.arange(_BLOCK)
    matrix = np.cos(math.pi / _BLOCK * number[:, None] * (number + 0.5)) * math.sqrt(2 / _BLOCK)
    matrix[0] /= math.sqrt(2)
    return matrix.astype(np.float32)


_DCT = np.kron(_cosines(), _cosines())
"""The transform of a block, float32 [64, 64]."""

_STEEPNESS = (1 + 0.15 * (np.arange(_BLOCK)[:, None] + np.arange(_BLOCK))).astype(np.float32).reshape(-1)
"""Steps of quantisation grow with the frequency, float32 [64]."""


def damage(frames: jax.Array, key: jax.Array) -> jax.Array:
    """Frames of one clip with random damage, whose strengths are the same in all of them.

    Args:
      frames: float32 [F, H, W, 3], RGB from 0 to 255, H and W multiples of 8.
      key: of the random numbers.

    Returns:
      the same shape; values may lie slightly outside of the range.
    """
    strengths, noise_key = jax.random.split(key)
    blur, noise, step = jax.random.uniform(strengths, (3,))
    blur, noise = _MOST_BLUR * blur, _MOST_NOISE * noise**2
    least, largest = _STEPS
    step = least * (largest / least) ** step  # evenly in its logarithm
    planes = jnp.einsum("cd,fhwd->fchw", _TO_YCC, _smooth(frames, blur), precision="highest")
    planes += noise * _NOISE[:, None, None] * _noise(noise_key, planes[:, 0].shape)
    luma, chroma = _quantised(planes[:, :1], step), _halved(planes[:, 1:])
    height, width = chroma.shape[2:]
    chroma = _quantised(_padded(chroma), 1.5 * step)[:, :, :height, :width]
    chroma = jnp.repeat(jnp.repeat(chroma, 2, axis=2), 2, axis=3)
    return jnp.einsum("cd,fdhw->fhwc", _TO_RGB, jnp.concatenate([luma, chroma], axis=1), precision="highest")


def _noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Three planes of uniform noise of mean 0 and standard deviation 1, [F, 3, H, W], for a shape [F, H, W]."""
    bits = jax.random.bits(key, shape, jnp.uint32)[:, None]
    planes = (bits >> jnp.arange(0, 24, 8, dtype=jnp.uint32)[:, None, None]) & 255
    return (planes.astype(jnp.float32) - 127.5) * (math.sqrt(12) / 256)


def _smooth(frames: jax.Array, weight: jax.Array) -> jax.Array:
    """Each pixel mixed with its neighbours in rows and columns, [F, H, W, 3]."""
    for axis in (1, 2):
        first = jax.lax.slice_in_dim(frames, 0, 1, axis=axis)
        last = jax.lax.slice_in_dim(frames, frames.shape[axis] - 1, None, axis=axis)
        before = jnp.concatenate([first, jax.lax.slice_in_dim(frames, 0, -1, axis=axis)], axis=axis)
        after = jnp.concatenate([jax.lax.slice_in_dim(frames, 1, None, axis=axis), last], axis=axis)
        frames = (1 - 2 * weight) * frames + weight * (before + after)
    return frames


def _halved(planes: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels, [F, C, H / 2, W / 2]."""
    frames, channels, height, width = planes.shape
    return planes.reshape(frames, channels, height // 2, 2, width // 2, 2).mean((3, 5))


def _padded(planes: jax.Array) -> jax.Array:
    """Planes [F, C, H, W] with repeated edges, up to whole blocks."""
    down, right = (-size % _BLOCK for size in planes.shape[2:])
    return jnp.pad(planes, ((0, 0), (0, 0), (0, down), (0, right)), mode="edge")


def _quantised(planes: jax.Array, step: jax.Array) -> jax.Array:
    """Planes [F, C, H, W] whose blocks have rounded frequencies."""
    frames, channels, height, width = planes.shape
    rows, columns, steps = height // _BLOCK, width // _BLOCK, step * _STEEPNESS
    blocks = planes.reshape(frames, channels, rows, _BLOCK, columns, _BLOCK).swapaxes(3, 4)
    frequencies = jnp.matmul(blocks.reshape(-1, _BLOCK**2), _DCT.T, precision="highest")
    blocks = jnp.matmul(steps * jnp.round(frequencies / steps), _DCT, precision="highest")
    return blocks.reshape(frames, channels, rows, columns, _BLOCK, _BLOCK).swapaxes(3, 4).reshape(planes.shape)
