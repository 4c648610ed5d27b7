"""Writes Orbax checkpoints group by group, and reads any of their arrays.

Arrays are named by module path. Each group is one of Orbax's partial saves, which are atomic: the group is on the disk
when `save` returns. `finalize` merges the metadata of the groups into one checkpoint, and copies no data. The result is
restored like any other Orbax checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from convert import buckets, storage
from convert.manifest import Manifest
from convert.orbax_bucket import BucketArrays
from convert.orbax_layout import ArrayPath, StoredArray, chunk_axis, flatten, in_slices, nest, piece_bytes
from keye_jax.errors import UserError, shorten_name

# The directory of the arrays in a converted checkpoint.
PARAMS = "params"

# Bytes that Orbax may use while it restores, besides the arrays.
_READ_BYTES = 1 << 30
# Metadata files are smaller than this. Before a merge, smaller files are copied and larger ones are linked.
_COPIED_BYTES = 1 << 20


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
        if in_slices(value.shape[axis], value.nbytes):
            # With one expert a chunk, each device reads whole chunks, however the experts are split.
            return options(chunk_byte_size=value.nbytes // value.shape[axis], shard_axes=(axis,))
        return options(chunk_byte_size=piece_bytes(value.nbytes))

    context.array.saving.scoped_storage_options_creator = chunks
    return context


class OrbaxWriter:
    """Saves groups of arrays into one Orbax checkpoint. It can continue the work of a stopped process.

    Groups are saved in `work/params.partial_save`. `finish` makes a checkpoint of them.

    Args:
      work: an existing directory for the groups.
      kept: names of the groups that an earlier process saved and that count. Others are removed.
    """

    def __init__(self, work: Path, kept: Iterable[str] = ()) -> None:
        self._work = work
        self._pending = work / f"{PARAMS}.partial_save"
        self._context = _saving_context()
        for leftover in work.iterdir():
            if leftover != self._pending:
                _remove(leftover)
        for name in set(self.saved()) - set(kept):
            _remove(self._pending / name)

    def save(self, arrays: Mapping[ArrayPath, np.ndarray]) -> None:
        """Saves one group, which is on the disk when this returns. Extra memory: about the largest array."""
        with self._context, quiet_orbax():
            ocp.partial.save(str(self._work / PARAMS), nest(arrays))

    def saved(self) -> list[str]:
        """Names of the groups saved so far."""
        return sorted(group.name for group in self._pending.iterdir()) if self._pending.exists() else []

    def group(self, name: str) -> Path:
        """The directory of a group."""
        return self._pending / name

    def finish(self, params: Path) -> None:
        """Merges the groups into the directory `params`, which does not exist.

        Orbax's merge cannot be repeated once it has begun. Therefore it works on hard links to the groups: if the
        process is killed, the next one merges again. On a filesystem without hard links it works on the groups
        themselves: if the process is killed then, the next one starts the conversion again.
        """
        merged = self._work / "merge"
        try:
            shutil.copytree(self._pending, merged / self._pending.name, copy_function=_link)
        except (shutil.Error, OSError):
            _remove(merged)
            merged = self._work
        self._merge(merged / PARAMS)
        (merged / PARAMS).rename(params)

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


class OrbaxSource:
    """The Orbax checkpoint in `directory/params`, or in the bucket whose small files `directory` has.

    Attributes:
      directory: its directory.
      files: all files in `params/` on this machine.
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
        self._shown = f"{buckets.shown(self.directory)}/{PARAMS}"
        url = buckets.origin(self.directory)
        self._bucket = None if url is None else BucketArrays(f"{url}/{PARAMS}", self._params)
        manifest = Manifest.read(self.directory)
        weights = {} if manifest is None else {n: r.size for n, r in manifest.files.items() if n.startswith(PARAMS)}
        if url is None:
            sizes = {f"{PARAMS}/{name}": size for name, size in file_sizes(self._params).items()}
        else:
            sizes = buckets.Bucket(url).sizes(weights)
        self.files = [self.directory / name for name in sizes]
        if manifest is not None:
            self.problems += manifest.wrong_sizes(sizes)
        if not self.problems:
            self._read_metadata()

    def _read_metadata(self) -> None:
        try:
            if self._bucket is not None:
                self.entries = self._bucket.entries()
                return
            with quiet_orbax():
                tree = ocp.metadata(str(self._params)).metadata
        except Exception as error:
            raise UserError(f"{self._shown} cannot be read as an Orbax checkpoint: {_cause(error)}") from error
        if not isinstance(tree, Mapping):
            raise UserError(f"{self._shown} cannot be read as an Orbax checkpoint: {_without_arrays(self._params)}")
        for path, leaf in flatten(tree).items():
            if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
                self.entries[path] = StoredArray(tuple(leaf.shape), np.dtype(leaf.dtype))
            else:
                self.problems.append(f"{'.'.join(path)}: it is not an array")

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
            if self._bucket is not None:
                return self._bucket.restore(requests)
            with context, quiet_orbax():
                return flatten(ocp.load(str(self._params), nest(requests)))
        except (ValueError, OSError, KeyError, ExceptionGroup) as error:
            raise UserError(f"{self._shown}: the arrays cannot be read: {_cause(error)}") from error

    def close(self) -> None:
        """Does nothing: no file stays open between reads."""


@functools.cache
def _drop_late_callbacks() -> None:
    """Silences what Python prints when one array fails, and Orbax leaves the others to end by themselves."""
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)):
            before(unraisable)

    sys.unraisablehook = hook


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences the log of Orbax, which repeats its exceptions and what is checked here."""
    _drop_late_callbacks()
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


_FILE = re.compile(rf"[/\w.-]*/({PARAMS}/[\w./-]+)")


def _cause(error: Exception) -> str:
    """What a library says of a file that cannot be read, in one short line that names the file if it can be told."""
    if (why := storage.reason(error)) is not None:
        return why
    text = " ".join(str(error).split())
    # The innermost file comes last.
    if (named := [file for file in _FILE.findall(text) if not file.endswith("/")]) and "/" in named[-1]:
        return f"{named[-1]} is {'missing' if 'NOT_FOUND' in text or 'No such file' in text else 'damaged'}"
    return shorten_name(text or type(error).__name__)


def _without_arrays(params: Path) -> str:
    """Why Orbax, which does not say it, finds no arrays in a directory."""
    folders = [path.parent for path in (*params.glob("_METADATA"), *params.glob("*/_METADATA"))]
    if not folders:
        return "its _METADATA is missing"
    if not any((folder / "manifest.ocdbt").exists() for folder in folders) and not any(params.rglob(".zarray")):
        return f"{PARAMS}/{folders[0].relative_to(params) / 'manifest.ocdbt'} is missing"
    try:
        BucketArrays(f"file://{params}", params).entries()
    except (ValueError, OSError, LookupError) as error:
        return _cause(error.__cause__ if isinstance(error.__cause__, Exception) else error)
    return "its metadata names no arrays"


def on_device(entry: StoredArray, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    """The request to restore an array onto devices. Default: the stored dtype, the default device."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(entry.shape, entry.dtype if dtype is None else dtype, sharding=sharding)
