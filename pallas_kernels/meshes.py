"""Calls on several devices: inside `jax.shard_map`, and on meshes with Explicit axes.

In `jax.shard_map`, JAX tracks the mesh axes over which an array varies, and a loop must keep that set. On a mesh with
Explicit axes, the type of an array says how it lies over devices.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.checks import Signature, Sizes


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes over which at least one of the arrays varies."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def vary_like[T](tree: T, *arrays: jax.Array) -> T:
    """`tree`, whose arrays count as varying over the axes over which `arrays` vary. Begins the state of a loop."""
    axes = varying_axes(*arrays)

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def explicit_mesh(arrays: Sequence[jax.Array]) -> Any:
    """The mesh with Explicit axes over which the arrays lie; None if there is none."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def explicit_devices(mesh: Any) -> int:
    """Among how many devices the Explicit axes of a mesh divide arrays."""
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in sizes if kind == AxisType.Explicit)


def call_on_explicit_mesh(run: Callable, arrays: dict[str, Any], signature: Signature, sizes: Sizes, mesh: Any) -> Any:
    """`run(arrays)` with Explicit axes made Auto ones, so that XLA chooses how to divide the work.

    Each axis of a result lies as the axis with the same name of the first argument that has it.
    """
    placed: dict[str, Any] = {}
    for name, wanted in signature.arrays.items():
        if arrays[name] is not None:
            spec = jax.typeof(arrays[name]).sharding.spec
            spec = (*spec, *(None,) * (arrays[name].ndim - len(spec)))
            for axis, lies in zip(_axes(wanted.shape, sizes), spec, strict=True):
                placed[axis] = placed.get(axis) or lies
    lies = [
        NamedSharding(mesh, PartitionSpec(*_once(map(placed.get, _axes(r.shape, sizes))))) for r in signature.results
    ]
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)
    out = lies[0] if len(lies) == 1 else tuple(lies)
    return jax.sharding.auto_axes(run, axes=axes, out_sharding=out)(arrays)


def _axes(shape: str, sizes: Sizes) -> list[str]:
    """The names of a shape's axes, one for each."""
    leading = [f"...{i}" for i in range(len(sizes.get("...", ())))]
    return [axis for term in shape.split() for axis in (leading if term == "..." else [term])]


def _once(placed: Any) -> list[Any]:
    """`placed`, but None where a mesh axis was used before."""
    used, kept = set(), []
    for lies in placed:
        names = set(lies if isinstance(lies, tuple) else () if lies is None else (lies,))
        kept.append(None if names & used else lies)
        used |= names
    return kept
