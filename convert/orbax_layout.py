"""Arrays of a checkpoint by path, and the chunks in which they are stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# An array of more than _CHUNKED_BYTES is stored in chunks, so that each host can read a part. An axis of at most
# _MOST_SLICES slices of at least _SLICE_BYTES each, such as experts or heads, has one chunk a slice. Without such an
# axis, the longest axis is cut into at most _PIECES chunks.
_CHUNKED_BYTES = 1 << 20
_SLICE_BYTES, _MOST_SLICES, _PIECES = 1 << 17, 256, 64

ArrayPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """Shape and dtype of a stored array. Orbax takes it as a request to restore a numpy array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def nest(flat: Mapping[ArrayPath, Any]) -> dict[str, Any]:
    """Nested dicts from a dict by path."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def flatten(tree: Any, prefix: ArrayPath = ()) -> dict[ArrayPath, Any]:
    """The leaves of nested dicts by path."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {path: leaf for key, value in tree.items() for path, leaf in flatten(value, (*prefix, str(key))).items()}


def chunk_axis(shape: tuple[int, ...], nbytes: int) -> int | None:
    """The axis along which an array is stored in chunks; None if it is one chunk. `nbytes`: bytes of the array."""
    if nbytes <= _CHUNKED_BYTES:
        return None
    slices = (axis for axis, size in enumerate(shape) if in_slices(size, nbytes))
    return next(slices, max(range(len(shape)), key=lambda axis: shape[axis]))


def in_slices(size: int, nbytes: int) -> bool:
    """Whether an axis of `size` slices has one chunk a slice."""
    return size <= _MOST_SLICES and nbytes >= size * _SLICE_BYTES


def piece_bytes(nbytes: int) -> int:
    """Most bytes of a chunk of an array that has no slices."""
    return max(_CHUNKED_BYTES, nbytes // _PIECES)


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of the chunks of an array; the last ones may be cut off by its end."""
    nbytes = math.prod(shape) * itemsize
    axis = chunk_axis(shape, nbytes)
    if axis is None:
        return shape
    pieces = shape[axis] if in_slices(shape[axis], nbytes) else -(-nbytes // piece_bytes(nbytes))
    return (*shape[:axis], max(1, -(-shape[axis] // pieces)), *shape[axis + 1 :])
