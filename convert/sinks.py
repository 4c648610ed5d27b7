"""Where a conversion writes: groups of tensors, as Orbax arrays or into safetensors files, on this machine's disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from convert import manifest
from convert.checks import FoundTensor
from convert.orbax_io import OrbaxWriter
from convert.orbax_layout import ArrayPath
from convert.staging import Staging
from convert.stored import encode
from convert.writer import PlannedTensor, ShardWriter, plan_shards

# A tensor of LARGE_BYTES or more is a group of its own. Smaller ones form groups of at most GROUP_BYTES.
LARGE_BYTES = 64 << 20
GROUP_BYTES = 256 << 20


class Sink(Protocol):
    """Takes the groups of one conversion."""

    def groups(self, found: list[FoundTensor]) -> Iterable[list[FoundTensor]]:
        """Splits tensors into groups, in the order in which they are to be written."""
        ...

    def write(self, group: list[FoundTensor], arrays: dict[ArrayPath, np.ndarray]) -> None:
        """Writes a group."""
        ...

    def saved(self) -> list[str]:
        """Waits until all that was written would outlive this process; returns what the journal keeps of it."""
        ...

    def finish(self, side_files: Iterable[Path]) -> None:
        """Completes the weights, and writes other files and the manifest."""
        ...

    def close(self) -> None:
        """Closes files without finishing them."""
        ...


class OrbaxSink:
    """Writes groups as Orbax arrays."""

    def __init__(self, staging: Staging) -> None:
        self._result = staging.result
        self._writer = OrbaxWriter(staging.result, staging.saved_groups)
        if not self._writer.intact:
            staging.restart()
            self._writer = OrbaxWriter(staging.result)
        self._hasher = manifest.Hasher()

    def groups(self, found: list[FoundTensor]) -> Iterator[list[FoundTensor]]:
        # Each of Orbax's partial saves reads the names of all arrays saved before. Therefore the groups of one tensor,
        # which are many, come first.
        return grouped(found)

    def write(self, group: list[FoundTensor], arrays: dict[ArrayPath, np.ndarray]) -> None:
        self._writer.save(arrays)

    def saved(self) -> list[str]:
        self._hasher.begin(path for path in self._result.rglob("d/*") if path.is_file())
        return self._writer.saved()

    def finish(self, side_files: Iterable[Path]) -> None:
        self._writer.finish()
        finish_local(self._result, side_files, self._hasher)

    def close(self) -> None:
        self._hasher.close()


class SafetensorsSink:
    """Writes groups as tensors of safetensors shards."""

    def __init__(self, staging: Staging, found: list[FoundTensor], shard_size: int) -> None:
        self._result = staging.result
        planned = [planned_tensor(item) for item in found]
        self._writer = ShardWriter(staging.result, planned, shard_size)
        self._shards = [{tensor.name for tensor in shard} for shard in plan_shards(planned, shard_size)]
        self._hasher = manifest.Hasher()

    def groups(self, found: list[FoundTensor]) -> Iterator[list[FoundTensor]]:
        # Shard by shard, so that a shard is hashed while the next one is written.
        for shard in self._shards:
            yield from grouped([item for item in found if item.tensor.checkpoint_name in shard])

    def write(self, group: list[FoundTensor], arrays: dict[ArrayPath, np.ndarray]) -> None:
        for item in group:
            self._writer.write(item.tensor.checkpoint_name, encode(item.tensor, arrays[item.tensor.path]))

    def saved(self) -> list[str]:
        self._hasher.begin(self._writer.flush())
        return []

    def finish(self, side_files: Iterable[Path]) -> None:
        self._writer.finish()
        finish_local(self._result, side_files, self._hasher)

    def close(self) -> None:
        self._writer.close()
        self._hasher.close()


def planned_tensor(item: FoundTensor) -> PlannedTensor:
    """A tensor as a safetensors file has it."""
    scheme, role = item.tensor.scheme, item.tensor.role
    packed = scheme is not None and scheme.format == "int4" and role != "scales"
    dtype = np.dtype(np.int32) if packed else item.dtype
    return PlannedTensor(item.tensor.checkpoint_name, item.tensor.checkpoint_shape, dtype)


def grouped(found: list[FoundTensor]) -> Iterator[list[FoundTensor]]:
    """Splits tensors into groups: first each large tensor alone, then the small ones together."""
    yield from ([item] for item in found if item.nbytes >= LARGE_BYTES)
    group: list[FoundTensor] = []
    for item in (item for item in found if item.nbytes < LARGE_BYTES):
        if group and sum(other.nbytes for other in group) + item.nbytes > GROUP_BYTES:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def finish_local(directory: Path, side_files: Iterable[Path], hasher: manifest.Hasher) -> None:
    """Copies other files beside the weights in `directory`, and writes the manifest of all."""
    for file in side_files:
        shutil.copyfile(file, directory / file.name)
    manifest.write(directory, hasher)
