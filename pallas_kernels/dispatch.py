"""Which implementations an operation has, and which of them runs."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.checks import Signature, Sizes
from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.kernel_call import DEVICES, PLATFORMS, call_kernel
from pallas_kernels.meshes import call_on_explicit_mesh, explicit_devices, explicit_mesh, vary_like

IMPLEMENTATIONS = ("mosaic_gpu", "cudnn", "mosaic_tpu", "sparse_core", "xla")
"""Names of implementations, best first."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """Where an operation's implementations are.

    Attributes:
      folder: folder of `pallas_kernels`. An implementation is the function with the operation's name in the folder's
        module with the implementation's name.
      implementations: names of those that exist, in the order in which they are tried.
    """

    folder: str
    implementations: tuple[str, ...] = ("mosaic_gpu", "mosaic_tpu", "xla")


OPERATIONS: Mapping[str, Operation] = {
    "indexer_scores": Operation("indexer_scores"),
    # The SparseCores' kernel runs by name only, until a TPU has measured it.
    "select_topk": Operation("select_topk", ("mosaic_gpu", "mosaic_tpu", "xla", "sparse_core")),
    "nucleus": Operation("nucleus"),
    "sparse_attention": Operation("sparse_attention"),
    "topk_attention": Operation("topk_attention"),
    "flash_attention": Operation("flash_attention", ("cudnn", "mosaic_tpu", "xla")),
    "paged_flash_attention": Operation("flash_attention", ("mosaic_gpu", "cudnn", "mosaic_tpu", "xla")),
    "grouped_matmul": Operation("grouped_matmul"),
    "expert_mlp": Operation("grouped_matmul"),
    # What these two run where matrices have fewer bits.
    "quantized_grouped_matmul": Operation("grouped_matmul", ("mosaic_gpu", "xla")),
    "quantized_expert_mlp": Operation("grouped_matmul", ("mosaic_gpu", "xla")),
    "finish_projections": Operation("decode_layer", ("mosaic_gpu", "xla")),
    "route": Operation("decode_layer", ("mosaic_gpu", "xla")),
    "gather_tokens": Operation("decode_layer", ("mosaic_gpu", "xla")),
    "combine_experts": Operation("decode_layer", ("mosaic_gpu", "xla")),
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
        "sparse_core": jax.default_backend() == "tpu" and _has_sparse_cores(),
        "xla": True,
    }
    return tuple(name for name in IMPLEMENTATIONS if runs[name])


def _has_sparse_cores() -> bool:
    """Whether programs run on the SparseCores of the default device, a TPU."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.get_tpu_info().sparse_core is not None


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
      ArgumentError: `preferred` is no implementation's name.
    """
    _check_name(operation, preferred)
    return preferred if preferred is None or preferred in OPERATIONS[operation].implementations else "xla"


def candidates(operation: str, implementation: str | None) -> list[str]:
    """The implementations of an operation to try, in order.

    Args:
      operation: a key of `OPERATIONS`.
      implementation: the name of the only one, or None for all that this machine's default device can run, best first.

    Raises:
      ArgumentError: `implementation` is no implementation's name.
      UnsupportedError: the operation has no implementation of that name, or this machine has another device of the
        platform. Of another platform there may be a device to compile for, so that is refused later.
    """
    _check_name(operation, implementation)
    existing = OPERATIONS[operation].implementations
    if implementation is None:
        return [name for name in existing if name in available()]
    if implementation not in existing:
        raise UnsupportedError(f"{operation} has no implementation {implementation!r}; it has: {', '.join(existing)}")
    if implementation not in available() and jax.default_backend() in PLATFORMS[implementation]:
        raise UnsupportedError(
            f"{operation}: the implementation {implementation!r} runs on {DEVICES[implementation]}, "
            f"not on {jax.devices()[0].device_kind}; leave `implementation` out, or pass implementation='xla'"
        )
    return [implementation]


def dispatch(signature: Signature, implementation: str | None, arrays: Mapping[str, Any], **static: Any) -> Any:
    """Checks the arguments of an operation, and runs the first implementation that supports them.

    An implementation is imported only to try it, so that no platform needs another platform's packages. One that does
    not support its arguments raises NotImplementedError. Where a size is 0, none runs.

    Args:
      signature: of the operation.
      implementation: as for `candidates`.
      arrays: the arguments by name.
      static: further arguments of the implementations, known while the program is traced.

    Returns:
      The operation's results.

    Raises:
      ArgumentError: a shape or dtype does not fit. `implementation` is no implementation's name.
      UnsupportedError: every implementation that is tried refuses the arguments, or cannot run where it is asked to.
    """
    chosen = candidates(signature.operation, implementation)
    checked, sizes = signature.check(**arrays)
    given = [x for x in checked.values() if x is not None]
    mesh = explicit_mesh(given)

    def run(arrays: dict[str, Any]) -> Any:
        arrays = vary_like(arrays, *jax.tree.leaves(arrays))
        if sizes.nothing_to_do:
            return vary_like(_nothing(signature, arrays, sizes), *jax.tree.leaves(arrays))
        return _first_supported(signature.operation, implementation, chosen, arrays, static)

    if mesh is None:
        return run(checked)
    if explicit_devices(mesh) > 1:
        chosen = [name for name in chosen if name == "xla"]
        if not chosen:
            raise UnsupportedError(
                f"{signature.operation}: the implementation {implementation!r} cannot divide its work among devices; "
                "call it inside jax.shard_map, or pass implementation='xla'"
            )
    return call_on_explicit_mesh(run, checked, signature, sizes, mesh)


def _first_supported(
    operation: str, implementation: str | None, chosen: list[str], arrays: dict[str, Any], static: dict[str, Any]
) -> Any:
    names = [name for name, array in arrays.items() if array is not None]
    operands = tuple(arrays[name] for name in names)

    def function(name: str) -> Callable:
        def run(*operands: jax.Array) -> Any:
            given = dict.fromkeys(arrays) | dict(zip(names, operands, strict=True))
            return implementation_of(operation, name)(**given, **static)

        return run

    reasons = []
    for name in chosen:
        try:
            if name == "xla":
                return function(name)(*operands)
            portable = function("xla") if implementation is None else None
            return call_kernel(operation, name, function(name), portable, operands)
        except UnsupportedError:
            raise
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise UnsupportedError(f"no implementation of {operation} supports these arguments ({'; '.join(reasons)})")


def _nothing(signature: Signature, arrays: dict[str, Any], sizes: Sizes) -> Any:
    """Results where some size is 0."""
    found = []
    for result in signature.results:
        dtype = arrays[result.dtype].dtype if result.dtype in arrays else result.dtype
        found.append(jnp.full(sizes.of(result.shape), result.nothing, dtype))
    return found[0] if len(found) == 1 else tuple(found)


def implementation_of(operation: str, name: str) -> Callable:
    """The function that implements an operation under a name that the operation has."""
    return getattr(importlib.import_module(f"pallas_kernels.{OPERATIONS[operation].folder}.{name}"), operation)


def _check_name(operation: str, implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ArgumentError(f"implementation of {operation} is {implementation!r}; it must be one of: {names}")
