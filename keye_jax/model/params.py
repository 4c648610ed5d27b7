"""A model's parameters: their shapes and logical axes, and where the rules of a mesh put them."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.model.keye import Keye
from keye_jax.sharding.mesh_rules import MeshRules


@functools.cache
def parameter_axes(config: KeyeConfig) -> dict[tuple[str, ...], tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and logical axes of each parameter, by module path."""
    return {
        tuple(map(str, path)): (variable.shape, variable.get_metadata("axes"))
        for path, variable in nnx.to_flat_state(nnx.state(Keye.abstract(config)))
    }


def parameter_shardings(config: KeyeConfig, rules: MeshRules) -> dict[str, Any] | None:
    """The sharding of each parameter, nested by module path as `convert.load_params` takes it; None without a mesh."""
    if rules.sharding() is None:
        return None
    tree: dict[str, Any] = {}
    for path, (_, axes) in parameter_axes(config).items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = rules.sharding(*axes)
    return tree


def shard_params(model: Keye, rules: MeshRules) -> Keye:
    """The model with its parameters where the rules want them.

    Arrays that lie there already are taken as they are. Where experts' hidden dimension is split, the columns of
    `gate_up_proj` are put in another order, so that each device has a gate and an up of its own. Arrays that lay on the
    mesh's devices already are given up for that, one at a time. A model that was placed comes back unchanged, and so
    does any model where there is no mesh.

    Args:
      model: with arrays, or with shapes and dtypes in place of arrays.
    """
    if rules.sharding() is None:
        return model
    parts = rules.size("expert_hidden")
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        sharding = rules.sharding(*variable.get_metadata("axes"))
        flat.append((path, variable.replace(_move(variable.get_value(), sharding))))
    model = nnx.merge(graph, nnx.from_flat_state(flat))
    for layer in model.decoder.layers:
        if layer.moe.hidden_parts != parts:
            assert layer.moe.hidden_parts == 1, "the model was placed by other rules"
            columns = layer.moe.gate_up_proj
            value = columns.get_value()
            if isinstance(value, jax.Array):
                columns.set_value(_by_part(value, parts))
            layer.moe.hidden_parts = parts
    return model


def _move(
    value: jax.Array | jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None
) -> jax.Array | jax.ShapeDtypeStruct:
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    if sharding is not None and value.sharding.is_equivalent_to(sharding, value.ndim):
        return value
    return jax.device_put(value, sharding)


def _by_part(columns: jax.Array, parts: int) -> jax.Array:
    """`[..., 2 * f]`, all gates and then all ups, to those of the first part, then those of the second, and so on."""

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=columns.sharding)
    def reorder(columns: jax.Array) -> jax.Array:
        apart = columns.reshape(*columns.shape[:-1], 2, parts, -1)
        return apart.swapaxes(-3, -2).reshape(columns.shape)

    return reorder(columns)
