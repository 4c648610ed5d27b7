"""Finds out which kind of checkpoint a directory holds, and opens it."""

from __future__ import annotations

import collections
import dataclasses
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from convert import buckets, storage
from convert.reader import DTYPES, INDEX_NAME, SafetensorsSource
from convert.staging import is_unfinished
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError

if TYPE_CHECKING:
    from convert.orbax_io import OrbaxSource

Kind = Literal["safetensors", "orbax"]


def kind_of(path: str | Path) -> Kind:
    """The kind of the checkpoint at `path`, a directory or a bucket's URL, judged by file names.

    Raises:
      UserError: there is no such directory, it holds no checkpoint, or its conversion is not finished.
    """
    path = buckets.local(path)
    if (why := _why_no_directory(path)) is not None:
        raise UserError(f"{path} {why}; a checkpoint is a directory")
    name = buckets.shown(path)
    if is_unfinished(path):
        raise UserError(f"{path} is an unfinished conversion; repeat the command that began it")
    _refuse_pointers(path, name)
    if _has_safetensors(path):
        return "safetensors"
    if _has_orbax(path):
        return "orbax"
    raise UserError(f"{name} is not a checkpoint: it has neither {INDEX_NAME}, nor *.safetensors, nor Orbax's params/")


def _why_no_directory(path: Path) -> str | None:
    try:
        return None if stat.S_ISDIR(path.stat().st_mode) else "is a file"
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be opened ({getattr(error, 'strerror', None) or error})"


# What `git clone` leaves of large files where Git LFS is not installed.
_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024


def _refuse_pointers(directory: Path, name: str | Path) -> None:
    found = []
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.stat().st_size <= _POINTER_BYTES:
            with file.open("rb") as stream:
                if stream.read(len(_POINTER)) == _POINTER:
                    found.append(file.name)
    if found:
        files = (
            f"{found[0]} is a Git LFS pointer"
            if len(found) == 1
            else f"{len(found)} files, such as {found[0]}, are Git LFS pointers"
        )
        raise UserError(f"{name}: {files}, without the content; run: git lfs pull")


def has_weights(directory: Path) -> bool:
    """Whether `directory` holds weights of either kind, or an unfinished conversion."""
    return is_unfinished(directory) or _has_safetensors(directory) or _has_orbax(directory)


def _has_safetensors(directory: Path) -> bool:
    return (directory / INDEX_NAME).is_file() or any(directory.glob("*.safetensors"))


def _has_orbax(directory: Path) -> bool:
    return (directory / "params" / "_CHECKPOINT_METADATA").is_file()


def read_config(path: str | Path) -> KeyeConfig:
    """Reads the configuration of a checkpoint, or a `config.json`.

    Where it does not say the dtype of the weights, and weights lie beside it, the dtype is that of most of their bytes.

    Raises:
      UserError: there is no config.json, or it is not valid.
      FileNotFoundError: there is no such file.
    """
    path = buckets.local(path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{buckets.shown(path)} has no config.json; a checkpoint needs the one it was released with")
    config = KeyeConfig.from_file(path)
    if not config.dtype_is_assumed or not path.is_dir() or not has_weights(path):
        return config
    dtype = _dtype_of_weights(path)
    return config if dtype is None else dataclasses.replace(config, dtype=dtype, dtype_is_assumed=False)


def _dtype_of_weights(directory: Path) -> str | None:
    """The name of the dtype of most bytes of a checkpoint's weights; None if a model cannot have it."""
    source = open_source(directory)
    nbytes = collections.Counter[Any]()
    for entry in source.entries.values():
        dtype = DTYPES.get(entry.dtype) if isinstance(entry.dtype, str) else entry.dtype
        nbytes[dtype] += entry.nbytes
    source.close()
    most = max(nbytes, key=nbytes.__getitem__, default=None)
    return None if most is None or most not in DTYPES.values() else most.name


def open_source(directory: Path) -> SafetensorsSource | OrbaxSource:
    """Opens the checkpoint in `directory` and reads its headers or metadata.

    Raises:
      UserError: there is no checkpoint, or its index or metadata cannot be read.
    """
    directory = buckets.local(directory)
    kind = kind_of(directory)
    try:
        if kind == "safetensors":
            return SafetensorsSource(directory)
        from convert.orbax_io import OrbaxSource

        return OrbaxSource(directory)
    except OSError as error:
        raise UserError(f"{buckets.shown(directory)} cannot be read: {storage.reason(error) or error}") from error
