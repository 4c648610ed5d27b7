"""Keye-VL-2.0-30B-A3B in JAX."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

# Looked up when they are used, so that importing this package, as every module of it does, stays free of JAX. It takes
# next to no time, since Ctrl-C is not handled before.
_LIBRARY = {
    "Engine": "keye_jax.engine.engine",
    "EngineOptions": "keye_jax.engine.options",
    "Request": "keye_jax.engine.request",
    "RequestError": "keye_jax.engine.request",
    "SamplingParams": "keye_jax.runtime.sampling",
}


def __getattr__(name: str) -> Any:
    """The names of the library: `from keye_jax import Engine, EngineOptions, Request, RequestError, SamplingParams`."""
    if name not in _LIBRARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LIBRARY[name]), name)
