"""A model's parameters: their shapes and logical axes, and where the rules of a mesh put them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.model.keye import Keye
from keye_jax.quantization.weights import QuantizedMatrices, QuantizedWeight, arrays_of, leaf_axes, refined, with_arrays
from keye_jax.sharding.mesh_rules import MeshRules


@dataclasses.dataclass(frozen=True)
class StoredParameter:
    """An array of a parameter.

    Attributes:
      shape: its dimensions.
      dtype: None for that of the model; an array of a weight of fewer bits has its own.
      axes: the logical name of each dimension, or None.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]


def parameter_axes(config: KeyeConfig) -> dict[tuple[str, ...], tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and logical axes of each parameter, by module path."""
    return {path: (value.shape, axes) for path, value, axes in _parameters(config)}


def parameter_arrays(config: KeyeConfig, rules: MeshRules) -> dict[tuple[str, ...], StoredParameter]:
    """The arrays of the parameters by module path; a weight of fewer bits has several, by their roles."""
    found = {}
    for path, value, axes in _parameters(config):
        if isinstance(value, QuantizedWeight):
            of_role = leaf_axes(value, axes, rules)
            for role, array in arrays_of(value).items():
                found[*path, role] = StoredParameter(array.shape, array.dtype, of_role[role])
        else:
            found[path] = StoredParameter(value.shape, None, axes)
    return found


@functools.cache
def _parameters(config: KeyeConfig) -> list[tuple[tuple[str, ...], Any, tuple[str, ...]]]:
    """Path, shape and logical axes of each parameter."""
    return [
        (tuple(map(str, path)), variable.get_value(), variable.get_metadata("axes"))
        for path, variable in nnx.to_flat_state(nnx.state(Keye.abstract(config)))
    ]


def parameter_shardings(config: KeyeConfig, rules: MeshRules) -> dict[str, Any] | None:
    """The sharding of each parameter, nested by module path as `convert.load_params` takes it; None without a mesh."""
    if rules.sharding() is None:
        return None
    tree: dict[str, Any] = {}
    for path, stored in parameter_arrays(config, rules).items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = rules.sharding(*stored.axes)
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
        value, axes = variable.get_value(), variable.get_metadata("axes")
        if isinstance(value, QuantizedWeight):
            flat.append(
                (path, variable.replace(_place(value, axes, rules, parts=2 if path[-1] == "gate_up_proj" else 1)))
            )
        else:
            flat.append((path, variable.replace(_move(value, rules.sharding(*axes)))))
    model = nnx.merge(graph, nnx.from_flat_state(flat))
    for layer in model.decoder.layers:
        if layer.moe.hidden_parts != parts:
            assert layer.moe.hidden_parts == 1, "the model was placed by other rules"
            columns = layer.moe.gate_up_proj
            value = columns.get_value()
            if isinstance(value, QuantizedMatrices):
                moved = {role: _by_part_of(array, parts) for role, array in arrays_of(value).items()}
                columns.set_value(with_arrays(value, moved))
            else:
                columns.set_value(_by_part_of(value, parts))
            layer.moe.hidden_parts = parts
    return model


def _place(value: QuantizedWeight, axes: tuple[str, ...], rules: MeshRules, *, parts: int) -> QuantizedWeight:
    """A weight of fewer bits where the rules want its arrays; its blocks are cut where they would be parted."""
    if isinstance(value, QuantizedMatrices):
        value = _refined(value, axes, rules, parts)
    wanted = dict(zip(arrays_of(value), value.leaf_axes(axes), strict=True))
    return with_arrays(value, {r: _move(array, rules.sharding(*wanted[r])) for r, array in arrays_of(value).items()})


def _refined(value: QuantizedMatrices, axes: tuple[str, ...], rules: MeshRules, parts: int) -> QuantizedMatrices:
    cut = functools.partial(refined, axes=axes, rules=rules, parts=parts)
    return cut(value) if isinstance(value.values, jax.Array) else jax.eval_shape(cut, value)


def _by_part_of(array: jax.Array | jax.ShapeDtypeStruct, parts: int) -> jax.Array | jax.ShapeDtypeStruct:
    return _by_part(array, parts) if isinstance(array, jax.Array) else array


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
