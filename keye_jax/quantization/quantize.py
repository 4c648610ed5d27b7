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

_CUTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Parts of a block's largest number that calibrated scales are tried for; what is larger is cut."""


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


def quantize(
    matrix: np.ndarray, scheme: Scheme, *, parts: int = 1, input_squares: np.ndarray | None = None
) -> Quantized:
    """A matrix in a scheme without zero points, by rounding to the nearest value.

    A block's scale maps its largest number to 448 (fp8), 127 (int8) or 7.5 (int4, whose 8 is cut to 7). Of a block of
    zeros it is 1. Values are those of the scale as it is stored.

    With `input_squares` the scale is for that part of the largest number, of seven down to 0.7, which changes outputs
    least: where errors of weights do not depend on each other, an output's squared error is their sum, each weighed by
    its input's square. The weighing is that of AWQ (Lin et al., arXiv 2306.00978), which scales inputs for it.

    Args:
      matrix: `[in, out]`, bfloat16, float16 or float32, finite. Of int4 the number of inputs is even.
      parts: as for `Scheme.block`.
      input_squares: float32 `[in]`, means of the inputs' squares.
    """
    numbers = matrix.astype(np.float32)
    rows, columns = numbers.shape
    block = scheme.block(rows, columns, parts=parts)
    largest = _blocks(np.abs(numbers), block).max(axis=(1, 3))
    if input_squares is not None:
        largest = _calibrated(numbers, largest, scheme.format, block, input_squares)
    return _at_scale(numbers, largest, scheme.format, block)


def _calibrated(
    numbers: np.ndarray, largest: np.ndarray, format: Format, block: tuple[int, int], input_squares: np.ndarray
) -> np.ndarray:
    """The part of each block's largest number that a scale for it changes outputs least."""
    least, chosen = np.full(largest.shape, np.inf, np.float32), largest
    for cut in _CUTS:
        tried = np.float32(cut) * largest
        scale = spread(_scales(tried, format).astype(np.float32), block, numbers.shape)
        error = _rounded(numbers / scale, format) * scale - numbers
        cost = _blocks(np.square(error) * input_squares[:, None], block).sum(axis=(1, 3))
        chosen, least = np.where(cost < least, tried, chosen), np.minimum(cost, least)
    return chosen


def _at_scale(numbers: np.ndarray, largest: np.ndarray, format: Format, block: tuple[int, int]) -> Quantized:
    """Values for blocks whose largest numbers are `largest`; what is larger is cut."""
    scales = _scales(largest, format)
    values = _rounded(numbers / spread(scales.astype(np.float32), block, numbers.shape), format)
    if format == "int4":
        return Quantized(pack_nibbles((values + INT4_ZERO).astype(np.uint8)), scales, None, block)
    return Quantized(values.astype(VALUES[format]), scales, None, block)


def _scales(largest: np.ndarray, format: Format) -> np.ndarray:
    """Scales as they are stored."""
    scales = np.where(largest > 0, largest / np.float32(_LARGEST[format]), np.float32(1)).astype(_SCALES[format])
    # A scale that would be stored as 0 would divide by it.
    return np.maximum(scales, np.finfo(np.float32).tiny.astype(scales.dtype))


def _rounded(scaled: np.ndarray, format: Format) -> np.ndarray:
    """The nearest values of a format, as float32."""
    if format == "fp8":
        return np.clip(scaled, -448, 448).astype(FP8).astype(np.float32)
    low, high = (-127, 127) if format == "int8" else (-8, 7)
    return np.clip(np.rint(scaled), low, high)


def _blocks(numbers: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """`[row blocks, rows of a block, column blocks, columns of a block]`, with zeros behind the matrix's end."""
    rows, columns = grid(block, *numbers.shape)
    missing = (rows * block[0] - numbers.shape[0], columns * block[1] - numbers.shape[1])
    if any(missing):
        numbers = np.pad(numbers, ((0, missing[0]), (0, missing[1])))
    return numbers.reshape(rows, block[0], columns, block[1])
