"""Matrices of fewer bits: packed values with scales, and what they stand for.

A number is `(value - zero) * scale`, computed in float32 and rounded once to the dtype that is asked for. Blocks of
neighbouring numbers share a scale and a zero. The last block of a row or column may be cut off by the matrix's end.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

INT4_ZERO = 8
"""What stands for 0 among the nibbles 0 to 15 of matrices without zeros of their own."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrices:
    """Matrices `[e, in, out]` of fewer bits, in the place of an array.

    Attributes:
      values: float8_e4m3fn or int8 `[e, in, out]`, or uint8 `[e, in / 2, out]`, two nibbles a byte: the lower is the
        number in the even row.
      scales: bfloat16, float16 or float32 `[e, ceil(in / block[0]), ceil(out / block[1])]`.
      zeros: int8 of the shape of scales; None where 0 is the nibble 8 or the value 0.
      block: inputs and outputs that share a scale.
    """

    values: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers: `[e, in, out]`."""
        groups, rows, columns = self.values.shape
        return groups, rows * (2 if self.values.dtype == jnp.uint8 else 1), columns

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def size(self) -> int:
        groups, rows, columns = self.shape
        return groups * rows * columns

    def __getitem__(self, index: Any) -> "QuantizedMatrices":
        """All of it, as `array[...]` is of an array: kernels take it as it is."""
        if index is not Ellipsis:
            raise TypeError("matrices of fewer bits are taken whole, with [...], or one by one with `take`")
        return self

    def take(self, groups: jax.Array, dtype: Any) -> jax.Array:
        """The numbers of some matrices, `[*groups.shape, in, out]`; nothing of the others is read.

        Args:
          groups: int32. A number that is too large counts as the last.
        """
        parts = (None if x is None else jnp.take(x, groups, axis=0, mode="clip") for x in self._arrays())
        values, scales, zeros = parts
        return dequantize(values, scales, zeros, self.block, dtype)

    def leaf_axes(self, axes: tuple[str | None, ...]) -> list[tuple[str | None, ...]]:
        """Logical axes of the arrays, from those of the matrices."""
        return [axes for x in self._arrays() if x is not None]

    def _arrays(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        return self.values, self.scales, self.zeros


Matrices = jax.Array | QuantizedMatrices


def take_matrices(matrices: Matrices, groups: jax.Array, dtype: Any) -> jax.Array:
    """Some of the matrices `[e, in, out]`, `[*groups.shape, in, out]`; a number that is too large counts as the last.

    Args:
      dtype: of the result where the matrices have fewer bits; an array keeps its own.
    """
    if isinstance(matrices, QuantizedMatrices):
        return matrices.take(groups, dtype)
    if groups.ndim == 0:
        return jax.lax.dynamic_index_in_dim(matrices, groups, keepdims=False)
    return matrices.at[groups].get(mode="clip")


def dequantize(
    values: Any, scales: Any, zeros: Any | None, block: tuple[int, int], dtype: Any, *, packed_axis: int = -2
) -> Any:
    """The numbers of matrices, of arrays of JAX or of numpy.

    Args:
      values: `[..., rows, columns]`, or of nibbles half as long along `packed_axis`.
      scales: `[..., ceil(rows / block[0]), ceil(columns / block[1])]`.
      zeros: of the shape of scales, or None.
      dtype: of the result.
    """
    packed = values.dtype == np.uint8
    if packed:
        values = unpack_nibbles(values, packed_axis)
    numbers = values.astype(np.float32)
    if zeros is not None:
        numbers = numbers - spread(zeros.astype(np.float32), block, numbers.shape)
    elif packed:
        numbers = numbers - np.float32(INT4_ZERO)
    return (numbers * spread(scales.astype(np.float32), block, numbers.shape)).astype(dtype)


def spread(grid: Any, block: tuple[int, int], shape: tuple[int, ...]) -> Any:
    """`[..., row blocks, column blocks]` with each element where its block is, `[..., rows, columns]`."""
    xp = np if isinstance(grid, np.ndarray) else jnp
    for axis in (-2, -1):
        if grid.shape[axis] > 1:
            grid = xp.repeat(grid, block[axis], axis=axis)
            if grid.shape[axis] != shape[axis]:
                grid = grid[..., : shape[axis], :] if axis == -2 else grid[..., : shape[axis]]
    return grid if xp is np else jnp.broadcast_to(grid, shape)


def unpack_nibbles(packed: Any, axis: int = -2) -> Any:
    """uint8 with twice the length along an axis: the lower nibbles become the even elements."""
    xp = np if isinstance(packed, np.ndarray) else jnp
    axis %= packed.ndim
    both = xp.stack([packed & 15, packed >> 4], axis=axis + 1)
    return both.reshape(*packed.shape[:axis], 2 * packed.shape[axis], *packed.shape[axis + 1 :])


def pack_nibbles(nibbles: np.ndarray, axis: int = -2) -> np.ndarray:
    """Undoes `unpack_nibbles` of uint8 below 16; the length along the axis must be even."""
    pairs = np.moveaxis(nibbles, axis, 0)
    return np.moveaxis(pairs[0::2] | (pairs[1::2] << 4), 0, axis)
