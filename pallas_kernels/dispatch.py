"""Which implementations an operation has, and which of them runs."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import UnsupportedError

IMPLEMENTATIONS = ("mosaic_gpu", "cudnn", "mosaic_tpu", "xla")
"""Names of implementations, best first."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """Where an operation's implementations are.

    Attributes:
      folder: folder of `pallas_kernels`. An implementation is the function with the operation's name in the folder's
        module with the implementation's name.
      implementations: names of those that exist, best first.
    """

    folder: str
    implementations: tuple[str, ...] = ("mosaic_gpu", "mosaic_tpu", "xla")


OPERATIONS: Mapping[str, Operation] = {
    "indexer_scores": Operation("indexer_scores"),
    "select_topk": Operation("select_topk"),
    "sparse_attention": Operation("sparse_attention"),
    "topk_attention": Operation("topk_attention"),
    "flash_attention": Operation("flash_attention", ("cudnn", "mosaic_tpu", "xla")),
    "paged_flash_attention": Operation("flash_attention", IMPLEMENTATIONS),
    "grouped_matmul": Operation("grouped_matmul"),
    "expert_mlp": Operation("grouped_matmul"),
}
"""Every operation, by the name of its function."""


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


def resolve(operation: str, preferred: str | None) -> str | None:
    """The `implementation` to ask one operation for, when a caller has one preference for several operations.

    An operation refuses a name that it has no implementation of. A model that prefers the Hopper kernels wants them
    where they exist, and passes `implementation=resolve("flash_attention", "mosaic_gpu")`.

    Args:
      operation: a key of `OPERATIONS`.
      preferred: a name of `IMPLEMENTATIONS`, or None for no preference.

    Returns:
      `preferred` if the operation has it, else "xla", which every operation has; None for no preference.

    Raises:
      ValueError: `preferred` is no implementation's name.
    """
    _check_name(operation, preferred)
    return preferred if preferred is None or preferred in OPERATIONS[operation].implementations else "xla"


def dispatch(operation: str, implementation: str | None) -> Callable:
    """Chooses the implementation of an operation.

    Args:
      operation: a key of `OPERATIONS`.
      implementation: the name of the only one to try, on whatever device the program runs. None tries all that this
        machine's default device can run, best first.

    Returns:
      A function of the operation's arrays and keywords. It calls the first implementation that supports them, and
      imports an implementation only to try it, so that no platform needs another platform's packages. An
      implementation that does not support its arguments raises NotImplementedError.

      The function raises UnsupportedError where every implementation that it tries refuses the arguments.

    Raises:
      ValueError: `implementation` is no implementation's name.
      UnsupportedError: the operation has no implementation of that name.
    """
    _check_name(operation, implementation)
    existing = OPERATIONS[operation].implementations
    if implementation is None:
        chosen = [name for name in existing if name in available()]
    elif implementation in existing:
        chosen = [implementation]
    else:
        raise UnsupportedError(f"{operation} has no implementation {implementation!r}; it has: {', '.join(existing)}")

    def call(*arrays: Any, **kwargs: Any) -> Any:
        arrays = tuple(_as_array(array) for array in arrays)
        kwargs = {name: _as_array(x) if isinstance(x, np.ndarray) else x for name, x in kwargs.items()}
        reasons = []
        for name in chosen:
            try:
                return implementation_of(operation, name)(*arrays, **kwargs)
            except NotImplementedError as error:
                reasons.append(f"{name}: {error}")
        raise UnsupportedError(f"no implementation of {operation} supports these arguments ({'; '.join(reasons)})")

    return call


def implementation_of(operation: str, name: str) -> Callable:
    """The function that implements an operation under a name that the operation has."""
    return getattr(importlib.import_module(f"pallas_kernels.{OPERATIONS[operation].folder}.{name}"), operation)


def _check_name(operation: str, implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation of {operation} is {implementation!r}; it must be one of: {names}")


def _as_array(x: Any) -> jax.Array:
    """A JAX array; integers become int32, which kernels read."""
    x = jnp.asarray(x)
    return x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x
