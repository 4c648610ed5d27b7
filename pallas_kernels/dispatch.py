"""Choosing an implementation of an operation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

IMPLEMENTATIONS = ("xla",)
"""Names an operation may have implementations under, best first."""


def dispatch(operation: str, candidates: Mapping[str, Callable[..., Any]], implementation: str | None) -> Callable:
    """Returns a function that calls the first of `candidates` that supports its arguments: arrays, then keywords.

    Args:
      operation: name for error messages.
      candidates: implementations by name, best first; one that does not support its arguments raises
        NotImplementedError.
      implementation: a name that forces one, or None.

    Raises (when called):
      ValueError: `implementation` is not the name of a candidate.
      NotImplementedError: every candidate refused; the message lists each one's reason.
    """
    if implementation is not None and implementation not in candidates:
        names = ", ".join(candidates)
        raise ValueError(f"implementation of {operation} is {implementation!r}; it must be one of: {names}")
    chosen = candidates if implementation is None else {implementation: candidates[implementation]}

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
