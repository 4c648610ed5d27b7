"""The configuration files that come with the package: `configs/` of a checkout, or the installed copy of it."""

from __future__ import annotations

from pathlib import Path

from keye_jax.errors import UserError

_INSTALLED, _CHECKOUT = Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs"

DIRECTORY = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
"""The folder that holds `model/*.json`, `sharding/*.yaml` and `train/*.yaml`."""

RELEASED = DIRECTORY / "model" / "keye_vl_2_30b_a3b.json"
"""Configuration of the released model."""

TINY = DIRECTORY / "model" / "tiny.json"
"""Configuration of a model that runs on any machine in seconds."""

EMBEDDED = DIRECTORY / "model" / "embedded.json"
"""Configuration of the small model that answers questions about the generated world."""

EMBEDDED_CHECKPOINT = Path(__file__).parent / "embedded"
"""Folder of that model with its weights, in the released layout."""


def sharding_file(name: str | Path) -> Path:
    """The path of a sharding file.

    Args:
      name: a preset's name, such as "expert", or a path.

    Raises:
      UserError: there is no such preset and no such file.
    """
    return _preset("sharding", "--sharding", name)


def train_file(name: str | Path) -> Path:
    """The path of a stage file, from a preset's name, such as "lora", or a path. Raises UserError as above."""
    return _preset("train", "--config", name)


def _preset(kind: str, option: str, name: str | Path) -> Path:
    presets = {path.stem: path for path in sorted((DIRECTORY / kind).glob("*.yaml"))}
    if str(name) in presets:
        return presets[str(name)]
    if not Path(name).is_file():
        raise UserError(f"{option} is {str(name)!r}; it must be a file or one of the presets: {', '.join(presets)}")
    return Path(name)
