"""Weights of fewer bits as parameters of a model: their arrays, and how these lie over devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.errors import UserError
from keye_jax.quantization.quantize import VALUES, scales_dtype
from keye_jax.quantization.schemes import Scheme, grid
from pallas_kernels.quantized import INT4_ZERO, QuantizedMatrices, dequantize

ROLES = ("values", "scales", "zeros")
"""Names of the arrays of a weight of fewer bits, in its path."""

_DEVIATION = 0.02
"""Of random weights."""


class Axes(Protocol):
    """What is asked of `keye_jax.sharding.MeshRules`."""

    def size(self, name: str | None) -> int: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedLinear:
    """The weight of a linear map in fewer bits, in the place of an array `[*outputs, *inputs]`.

    Attributes:
      values: of this shape, float8_e4m3fn or int8; or uint8 with half its last dimension, two nibbles a byte, the lower
        the even number.
      scales: `[ceil(out / block[0]), ceil(in / block[1])]`, where out and in are all outputs and all inputs.
      zeros: int8 of the shape of scales, or None.
      block: outputs and inputs that share a scale.
      num_inputs: how many dimensions are inputs.
    """

    values: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})
    num_inputs: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        *first, last = self.values.shape
        return (*first, last * (2 if self.values.dtype == jnp.uint8 else 1))

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def numbers(self, dtype: Any) -> jax.Array:
        """`[*outputs, *inputs]` in a dtype."""
        outputs, inputs = math.prod(self.shape[: -self.num_inputs]), math.prod(self.shape[-self.num_inputs :])
        assert self.scales.shape == grid(self.block, outputs, inputs), "scales and values are parts of different sizes"
        flat = self.values.reshape(outputs, -1)
        return dequantize(flat, self.scales, self.zeros, self.block, dtype, packed_axis=-1).reshape(self.shape)

    def leaf_axes(self, axes: tuple[str | None, ...]) -> list[tuple[str | None, ...]]:
        """Logical axes of the arrays, from those of the weight: each device has all scales, which are few."""
        return [axes, (None, None), *([] if self.zeros is None else [(None, None)])]


QuantizedWeight = QuantizedMatrices | QuantizedLinear


def arrays_of(weight: QuantizedWeight) -> dict[str, Any]:
    """The arrays of a weight, by role."""
    found = {role: getattr(weight, role) for role in ROLES}
    return {role: array for role, array in found.items() if array is not None}


def with_arrays(weight: QuantizedWeight, arrays: Mapping[str, Any]) -> QuantizedWeight:
    """The weight with other arrays, by role."""
    return dataclasses.replace(weight, **arrays)


def expert_param(
    rngs: nnx.Rngs, shape: tuple[int, int, int], axes: tuple[str | None, ...], scheme: Scheme, *, parts: int
) -> nnx.Param:
    """A parameter of random experts `[e, in, out]`; `parts` as for `Scheme.block`."""
    experts, inputs, outputs = shape
    block = scheme.block(inputs, outputs, parts=parts)
    stored = (experts, inputs // 2, outputs) if scheme.format == "int4" else shape
    arrays = random_arrays(rngs.params(), scheme, stored, (experts, *grid(block, inputs, outputs)))
    return nnx.Param(QuantizedMatrices(**arrays, block=block), axes=axes)


def linear_param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], scheme: Scheme, *, num_inputs: int
) -> nnx.Param:
    """A parameter of a random linear map `[*outputs, *inputs]`."""
    outputs, inputs = math.prod(shape[:-num_inputs]), math.prod(shape[-num_inputs:])
    group, side = scheme.block(inputs, outputs)
    block = (side, group)
    stored = (*shape[:-1], shape[-1] // 2) if scheme.format == "int4" else shape
    arrays = random_arrays(rngs.params(), scheme, stored, grid(block, outputs, inputs))
    return nnx.Param(QuantizedLinear(**arrays, block=block, num_inputs=num_inputs), axes=axes)


def random_arrays(key: jax.Array, scheme: Scheme, stored: tuple[int, ...], scales: tuple[int, ...]) -> dict[str, Any]:
    """Arrays of a random weight of standard deviation 0.02, by role; of zeros None where the scheme has none.

    Args:
      stored, scales: the shapes of values and scales.
    """
    dtype = VALUES[scheme.format]
    step, zero = random_grid(dtype)
    return {
        "values": random_values(key, stored, dtype),
        "scales": jnp.full(scales, step, scales_dtype(scheme.format)),
        "zeros": jnp.full(scales, zero, jnp.int8) if scheme.zero_points else None,
    }


def random_grid(dtype: Any) -> tuple[float, int]:
    """Scale and zero with which `random_values` of a dtype have a standard deviation of 0.02 and a mean of about 0."""
    kind = jnp.dtype(dtype)
    deviation, zero = {jnp.dtype(jnp.int8): (74.0, 0), jnp.dtype(jnp.uint8): (4.6, INT4_ZERO)}.get(kind, (1.0, 0))
    return _DEVIATION / deviation, zero


def random_values(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Values of fewer bits: normal ones of float8, and all whole numbers alike."""
    if dtype == VALUES["fp8"]:
        return jax.random.normal(key, shape, jnp.float32).astype(dtype)
    return jax.random.bits(key, shape, jnp.uint8).astype(dtype)


def leaf_axes(weight: QuantizedWeight, axes: Sequence[str | None], rules: Axes) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of each array as it is read: scales are split only where that parts no block.

    Raises:
      UserError: two numbers that share a byte would lie on two devices.
    """
    _check_bytes(weight, axes, rules)
    found = dict(zip(arrays_of(weight), weight.leaf_axes(tuple(axes)), strict=True))
    if isinstance(weight, QuantizedLinear):
        return found
    kept = [axes[0]]
    for axis, block in enumerate(weight.block, 1):
        parts = rules.size(axes[axis])
        kept.append(axes[axis] if parts == 1 or weight.shape[axis] // parts % block == 0 else None)
    return {role: each if role == "values" else tuple(kept) for role, each in found.items()}


def refined(weight: QuantizedMatrices, axes: Sequence[str | None], rules: Axes, *, parts: int = 1) -> QuantizedMatrices:
    """The same matrices with blocks small enough that no device has a part of one. Scales are repeated.

    Args:
      axes: logical axes of the matrices.
      parts: as for `Scheme.block`.
    """
    block = list(weight.block)
    small = {role: array for role, array in arrays_of(weight).items() if role != "values"}
    for axis, old in enumerate(weight.block, 1):
        if (devices := rules.size(axes[axis])) == 1:
            continue
        share = weight.shape[axis] // devices // (parts if axis == 2 else 1)
        new = math.gcd(old, share)
        if new != old:
            count = -(-weight.shape[axis] // new)
            small = {role: jnp.take(array, jnp.arange(count) * new // old, axis=axis) for role, array in small.items()}
            block[axis - 1] = new
    return dataclasses.replace(weight, **small, block=tuple(block))


def _check_bytes(weight: QuantizedWeight, axes: Sequence[str | None], rules: Axes) -> None:
    packed = 1 if isinstance(weight, QuantizedMatrices) else weight.ndim - 1
    parts = rules.size(axes[packed])
    if weight.dtype == jnp.uint8 and weight.values.shape[packed] % parts:
        raise UserError(
            f"sharding: {axes[packed]} of {weight.shape[packed]} is split in {parts}; of int4 weights each part must "
            "be even"
        )
