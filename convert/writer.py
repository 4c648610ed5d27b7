"""Writes safetensors shards: first the header, then the tensors in any order, since their offsets are known."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert.reader import DTYPE_NAMES, INDEX_NAME

_WRITE_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """The name, stored shape and dtype of a tensor to write; the dtype is one of `convert.reader.STORED`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: list[PlannedTensor], shard_size: int) -> list[list[PlannedTensor]]:
    """Splits `tensors` in order into shards of at most `shard_size` bytes of data. A larger tensor is a shard alone."""
    shards: list[list[PlannedTensor]] = []
    filled = 0
    for tensor in tensors:
        if not shards or filled + tensor.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    # With wide dtypes first, every tensor is aligned to its item size.
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def shard_names(count: int) -> list[str]:
    """File names of `count` shards, in the pattern of the released checkpoint."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def shard_index(shards: Mapping[str, list[PlannedTensor]]) -> str:
    """The text of the index that says which file has which tensor."""
    file_of = {tensor.name: name for name, shard in shards.items() for tensor in shard}
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    return json.dumps(index, indent=2) + "\n"


def encode_header(tensors: list[PlannedTensor]) -> bytes:
    """The bytes of a file before its data; their number is a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        stop = offset + tensor.nbytes
        name = DTYPE_NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes the shards of one checkpoint into a directory. Their names end in `.part` until `finish`.

    In the directory of a stopped process, it continues the same files.

    Args:
      directory: an existing directory.
      tensors: all tensors of the checkpoint, in order.
      shard_size: maximum bytes of data in one shard.
    """

    def __init__(self, directory: Path, tensors: list[PlannedTensor], shard_size: int) -> None:
        shards = plan_shards(tensors, shard_size)
        self._directory = directory
        self._names = shard_names(len(shards))
        self._places: dict[str, tuple[Path, int, PlannedTensor]] = {}
        self._descriptors: dict[Path, int] = {}
        self._touched: set[Path] = set()
        self._missing: dict[Path, set[str]] = {}
        self._shards = dict(zip(self._names, shards, strict=True))
        for name, shard in self._shards.items():
            part = directory / f"{name}.part"
            header = encode_header(shard)
            offset = len(header)
            for tensor in shard:
                self._places[tensor.name] = (part, offset, tensor)
                offset += tensor.nbytes
            self._missing[part] = {tensor.name for tensor in shard}
            if (directory / name).exists():
                (directory / name).rename(part)
            self._begin(part, header, offset)

    def _begin(self, part: Path, header: bytes, size: int) -> None:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._descriptors[part] = descriptor
        os.pwrite(descriptor, header, 0)
        os.ftruncate(descriptor, size)
        self._touched.add(part)

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes the tensor `name`. `values` has its dtype and its elements in order; the shape is not used."""
        part, offset, tensor = self._places[name]
        assert values.dtype == tensor.dtype and values.nbytes == tensor.nbytes
        data = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptors[part], data[done : done + _WRITE_BYTES], offset + done)
        self._touched.add(part)
        self._missing[part].discard(name)

    def place(self, name: str) -> tuple[Path, int, int]:
        """File, offset and bytes of the tensor `name`."""
        part, offset, tensor = self._places[name]
        return part, offset, tensor.nbytes

    def flush(self) -> list[Path]:
        """Waits until everything written so far is on the disk; returns the files that got their last tensor."""
        complete = [part for part in self._touched if not self._missing[part]]
        while self._touched:
            os.fsync(self._descriptors[self._touched.pop()])
        return complete

    def finish(self) -> None:
        """Gives the shards their final names, and writes the index if there are several shards."""
        self.flush()
        self.close()
        for name in self._names:
            (self._directory / f"{name}.part").rename(self._directory / name)
        if len(self._names) > 1:
            (self._directory / INDEX_NAME).write_text(shard_index(self._shards), encoding="utf-8")

    def close(self) -> None:
        """Closes the files without finishing them."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
