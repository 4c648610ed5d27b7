"""The Orbax side: arrays by module path, saved in groups into one checkpoint and read back a few at a time.

Arrays are saved with Orbax's partial saves: each group is on disk and atomic when `save` returns, and `finalize` merges
the groups' metadata into one checkpoint without copying data. The result is restored like any other Orbax checkpoint.
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

# The item of a converted checkpoint, and the file that says how long every file of the item has to be.
PARAMS = "params"
MANIFEST = "checkpoint.json"

# Bytes that Orbax may hold while it restores, besides the arrays themselves.
_READ_BYTES = 1 << 30
# Larger arrays are stored in chunks, so that several hosts can share them out: along the first axis of few and large
# slices, the experts' or the heads', or else in pieces of the longest axis.
_CHUNKED_BYTES = 1 << 20
_SLICE_BYTES, _MOST_SLICES, _PIECES = 1 << 17, 256, 64
# Metadata is smaller than this. Before a merge, smaller files are copied and larger ones linked.
_COPIED_BYTES = 1 << 20

ArrayPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array's shape and dtype; also what Orbax takes as a request to restore it as a numpy array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def nest(flat: Mapping[ArrayPath, Any]) -> dict[str, Any]:
    """A nested dict from paths."""
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
    # Trained weights in bf16 shrink by little, and uncompressed chunks are plain byte ranges.
    context.array.saving.use_compression = False
    # The caller leaves its arrays alone until the save returns, so Orbax needs no copy of its own.
    context.memory.deepcopy_host_arrays = False
    options = type(context.array.saving.storage_options)

    def chunks(key: Any, value: Any) -> Any:
        axis = chunk_axis(value.shape, value.nbytes)
        if axis is None:
            return None
        if _in_slices(value.shape[axis], value.nbytes):
            # One expert a chunk: every split of the experts over devices is then whole chunks.
            return options(chunk_byte_size=value.nbytes // value.shape[axis], shard_axes=(axis,))
        return options(chunk_byte_size=max(_CHUNKED_BYTES, value.nbytes // _PIECES))

    context.array.saving.scoped_storage_options_creator = chunks
    return context


def chunk_axis(shape: tuple[int, ...], nbytes: int) -> int | None:
    """The axis along which an array is stored in chunks; None if it is in one."""
    if nbytes <= _CHUNKED_BYTES:
        return None
    slices = (axis for axis, size in enumerate(shape) if _in_slices(size, nbytes))
    return next(slices, max(range(len(shape)), key=lambda axis: shape[axis]))


def _in_slices(size: int, nbytes: int) -> bool:
    """Whether an axis of so many slices is stored a slice a chunk."""
    return size <= _MOST_SLICES and nbytes >= size * _SLICE_BYTES


class OrbaxWriter:
    """Saves groups of arrays into one Orbax checkpoint, and can go on where another process stopped.

    Groups gather in `directory/params.partial_save`; only `finish` makes `directory/params`.

    Args:
      directory: an existing directory.
      saved_groups: what `saved` returned when the journal was last written. Groups that a killed process saved after
        that are removed.

    Attributes:
      intact: whether all of `saved_groups` is there. If not, the conversion has to begin again.
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
        # The rename to its final name is the last step of a merge, so `params` under that name is whole.
        self.intact = self._final.exists() or wanted <= groups

    def save(self, arrays: Mapping[ArrayPath, np.ndarray]) -> None:
        """Saves one group; it is on the disk when this returns. Memory: about the largest array once more."""
        with self._context, _quiet():
            ocp.partial.save(str(self._final), nest(arrays))

    def saved(self) -> list[str]:
        """Names of the groups so far; empty before the first."""
        return sorted(group.name for group in self._pending.iterdir()) if self._pending.exists() else []

    def finish(self) -> None:
        """Merges the groups into `directory/params`.

        Orbax's merge cannot be repeated once it has begun, so it works on a second set of links to the same data: a
        process that is killed here only merges again. Where the filesystem has no hard links it works on the groups
        themselves, and a process that is killed in these seconds begins the conversion again.
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
    # Small files may be metadata, which the merge rewrites in place.
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
    """Bytes of every file below `params`, by relative path."""
    files = (path for path in sorted(params.rglob("*")) if path.is_file())
    return {path.relative_to(params).as_posix(): path.stat().st_size for path in files}


def write_manifest(directory: Path) -> None:
    """Writes `directory/checkpoint.json`, by which a truncated copy of the checkpoint is told from a whole one."""
    manifest = {"format": "keye-jax", "version": 1, "files": file_sizes(directory / PARAMS)}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


class OrbaxSource:
    """The Orbax checkpoint in `directory/params`.

    Attributes:
      directory: where it is.
      files: the item's files.
      entries: shape and dtype of every array, by path.
      problems: what is wrong with the files, one sentence each.
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
            with _quiet():
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
        try:
            expected = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{manifest} is not a checkpoint's manifest: it must be JSON with 'files'") from error
        for name, size in expected.items():
            if name not in sizes:
                self.problems.append(f"{PARAMS}/{name}: it is missing")
            elif sizes[name] != size:
                self.problems.append(f"{PARAMS}/{name}: it is truncated: {sizes[name]:,} bytes, not {size:,}")

    def read(self, paths: Iterable[ArrayPath]) -> dict[ArrayPath, np.ndarray]:
        """These arrays in host memory. Memory: the arrays, and the one being read once more.

        Raises:
          UserError: the data cannot be read.
        """
        loaded = self.restore({path: self.entries[path] for path in paths})
        return {path: np.asarray(array) for path, array in loaded.items()}

    def restore(self, requests: Mapping[ArrayPath, Any]) -> dict[ArrayPath, Any]:
        """Restores the arrays of `requests`: `jax.ShapeDtypeStruct` with a sharding, or `StoredArray` for numpy.

        Raises:
          UserError: the data cannot be read.
        """
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        context.memory.read_concurrent_bytes = _READ_BYTES
        try:
            with context, _quiet():
                return flatten(ocp.load(str(self._params), nest(requests)))
        except ValueError as error:
            raise UserError(f"{self._params}: the arrays cannot be read: {_first_line(error)}") from error

    def close(self) -> None:
        """Nothing stays open between reads."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs what it also raises, or what we check ourselves."""
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
    """The request to restore an array onto devices: by default in its own dtype onto the default device."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(entry.shape, entry.dtype if dtype is None else dtype, sharding=sharding)
