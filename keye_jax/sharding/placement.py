"""Putting a model's parameters where a layout wants them."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from keye_jax.model.keye import Keye
from keye_jax.sharding.layout import Layout


def place(model: Keye, layout: Layout) -> Keye:
    """The model with its parameters over the layout's devices, as a `Runner` of that layout wants them.

    Arrays that lie there already are taken as they are. Where experts' hidden dimension is split, the columns of
    `gate_up_proj` are put in another order, so that each device has a gate and an up of its own; arrays that lay
    on the layout's devices already are given up for that, one at a time. A model that was placed comes back unchanged.

    Args:
      model: with arrays, or with shapes and dtypes in place of arrays.
    """
    parts = layout.size("expert_hidden")
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        sharding = layout.sharding(*variable.get_metadata("axes"))
        flat.append((path, variable.replace(_move(variable.get_value(), sharding))))
    model = nnx.merge(graph, nnx.from_flat_state(flat))
    for layer in model.decoder.layers:
        if layer.moe.hidden_parts != parts:
            assert layer.moe.hidden_parts == 1, "the model was placed for another layout"
            columns = layer.moe.gate_up_proj
            value = columns.get_value()
            if isinstance(value, jax.Array):
                columns.set_value(_by_part(value, parts))
            layer.moe.hidden_parts = parts
    return model


def _move(value: jax.Array | jax.ShapeDtypeStruct, sharding: jax.NamedSharding) -> jax.Array | jax.ShapeDtypeStruct:
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    if value.sharding.is_equivalent_to(sharding, value.ndim):
        return value
    return jax.device_put(value, sharding)


def _by_part(columns: jax.Array, parts: int) -> jax.Array:
    """`[..., 2 * f]`, all gates and then all ups, to those of the first part, then those of the second, and so on."""

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=columns.sharding)
    def reorder(columns: jax.Array) -> jax.Array:
        apart = columns.reshape(*columns.shape[:-1], 2, parts, -1)
        return apart.swapaxes(-3, -2).reshape(columns.shape)

    return reorder(columns)
