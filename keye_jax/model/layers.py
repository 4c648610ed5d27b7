"""Parameters, linear maps and norms shared by the decoder and the vision encoder."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype) -> nnx.Param:
    """A parameter of random values of scale 1 / sqrt(last dimension), with a logical name for each axis."""
    assert len(shape) == len(axes), (shape, axes)
    values = jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(shape[-1])
    return nnx.Param(values.astype(dtype), axes=axes)


class Linear(nnx.Module):
    """`x @ weight^T + bias` over named output axes.

    Attributes:
      weight: `[*outputs, *inputs]`, in the checkpoint's order.
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
    ):
        self.num_inputs = len(inputs)
        axes = (*outputs, *inputs)
        self.weight = param(rngs, (*outputs.values(), *inputs.values()), axes, dtype)
        self.bias = nnx.Param(jnp.zeros(tuple(outputs.values()), dtype), axes=tuple(outputs)) if bias else None

    def __call__(self, x: jax.Array, *, dtype: jnp.dtype | None = None) -> jax.Array:
        """`[..., *inputs]` to `[..., *outputs]`, accumulated in float32, in `dtype` (that of x)."""
        weight = self.weight[...]
        x_axes = tuple(range(x.ndim - self.num_inputs, x.ndim))
        w_axes = tuple(range(weight.ndim - self.num_inputs, weight.ndim))
        out = jax.lax.dot_general(x, weight, ((x_axes, w_axes), ((), ())), preferred_element_type=jnp.float32)
        if self.bias is not None:
            out += self.bias[...].astype(jnp.float32)
        return out.astype(dtype or x.dtype)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in float32."""

    def __init__(self, size: int, eps: float, *, axis: str, dtype: jnp.dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(size, dtype), axes=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.weight[...].astype(jnp.float32)).astype(x.dtype)


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
