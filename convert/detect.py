"""What a path is, and what it needs to be a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from convert.reader import INDEX_NAME, SafetensorsSource
from convert.staging import is_unfinished
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError

if TYPE_CHECKING:
    from convert.orbax_io import OrbaxSource

Kind = Literal["safetensors", "orbax"]


def kind_of(path: str | Path) -> Kind:
    """What sort of checkpoint the directory `path` holds; nothing but file names is looked at.

    Raises:
      UserError: there is no such directory, or no checkpoint in it, or one whose conversion is not finished.
    """
    path = Path(path)
    if not path.is_dir():
        state = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {state}; a checkpoint is a directory")
    if is_unfinished(path):
        raise UserError(f"{path} is an unfinished conversion; run the command that began it again to finish it")
    if _has_safetensors(path):
        return "safetensors"
    if _has_orbax(path):
        return "orbax"
    raise UserError(f"{path} is not a checkpoint: it has neither {INDEX_NAME}, nor *.safetensors, nor Orbax's params/")


def has_weights(directory: Path) -> bool:
    """Whether there are weights of either kind in `directory`, or were meant to be."""
    return is_unfinished(directory) or _has_safetensors(directory) or _has_orbax(directory)


def _has_safetensors(directory: Path) -> bool:
    return (directory / INDEX_NAME).is_file() or any(directory.glob("*.safetensors"))


def _has_orbax(directory: Path) -> bool:
    return (directory / "params" / "_CHECKPOINT_METADATA").is_file()


def read_config(directory: Path) -> KeyeConfig:
    """The configuration that lies with a checkpoint.

    Raises:
      UserError: there is none, or it is wrong.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json; a checkpoint needs the one it was released with")
    return KeyeConfig.from_file(directory)


def open_source(directory: Path) -> SafetensorsSource | OrbaxSource:
    """The checkpoint in `directory`, its headers or metadata read.

    Raises:
      UserError: there is none, or its index or metadata cannot be read.
    """
    if kind_of(directory) == "safetensors":
        return SafetensorsSource(directory)
    from convert.orbax_io import OrbaxSource

    return OrbaxSource(directory)
