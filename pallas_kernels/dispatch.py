"""Choosing an implementation of an operation."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import UnsupportedError

IMPLEMENTATIONS = ("mosaic_gpu", "cudnn", "mosaic_tpu", "xla")
"""Names an operation may have implementations under, best first."""


@functools.cache
def available() -> tuple[str, ...]:
    """The implementations that this machine's default device can run, best first."""
    capability = _cuda_capability()
    runs = {
        "mosaic_gpu": capability == (9, 0),
        "cudnn": capability >= (8, 0),
        "mosaic_tpu": jax.default_backend() == "tpu",
        "xla": True,
    }
    return tuple(name for name in IMPLEMENTATIONS if runs[name])


def _cuda_capability() -> tuple[int, int]:
    """Compute capability of the default device; (0, 0) if it is no NVIDIA GPU."""
    if "cuda" not in jax.devices()[0].client.platform_version:
        return 0, 0
    major, minor = jax.devices()[0].compute_capability.split(".")
    return int(major), int(minor)


def dispatch(operation: str, candidates: Sequence[str], implementation: str | None) -> Callable:
    """Returns a function that calls the first of `candidates` that supports its arguments: arrays, then keywords.

    Args:
      operation: "folder.function"; an implementation is the function of that name in the folder's module of its name,
        imported when it is first tried, so that no platform needs what another one's kernels import.
      candidates: names of the implementations that there are, best first; one that does not support its arguments
        raises NotImplementedError.
      implementation: a name that forces one, wherever the program is to run, or the portable one where the operation
        has none of that name; None takes those that this machine's default device can run.

    Raises (when called):
      ValueError: `implementation` is no implementation's name.
      UnsupportedError: every candidate refused.
    """
    folder, function = operation.split(".")
    if implementation is None:
        chosen = [name for name in candidates if name in available()]
    elif implementation in IMPLEMENTATIONS:
        chosen = [implementation if implementation in candidates else "xla"]
    else:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation of {function} is {implementation!r}; it must be one of: {names}")

    def call(*arrays: Any, **kwargs: Any) -> Any:
        arrays = tuple(_as_array(array) for array in arrays)
        kwargs = {name: _as_array(x) if isinstance(x, np.ndarray) else x for name, x in kwargs.items()}
        reasons = []
        for name in chosen:
            module = importlib.import_module(f"pallas_kernels.{folder}.{name}")
            try:
                return getattr(module, function)(*arrays, **kwargs)
            except NotImplementedError as error:
                reasons.append(f"{name}: {error}")
        raise UnsupportedError(f"no implementation of {function} supports these arguments ({'; '.join(reasons)})")

    return call


def _as_array(x: Any) -> jax.Array:
    """An array of JAX; kernels read integers as int32."""
    x = jnp.asarray(x)
    return x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x
