"""Where a conversion writes: groups of tensors, as Orbax arrays or into safetensors files, on this machine's disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from convert import manifest
from convert.checks import FoundTensor
from convert.journal import Written
from convert.orbax_io import PARAMS, OrbaxWriter
from convert.orbax_layout import ArrayPath
from convert.staging import Staging
from convert.stored import encode
from convert.writer import PlannedTensor, ShardWriter, plan_shards
from keye_jax.progress import PhaseProgress

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

    def saved(self) -> list[Written]:
        """Waits until the group that was written would outlive this process; returns where its bytes are on a disk."""
        ...

    def finish(self, side_files: Iterable[Path]) -> None:
        """Completes the weights, and writes other files and the manifest."""
        ...

    def close(self) -> None:
        """Closes files without finishing them."""
        ...


class OrbaxSink:
    """Writes groups as Orbax arrays.

    Raises:
      OSError: the file system fails.
    """

    def __init__(self, staging: Staging, report: PhaseProgress) -> None:
        self._staging = staging
        self._hasher = manifest.Hasher()
        # What is there is only a merge of the groups, which is made again.
        shutil.rmtree(staging.result)
        staging.result.mkdir()
        staging.forget_damaged(self._hasher, report)
        files = [Path(extent.file) for group in staging.groups for extent in group.extents]
        self._known = {file.relative_to(staging.work.name).parts[1] for file in files}
        self._writer = OrbaxWriter(staging.work, self._known)

    def groups(self, found: list[FoundTensor]) -> Iterator[list[FoundTensor]]:
        # Each of Orbax's partial saves reads the names of all arrays saved before. Therefore the groups of one tensor,
        # which are many, come first.
        return grouped(found)

    def write(self, group: list[FoundTensor], arrays: dict[ArrayPath, np.ndarray]) -> None:
        self._writer.save(arrays)

    def saved(self) -> list[Written]:
        new = set(self._writer.saved()) - self._known
        self._known |= new
        files = [path for name in sorted(new) for path in sorted(self._writer.group(name).rglob("*")) if path.is_file()]
        return [_written(self._staging, self._hasher, file, 0, file.stat().st_size) for file in files]

    def finish(self, side_files: Iterable[Path]) -> None:
        self._writer.finish(self._staging.result / PARAMS)
        finish_local(self._staging.result, side_files, self._hasher)

    def close(self) -> None:
        self._hasher.close()


class SafetensorsSink:
    """Writes groups as tensors of safetensors shards."""

    def __init__(self, staging: Staging, found: list[FoundTensor], shard_size: int, report: PhaseProgress) -> None:
        self._staging = staging
        planned = [planned_tensor(item) for item in found]
        self._writer = ShardWriter(staging.result, planned, shard_size)
        self._shards = [{tensor.name for tensor in shard} for shard in plan_shards(planned, shard_size)]
        self._hasher = manifest.Hasher()
        staging.forget_damaged(self._hasher, report)
        self._unsaved: list[str] = []

    def groups(self, found: list[FoundTensor]) -> Iterator[list[FoundTensor]]:
        # Shard by shard, so that a shard is hashed while the next one is written.
        for shard in self._shards:
            yield from grouped([item for item in found if item.tensor.checkpoint_name in shard])

    def write(self, group: list[FoundTensor], arrays: dict[ArrayPath, np.ndarray]) -> None:
        for item in group:
            self._writer.write(item.tensor.checkpoint_name, encode(item.tensor, arrays[item.tensor.path]))
            self._unsaved.append(item.tensor.checkpoint_name)

    def saved(self) -> list[Written]:
        self._hasher.begin(self._writer.flush())
        places = [self._writer.place(name) for name in self._unsaved]
        self._unsaved.clear()
        return [_written(self._staging, self._hasher, *place) for place in places]

    def finish(self, side_files: Iterable[Path]) -> None:
        self._writer.finish()
        finish_local(self._staging.result, side_files, self._hasher)

    def close(self) -> None:
        self._writer.close()
        self._hasher.close()


def _written(staging: Staging, hasher: manifest.Hasher, file: Path, offset: int, length: int) -> Written:
    name = file.relative_to(staging.path).as_posix()
    return Written(name, offset, length, hasher.part(file, offset, length))


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
