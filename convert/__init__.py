"""Converts, loads and inspects checkpoints of two kinds, safetensors and Orbax.

convert(src, dst)              converts either kind into the other, bit by bit
load_params(path, config)      loads the model's arrays from either kind
abstract_params(path, config)  says what they are, without reading them
kind_of(path)                  tells the kind of the checkpoint in a directory
mapping.rows(config)           lists the tensors of a configuration: names, paths and shapes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convert.detect import kind_of

if TYPE_CHECKING:
    from convert.conversion import Conversion, convert
    from convert.load import abstract_params, load_params

__all__ = ["Conversion", "abstract_params", "convert", "kind_of", "load_params"]


def __getattr__(name: str) -> Any:
    # Only these need Orbax, whose import takes a second.
    if name in ("convert", "Conversion"):
        from convert import conversion

        return getattr(conversion, name)
    if name in ("abstract_params", "load_params"):
        from convert import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
