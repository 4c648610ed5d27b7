"""Calls of kernels: refused on other platforms, one after the other under `jax.vmap`, and what differentiation does."""

from collections.abc import Callable
from typing import Any

import jax

# JAX has no public name for this setting.
from jax._src import config as jax_config
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.meshes import vary_like

PLATFORMS = {
    "mosaic_gpu": ("gpu", "cuda"),
    "cudnn": ("gpu", "cuda"),
    "mosaic_tpu": ("tpu",),
    "sparse_core": ("tpu",),
}
"""Names that JAX has for the platform that runs an implementation."""

DEVICES = {
    "mosaic_gpu": "Hopper GPUs",
    "cudnn": "NVIDIA GPUs from Ampere on",
    "mosaic_tpu": "TPUs",
    "sparse_core": "TPUs of the generations v5p, v6e and tpu7x",
}
"""The devices that run an implementation, in words."""


def interpreted(name: str) -> bool:
    """Whether kernels of this implementation are interpreted: inside `pltpu.force_tpu_interpret_mode`."""
    return "tpu" in PLATFORMS[name] and jax_config.pallas_tpu_interpret_mode_context_manager.value is not None


def call_kernel(
    operation: str, name: str, kernel: Callable, portable: Callable | None, arrays: tuple[jax.Array, ...]
) -> Any:
    """`kernel(*arrays)`.

    Differentiated, the call runs `portable`, whose gradient JAX knows. Under `jax.vmap` it is a loop over the calls.

    Args:
      operation: its name, for errors.
      name: of the implementation.
      kernel: the implementation, a function of arrays.
      portable: the portable implementation; None refuses differentiation.
      arrays: all vary over the same mesh axes.

    Raises:
      NotImplementedError: by the kernel.
      UnsupportedError: while the program is compiled for another platform, or differentiated without `portable`.
    """

    @jax.custom_batching.custom_vmap
    def run(*arrays: jax.Array) -> Any:
        if not interpreted(name):
            # The smallest: outside of jit the check is a program of its own, which copies its array.
            first = min(range(len(arrays)), key=lambda i: arrays[i].size)
            checked = _check_platform.bind(arrays[first], operation=operation, name=name)
            arrays = (*arrays[:first], checked, *arrays[first + 1 :])
        # Not every kernel says over which mesh axes its results vary.
        return vary_like(kernel(*arrays), *arrays)

    @run.def_vmap
    def one_after_the_other(size: int, batched: list[bool], *arrays: jax.Array) -> tuple[Any, Any]:
        del size
        mapped = [x for x, of_each in zip(arrays, batched, strict=True) if of_each]

        def call(mapped: list[jax.Array]) -> Any:
            each = iter(mapped)
            return run(*(next(each) if of_each else x for x, of_each in zip(arrays, batched, strict=True)))

        out = jax.lax.map(call, mapped)
        return out, jax.tree.map(lambda _: True, out)

    @jax.custom_vjp
    def differentiable(*arrays: jax.Array) -> Any:
        return run(*arrays)

    def forward(*arrays: jax.Array) -> tuple[Any, Any]:
        if portable is None:
            raise UnsupportedError(
                f"{operation}: the implementation {name!r} has no gradient; "
                "leave `implementation` out, or pass implementation='xla'"
            )
        return jax.vjp(portable, *arrays)

    differentiable.defvjp(forward, lambda pullback, cotangents: pullback(cotangents))
    return differentiable(*arrays)


_check_platform = Primitive("check_platform")
"""Gives its array back. A program that contains it does not compile for platforms that lack the implementation."""


@_check_platform.def_abstract_eval
def _(x: Any, **_: str) -> Any:
    return x


@_check_platform.def_impl
def _(x: jax.Array, **names: str) -> jax.Array:
    return jax.jit(lambda x: _check_platform.bind(x, **names))(x)


def _lower(context: Any, x: Any, *, operation: str, name: str) -> list[Any]:
    for platform in context.platforms or context.module_context.platforms:
        if platform not in PLATFORMS[name]:
            raise UnsupportedError(
                f"{operation}: the implementation {name!r} runs on {DEVICES[name]}, not on the platform {platform!r}; "
                "leave `implementation` out, or pass implementation='xla'"
            )
    return [x]


mlir.register_lowering(_check_platform, _lower)
