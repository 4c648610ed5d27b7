"""Makes weights of fewer bits out of numbers, on the host."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from keye_jax.quantization.schemes import Format, Scheme, grid
from pallas_kernels.quantized import INT4_ZERO, dequantize, pack_nibbles, spread

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
VALUES = {"fp8": FP8, "int8": np.dtype(np.int8), "int4": np.dtype(np.uint8)}
"""Dtypes of values as they are held; int4 has two in a byte."""

_LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.5}
_SCALES = {"fp8": np.dtype(np.float32), "int8": np.dtype(np.float32), "int4": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight of fewer bits on the host; arrays as in `pallas_kernels.quantized.QuantizedMatrices`."""

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    block: tuple[int, int]

    def numbers(self, dtype: Any = np.float32) -> np.ndarray:
        """What it stands for, `[..., in, out]`."""
        return dequantize(self.values, self.scales, self.zeros, self.block, dtype)


def scales_dtype(format: Format) -> np.dtype:
    """The dtype of the scales that `quantize` makes."""
    return _SCALES[format]


def quantize(matrix: np.ndarray, scheme: Scheme, *, parts: int = 1) -> Quantized:
    """A matrix in a scheme without zero points, by rounding to the nearest value.

    A block's scale maps its largest number to 448 (fp8), 127 (int8) or 7.5 (int4, whose 8 is cut to 7). Of a block of
    zeros it is 1. Values are those of the scale as it is stored.

    Args:
      matrix: `[in, out]`, bfloat16, float16 or float32, finite. Of int4 the number of inputs is even.
      parts: as for `Scheme.block`.
    """
    numbers = matrix.astype(np.float32)
    rows, columns = numbers.shape
    block = scheme.block(rows, columns, parts=parts)
    largest = _block_max(np.abs(numbers), block)
    return _at_scale(numbers, largest, scheme.format, block)


def _at_scale(numbers: np.ndarray, largest: np.ndarray, format: Format, block: tuple[int, int]) -> Quantized:
    """Values for blocks whose largest numbers are `largest`; what is larger is cut."""
    scales = np.where(largest > 0, largest / np.float32(_LARGEST[format]), np.float32(1)).astype(_SCALES[format])
    # A scale that would be stored as 0 would divide by it.
    scales = np.maximum(scales, np.finfo(np.float32).tiny.astype(scales.dtype))
    scaled = numbers / spread(scales.astype(np.float32), block, numbers.shape)
    if format == "fp8":
        values = np.clip(scaled, -448, 448).astype(FP8)
    elif format == "int8":
        values = np.clip(np.rint(scaled), -127, 127).astype(np.int8)
    else:
        values = pack_nibbles((np.clip(np.rint(scaled), -8, 7) + INT4_ZERO).astype(np.uint8))
    return Quantized(values, scales, None, block)


def _blocks(numbers: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """`[row blocks, rows of a block, column blocks, columns of a block]`, with zeros behind the matrix's end."""
    rows, columns = grid(block, *numbers.shape)
    missing = (rows * block[0] - numbers.shape[0], columns * block[1] - numbers.shape[1])
    if any(missing):
        numbers = np.pad(numbers, ((0, missing[0]), (0, missing[1])))
    return numbers.reshape(rows, block[0], columns, block[1])


def _block_max(numbers: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    return _blocks(numbers, block).max(axis=(1, 3))
