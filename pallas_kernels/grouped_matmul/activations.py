"""Rows of activations in float8: a scale for each row and each block of inputs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.indexer_scores.quantize import quantize

BLOCK = 128
"""Inputs of a row that share a scale. The last block may be cut off by the end."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """Rows in float8, in the place of an array `[rows, in]`.

    Attributes:
      values: float8_e4m3fn `[rows, in]`.
      scales: float32 `[rows, ceil(in / BLOCK)]`.
      dtype: of the rows that were rounded, and of products with them.
    """

    values: jax.Array
    scales: jax.Array
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """`[rows, in]`."""
        return self.values.shape

    def numbers(self) -> jax.Array:
        """What they stand for, float32 `[rows, in]`; of scales that are powers of two exact in bfloat16 too."""
        return self.values.astype(jnp.float32) * jnp.repeat(self.scales, BLOCK, axis=1)[:, : self.shape[1]]


def quantize_rows(x: jax.Array) -> QuantizedRows:
    """Rounds rows to float8, with the scales of `quantize`, which are powers of two.

    Rows that are to be sorted by group are better rounded before: a row of float8 is half as long.

    Args:
      x: `[rows, in]`, bfloat16, float16 or float32.

    Raises:
      ArgumentError: x is no array of these.
    """
    rows, inputs = x.shape
    blocks = -(-inputs // BLOCK)
    padded = jnp.pad(x, ((0, 0), (0, blocks * BLOCK - inputs)))
    values, scales = quantize(padded.reshape(rows, blocks, BLOCK))
    return QuantizedRows(values.reshape(rows, blocks * BLOCK)[:, :inputs], scales, x.dtype)
