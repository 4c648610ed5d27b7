"""The fp8 form of index queries and keys: a rotation that spreads outliers over a head, then one scale per vector."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.checks import Array, Signature
from pallas_kernels.errors import ArgumentError

SMALLEST = 1e-4
"""Least magnitude that a vector is scaled for."""

_HADAMARD, _QUANTIZE = (Signature(name, {"x": Array("... d")}, ()) for name in ("hadamard", "quantize"))


def hadamard(x: jax.Array) -> jax.Array:
    """`x` times the Hadamard matrix (Sylvester's order) and `d ** -0.5`. This is orthogonal: it keeps dot products.

    Args:
      x: `[..., d]`, d a power of two.

    Returns:
      `[..., d]` in the dtype of x, computed in float32.

    Raises:
      ArgumentError: d is not a power of two, or x is no array of bfloat16, float16 or float32.
    """
    x = _HADAMARD.check(x=x)[0]["x"]
    dim = x.shape[-1]
    if dim & (dim - 1):
        raise ArgumentError(f"hadamard: an index head has {dim} elements; the fp8 indexer takes powers of two")
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < dim:
        matrix = np.kron(np.array([[1, 1], [1, -1]], np.float32), matrix)
    # A sum of 64 bfloat16 numbers of similar size is exact in float32, so every platform rounds alike.
    out = jnp.matmul(x.astype(jnp.float32), matrix, precision=jax.lax.Precision.HIGHEST)
    return (out * dim**-0.5).astype(x.dtype)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x / scale` as float8_e4m3fn, with `scale = 2 ** ceil(log2(max(amax, 1e-4) / 448))` for each vector.

    `amax` is the vector's largest magnitude. Scales are powers of two, so products with them round nothing. The
    publisher's serving code uses the same scales.

    Args:
      x: `[..., d]`.

    Returns:
      values float8_e4m3fn `[..., d]`, scales float32 `[...]`.

    Raises:
      ArgumentError: x is no array of bfloat16, float16 or float32.
    """
    x = _QUANTIZE.check(x=x)[0]["x"]
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=-1).astype(jnp.float32), SMALLEST)
    # 448 is 1.75 * 2 ** 8. The exponent goes up by one if the mantissa is above 1.75: exact, unlike a logarithm.
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    exponents = ((bits + 0x1FFFFF) >> 23) - 8
    scales = jax.lax.bitcast_convert_type(exponents << 23, jnp.float32)
    return (x.astype(jnp.float32) / scales[..., None]).astype(jnp.float8_e4m3fn), scales
