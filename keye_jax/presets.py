"""The configuration files that come with the package: `configs/` of the checkout, or its installed copy."""

from __future__ import annotations

from pathlib import Path

from keye_jax.errors import UserError

_INSTALLED, _CHECKOUT = Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs"

DIRECTORY = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
"""Where the files are: `model/*.json`, `sharding/*.yaml`."""

RELEASED = DIRECTORY / "model" / "keye_vl_2_30b_a3b.json"
"""Configuration of the released model."""

TINY = DIRECTORY / "model" / "tiny.json"
"""Configuration of a model that runs anywhere in seconds."""


def sharding_file(name: str | Path) -> Path:
    """The sharding file of a preset's name, such as "expert", or of a path.

    Raises:
      UserError: there is neither such a preset nor such a file.
    """
    presets = {path.stem: path for path in sorted((DIRECTORY / "sharding").glob("*.yaml"))}
    if str(name) in presets:
        return presets[str(name)]
    if not Path(name).is_file():
        raise UserError(f"--sharding is {str(name)!r}; it must be a file or one of: {', '.join(presets)}")
    return Path(name)
