"""Parameters, linear maps and norms shared by the decoder and the vision encoder."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.quantization.schemes import Scheme
from keye_jax.quantization.weights import QuantizedLinear, linear_param


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype) -> nnx.Param:
    """A parameter of random values of scale 1 / sqrt(last dimension), with a logical name for each axis."""
    assert len(shape) == len(axes), (shape, axes)
    values = jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(shape[-1])
    return nnx.Param(values.astype(dtype), axes=axes)


class Linear(nnx.Module):
    """`x @ weight^T + bias` over named output axes.

    Attributes:
      weight: `[*outputs, *inputs]`, in the checkpoint's order; a `QuantizedLinear` where it has a scheme.
      bias: `[*outputs]`, or None.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        scheme: Scheme | None = None,
    ):
        self.num_inputs = len(inputs)
        axes = (*outputs, *inputs)
        shape = (*outputs.values(), *inputs.values())
        self.weight = (
            param(rngs, shape, axes, dtype)
            if scheme is None
            else linear_param(rngs, shape, axes, scheme, num_inputs=len(inputs))
        )
        self.bias = nnx.Param(jnp.zeros(tuple(outputs.values()), dtype), axes=tuple(outputs)) if bias else None

    def __call__(self, x: jax.Array, *, dtype: jnp.dtype | None = None) -> jax.Array:
        """`[..., *inputs]` to `[..., *outputs]`, accumulated in float32, in `dtype` (that of x)."""
        narrow = dtype is None or dtype == x.dtype
        weight = self.weight.get_value()
        weight = weight.numbers(x.dtype) if isinstance(weight, QuantizedLinear) else self.weight[...]
        out: Any = _contract(self.num_inputs, narrow, x, weight)
        if self.bias is not None:
            out += self.bias[...].astype(jnp.float32)
        return out.astype(dtype or x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(inputs: int, narrow: bool, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`[..., *inputs]` and `[*outputs, *inputs]` to float32 `[..., *outputs]`.

    Args:
      inputs: how many dimensions are summed over.
      narrow: whether the result is rounded to the dtype of x at once. Then so is its gradient, and products in the
        backward pass have operands of that dtype too, not of float32.
    """
    x_axes, w_axes = (tuple(range(each.ndim - inputs, each.ndim)) for each in (x, weight))
    return jax.lax.dot_general(x, weight, ((x_axes, w_axes), ((), ())), preferred_element_type=jnp.float32)


def _contract_forward(inputs: int, narrow: bool, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple]:
    return _contract(inputs, narrow, x, weight), (x, weight)


def _contract_backward(
    inputs: int, narrow: bool, saved: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    d_out = d_out.astype(x.dtype) if narrow else d_out
    outputs, rows = weight.ndim - inputs, x.ndim - inputs
    of_out, of_weight = tuple(range(rows, d_out.ndim)), tuple(range(outputs))
    d_x = jax.lax.dot_general(d_out, weight, ((of_out, of_weight), ((), ())), preferred_element_type=jnp.float32)
    all_rows = tuple(range(rows))
    d_weight = jax.lax.dot_general(d_out, x, ((all_rows, all_rows), ((), ())), preferred_element_type=jnp.float32)
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


_contract.defvjp(_contract_forward, _contract_backward)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in float32."""

    def __init__(self, size: int, eps: float, *, axis: str, dtype: jnp.dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(size, dtype), axes=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """What an `RMSNorm` of this weight and epsilon does."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * weight.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis, in float32."""

    def __init__(self, size: int, eps: float, *, axis: str, dtype: jnp.dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(size, dtype), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros(size, dtype), axes=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 -= jnp.mean(x32, axis=-1, keepdims=True)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
