"""Choosing an implementation of an operation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("mosaic_gpu", "xla")
"""Names an operation may have implementations under, best first."""


@functools.cache
def available() -> tuple[str, ...]:
    """The implementations that this machine's default device can run, best first."""
    return tuple(name for name in IMPLEMENTATIONS if name != "mosaic_gpu" or _on_hopper())


def _on_hopper() -> bool:
    return jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def dispatch(operation: str, candidates: Mapping[str, Callable[..., Any]], implementation: str | None) -> Callable:
    """Returns a function that calls the first of `candidates` that supports its arguments: arrays, then keywords.

    Args:
      operation: name for error messages.
      candidates: implementations by name, best first; one that does not support its arguments raises
        NotImplementedError.
      implementation: a name that forces one, wherever the program is to run; None takes those that this machine's
        default device can run.

    Raises (when called):
      ValueError: `implementation` is not the name of a candidate.
      NotImplementedError: every candidate refused; the message lists each one's reason.
    """
    if implementation is None:
        chosen = {name: function for name, function in candidates.items() if name in available()}
    elif implementation in candidates:
        chosen = {implementation: candidates[implementation]}
    else:
        names = ", ".join(candidates)
        raise ValueError(f"implementation of {operation} is {implementation!r}; it must be one of: {names}")

    def call(*arrays: Any, **kwargs: Any) -> Any:
        arrays = tuple(jnp.asarray(array) for array in arrays)
        reasons = []
        for name, function in chosen.items():
            try:
                return function(*arrays, **kwargs)
            except NotImplementedError as error:
                reasons.append(f"{name}: {error}")
        raise NotImplementedError(f"no implementation of {operation} supports these arguments ({'; '.join(reasons)})")

    return call
