"""Loads the model's arrays from a checkpoint of either kind onto devices."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from convert import buckets, checks, detect, storage
from convert.checks import FoundTensor
from convert.manifest import Manifest
from convert.orbax_io import OrbaxSource, on_device
from convert.orbax_layout import StoredArray, chunk_axis, flatten, nest
from convert.reader import SafetensorsSource
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError

Sharding = jax.sharding.Sharding


def load_params(
    path: str | Path,
    config: KeyeConfig,
    *,
    dtype: Any = None,
    shardings: Sharding | Mapping[str, Any] | None = None,
    verify_checksums: bool = False,
) -> dict[str, Any]:
    """Loads the arrays of the model. Arrays of a checkpoint that the model does not use are not read.

    From Orbax, each host reads only the shards of its own devices. If a large array is replicated over devices, each
    device reads another part, and the devices exchange the parts. From safetensors, each host reads one whole tensor
    at a time, and keeps the shards of its own devices. Host memory: twice the largest tensor.

    Args:
      path: directory of a checkpoint of either kind, or its URL in a bucket.
      config: its configuration.
      dtype: the dtype to cast every array to while it is loaded; None to keep the stored dtypes. Arrays of weights of
        fewer bits keep theirs.
      shardings: one sharding for all arrays, or nested dicts like the result with shardings as leaves. Arrays without
        a sharding go to the default device.
      verify_checksums: read every file first, and compare it with the manifest. Of a checkpoint in a bucket, each of
        several processes reads its share.

    Returns:
      Nested dicts by module path, with layer numbers as strings. For instance,
      `params["decoder"]["layers"]["0"]["attention"]["q_proj"]["weight"]` is `[heads, head_dim, hidden]`.
      `convert.mapping` lists all paths and shapes.

    Raises:
      UserError: there is no checkpoint, or it does not match `config`. One message lists all problems.
    """
    directory = buckets.local(path)
    if verify_checksums:
        _verify(directory)
    source = detect.open_source(directory)
    try:
        wanted = _wanted(source, config, directory)
        targets = _targets(wanted, shardings)
        if isinstance(source, SafetensorsSource):
            return nest(
                {item.tensor.path: _load_tensor(source, item, dtype, targets[item.tensor.path]) for item in wanted}
            )
        return nest(_restore(source, wanted, dtype, targets))
    except OSError as error:
        raise UserError(f"{buckets.shown(directory)} cannot be read: {storage.reason(error) or error}") from error
    finally:
        source.close()


def abstract_params(
    path: str | Path,
    config: KeyeConfig,
    *,
    dtype: Any = None,
    shardings: Sharding | Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `load_params` returns for these arguments, with `jax.ShapeDtypeStruct` in place of arrays.

    They have a sharding where the arrays are committed to one. No weight is read.

    Raises:
      UserError: as `load_params`, but for files that cannot be read later.
    """
    directory = buckets.local(path)
    source = detect.open_source(directory)
    try:
        wanted = _wanted(source, config, directory)
    finally:
        source.close()
    targets = _targets(wanted, shardings)
    # Orbax commits what it restores, `device_put` without a sharding does not.
    default = None if isinstance(source, SafetensorsSource) else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return nest(
        {
            item.tensor.path: jax.ShapeDtypeStruct(
                item.tensor.shape,
                item.dtype if dtype is None or item.tensor.role else dtype,
                sharding=targets[item.tensor.path] or default,
            )
            for item in wanted
        }
    )


def _verify(directory: Path) -> None:
    detect.kind_of(directory)
    manifest = Manifest.read(directory)
    if manifest is None or not manifest.has_checksums:
        raise UserError(
            f"{buckets.shown(directory)} has no checksums to verify: no conversion of this version wrote it"
        )
    # All processes see the same bucket, but each may have its own disk.
    shared = buckets.origin(directory) is not None
    part = (jax.process_index(), jax.process_count()) if shared else (0, 1)
    checks.raise_problems(directory, checks.damage(directory, part=part))


def _wanted(source: SafetensorsSource | OrbaxSource, config: KeyeConfig, directory: Path) -> list[FoundTensor]:
    """The model's tensors of a checkpoint. Raises UserError if it does not match `config`."""
    found, problems = checks.check(source, config)
    checks.raise_problems(directory, problems)
    return [item for item in found if item.tensor.in_model]


def _targets(
    wanted: list[FoundTensor], shardings: Sharding | Mapping[str, Any] | None
) -> dict[tuple[str, ...], Sharding | None]:
    if shardings is None or isinstance(shardings, Sharding):
        return {item.tensor.path: shardings for item in wanted}
    flat = flatten(shardings)
    return {item.tensor.path: flat.get(item.tensor.path) for item in wanted}


def _load_tensor(source: SafetensorsSource, item: FoundTensor, dtype: Any, sharding: Sharding | None) -> jax.Array:
    values = source.read_tensor(item.tensor)
    if sharding is None:
        array = jax.device_put(values)
    else:
        array = jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    if dtype is not None and not item.tensor.role and array.dtype != np.dtype(dtype):
        array = array.astype(dtype)
    # Without waiting, several tensors would be in host memory at a time.
    return jax.block_until_ready(array)


def _restore(
    source: OrbaxSource, wanted: list[FoundTensor], dtype: Any, targets: dict[tuple[str, ...], Sharding | None]
) -> dict[tuple[str, ...], Any]:
    requests, moves = {}, {}
    for item in wanted:
        path = item.tensor.path
        entry, target = source.entries[path], targets[path]
        split = _split_replicas(entry, target) if isinstance(target, NamedSharding) else None
        if split is not None:
            moves[path] = target
        requests[path] = on_device(entry, None if item.tensor.role else dtype, split or target)
    arrays = source.restore(requests)
    for path, target in moves.items():
        # One at a time: only one array is in device memory twice.
        arrays[path] = jax.block_until_ready(_move(arrays[path], target))
    return arrays


def _split_replicas(entry: StoredArray, target: NamedSharding) -> NamedSharding | None:
    """`target` with its replicas split over the axis of chunks, so that no chunk is read twice.

    None if the array is stored in one chunk, or if `target` has no replicas that can be split.
    """
    axis = chunk_axis(entry.shape, entry.nbytes)
    if axis is None:
        return None
    spec = [*target.spec, *[None] * (len(entry.shape) - len(target.spec))]
    axes_of = [[axes] if isinstance(axes, str) else list(axes or ()) for axes in spec]
    used, sizes = set(itertools.chain(*axes_of)), target.mesh.shape
    parts = math.prod(sizes[name] for name in axes_of[axis])
    for name, size in sizes.items():
        if name not in used and entry.shape[axis] % (parts * size) == 0:
            axes_of[axis].append(name)
            parts *= size
    split = NamedSharding(target.mesh, PartitionSpec(*map(tuple, axes_of)))
    return None if split.is_equivalent_to(target, len(entry.shape)) else split


@functools.partial(jax.jit, static_argnums=1)
def _move(array: jax.Array, target: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(array, target)
