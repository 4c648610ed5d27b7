"""Writes Orbax checkpoints group by group, and reads any of their arrays.

Arrays are named by module path. Each group is one of Orbax's partial saves, which are atomic: the group is on the disk
when `save` returns. `finalize` merges the metadata of the groups into one checkpoint, and copies no data. The result is
restored like any other Orbax checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from keye_jax.errors import UserError
from keye_jax.parsing import read_json

# The directory of the arrays in a converted checkpoint, and the file with the length of every file in it.
PARAMS = "params"
MANIFEST = "checkpoint.json"

# Bytes that Orbax may use while it restores, besides the arrays.
_READ_BYTES = 1 << 30
# An array of more than _CHUNKED_BYTES is stored in chunks, so that each host can read a part. An axis of at most
# _MOST_SLICES slices of at least _SLICE_BYTES each, such as experts or heads, has one chunk a slice. Without such an
# axis, the longest axis is cut into at most _PIECES chunks.
_CHUNKED_BYTES = 1 << 20
_SLICE_BYTES, _MOST_SLICES, _PIECES = 1 << 17, 256, 64
# Metadata files are smaller than this. Before a merge, smaller files are copied and larger ones are linked.
_COPIED_BYTES = 1 << 20

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


def _saving_context() -> ocp.Context:
    context = ocp.Context()
    # Compression hardly shrinks trained weights in bf16. Uncompressed chunks are plain byte ranges.
    context.array.saving.use_compression = False
    # The caller does not change its arrays until the save returns, so Orbax needs no copy.
    context.memory.deepcopy_host_arrays = False
    options = type(context.array.saving.storage_options)

    def chunks(key: Any, value: Any) -> Any:
        axis = chunk_axis(value.shape, value.nbytes)
        if axis is None:
            return None
        if _in_slices(value.shape[axis], value.nbytes):
            # With one expert a chunk, each device reads whole chunks, however the experts are split.
            return options(chunk_byte_size=value.nbytes // value.shape[axis], shard_axes=(axis,))
        return options(chunk_byte_size=max(_CHUNKED_BYTES, value.nbytes // _PIECES))

    context.array.saving.scoped_storage_options_creator = chunks
    return context


def chunk_axis(shape: tuple[int, ...], nbytes: int) -> int | None:
    """The axis along which an array is stored in chunks; None if it is one chunk. `nbytes`: bytes of the array."""
    if nbytes <= _CHUNKED_BYTES:
        return None
    slices = (axis for axis, size in enumerate(shape) if _in_slices(size, nbytes))
    return next(slices, max(range(len(shape)), key=lambda axis: shape[axis]))


def _in_slices(size: int, nbytes: int) -> bool:
    """Whether an axis of `size` slices has one chunk a slice."""
    return size <= _MOST_SLICES and nbytes >= size * _SLICE_BYTES


class OrbaxWriter:
    """Saves groups of arrays into one Orbax checkpoint. It can continue the work of a stopped process.

    Groups are saved in `directory/params.partial_save`. `finish` makes `directory/params` of them.

    Args:
      directory: an existing directory.
      saved_groups: what `saved` returned when the journal was last written. Groups that a killed process saved after
        that are removed.

    Attributes:
      intact: whether all `saved_groups` are on the disk. If not, the conversion must start again.
    """

    def __init__(self, directory: Path, saved_groups: Iterable[str] = ()) -> None:
        self._directory = directory
        self._final = directory / PARAMS
        self._pending = directory / f"{PARAMS}.partial_save"
        self._context = _saving_context()
        wanted = set(saved_groups)
        for leftover in directory.glob(f"{PARAMS}.*"):
            if leftover != self._pending:
                _remove(leftover)
        groups = set(self.saved())
        for name in groups - wanted:
            _remove(self._pending / name)
        # The rename to `params` is the last step of a merge, so `params` is always complete.
        self.intact = self._final.exists() or wanted <= groups

    def save(self, arrays: Mapping[ArrayPath, np.ndarray]) -> None:
        """Saves one group, which is on the disk when this returns. Extra memory: about the largest array."""
        with self._context, quiet_orbax():
            ocp.partial.save(str(self._final), nest(arrays))

    def saved(self) -> list[str]:
        """Names of the groups saved so far."""
        return sorted(group.name for group in self._pending.iterdir()) if self._pending.exists() else []

    def finish(self) -> None:
        """Merges the groups into `directory/params`.

        Orbax's merge cannot be repeated once it has begun. Therefore it works on hard links to the groups: if the
        process is killed, the next one merges again. On a filesystem without hard links it works on the groups
        themselves: if the process is killed during the merge, the next one starts the conversion again.
        """
        if not self._final.exists():
            merged = self._directory / f"{PARAMS}.merge"
            try:
                shutil.copytree(self._pending, merged / self._pending.name, copy_function=_link)
            except (shutil.Error, OSError):
                _remove(merged)
                self._merge(self._final)
            else:
                self._merge(merged / PARAMS)
                (merged / PARAMS).rename(self._final)
        for leftover in self._directory.glob(f"{PARAMS}.*"):
            _remove(leftover)

    def _merge(self, path: Path) -> None:
        with self._context:
            ocp.partial.finalize(str(path))


def _link(source: str, target: str) -> None:
    # Small files may be metadata, and the merge rewrites metadata in place.
    if Path(source).stat().st_size < _COPIED_BYTES:
        shutil.copy2(source, target)
    else:
        os.link(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_sizes(params: Path) -> dict[str, int]:
    """Length in bytes of every file below `params`, by relative path."""
    files = (path for path in sorted(params.rglob("*")) if path.is_file())
    return {path.relative_to(params).as_posix(): path.stat().st_size for path in files}


def write_manifest(directory: Path) -> None:
    """Writes the lengths of all files to `directory/checkpoint.json`, by which a truncated copy is recognised."""
    manifest = {"format": "keye-jax", "version": 1, "files": file_sizes(directory / PARAMS)}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


class OrbaxSource:
    """The Orbax checkpoint in `directory/params`.

    Attributes:
      directory: its directory.
      files: all files in `params/`.
      entries: shape and dtype of every array, by path.
      problems: the problems of the files, one sentence each.

    Raises:
      UserError: the manifest or the metadata cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        # Orbax takes absolute paths only.
        self.directory = directory.absolute()
        self.entries: dict[ArrayPath, StoredArray] = {}
        self.problems: list[str] = []
        self._params = self.directory / PARAMS
        sizes = file_sizes(self._params)
        self.files = [self._params / name for name in sizes]
        self._check_manifest(sizes)
        if self.problems:
            return
        try:
            with quiet_orbax():
                tree = ocp.metadata(str(self._params)).metadata
        except Exception as error:
            raise UserError(f"{self._params} cannot be read as an Orbax checkpoint: {_first_line(error)}") from error
        if not isinstance(tree, Mapping):
            raise UserError(f"{self._params} cannot be read as an Orbax checkpoint: its metadata names no arrays")
        for path, leaf in flatten(tree).items():
            if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
                self.entries[path] = StoredArray(tuple(leaf.shape), np.dtype(leaf.dtype))
            else:
                self.problems.append(f"{'.'.join(path)}: it is not an array")

    def _check_manifest(self, sizes: dict[str, int]) -> None:
        manifest = self.directory / MANIFEST
        if not manifest.is_file():
            return
        expected = read_json(manifest).get("files")
        if not isinstance(expected, dict) or not all(type(size) is int and size >= 0 for size in expected.values()):
            raise UserError(
                f"{manifest} is not a checkpoint's manifest: it must be JSON with 'files', an object of sizes in bytes"
            )
        for name, size in expected.items():
            if name not in sizes:
                self.problems.append(f"{PARAMS}/{name}: it is missing")
            elif sizes[name] != size:
                self.problems.append(
                    f"{PARAMS}/{name}: it is truncated: it has {sizes[name]:,} bytes; it must have {size:,}"
                )

    def read(self, paths: Iterable[ArrayPath]) -> dict[ArrayPath, np.ndarray]:
        """Reads arrays into host memory. Memory: the arrays, and a second copy of the one being read.

        Raises:
          UserError: the data cannot be read.
        """
        loaded = self.restore({path: self.entries[path] for path in paths})
        return {path: np.asarray(array) for path, array in loaded.items()}

    def restore(self, requests: Mapping[ArrayPath, Any]) -> dict[ArrayPath, Any]:
        """Restores arrays. A request is a `jax.ShapeDtypeStruct` with a sharding, or a `StoredArray` for a numpy array.

        Raises:
          UserError: the data cannot be read.
        """
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        context.memory.read_concurrent_bytes = _READ_BYTES
        try:
            with context, quiet_orbax():
                return flatten(ocp.load(str(self._params), nest(requests)))
        except ValueError as error:
            raise UserError(f"{self._params}: the arrays cannot be read: {_first_line(error)}") from error

    def close(self) -> None:
        """Does nothing: no file stays open between reads."""


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences the log of Orbax, which repeats its exceptions and what is checked here."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def on_device(entry: StoredArray, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    """The request to restore an array onto devices. Default: the stored dtype, the default device."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(entry.shape, entry.dtype if dtype is None else dtype, sharding=sharding)
