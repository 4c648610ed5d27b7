"""Checkpoints: safetensors to Orbax and back, loading either, and looking into either.

convert(src, dst)            one kind into the other, bit by bit
load_params(path, config)    the model's arrays, from either kind
kind_of(path)                which kind a directory holds
mapping.rows(config)         the tensors of a configuration: names, paths and shapes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convert.detect import kind_of

if TYPE_CHECKING:
    from convert.conversion import Conversion, convert
    from convert.load import load_params

__all__ = ["Conversion", "convert", "kind_of", "load_params"]


def __getattr__(name: str) -> Any:
    # Orbax takes a second to import, which only these need.
    if name in ("convert", "Conversion"):
        from convert import conversion

        return getattr(conversion, name)
    if name == "load_params":
        from convert.load import load_params

        return load_params
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
