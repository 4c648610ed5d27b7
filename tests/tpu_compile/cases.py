"""What is compiled for TPUs: every kernel at the released model's shapes, one decoder layer, the vision encoder.

A module of cases holds `CASES`; `MODULES` names them all.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MODULES = ("index_cases", "attention_cases", "model_cases")
PAGE = 64
TOP_K = 2048
HBM_SCRATCH_BYTES = 3 * 10**9


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile for each generation.

    Attributes:
      kernel: name of the operation.
      shape: what is distinctive about the arguments.
      function: of arrays.
      simulated: the same with the values in place of the scalars that decide how much there is to do, which the
        compiler's simulation cannot know; None where there are none.
      arguments: pytrees of `jax.ShapeDtypeStruct`.
      flops, nbytes: useful work and necessary HBM traffic, our own arithmetic, for the roofline; None to leave it out.
      quick: compiled in `make test` as well.
      scratch: most HBM in bytes, beyond arguments and results, that it may take.
    """

    kernel: str
    shape: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float | None = None
    nbytes: float | None = None
    simulated: Callable[..., Any] | None = None
    quick: bool = False
    scratch: int = HBM_SCRATCH_BYTES


def spec(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


integers = functools.partial(spec, dtype=jnp.int32)
floats = functools.partial(spec, dtype=jnp.float32)


def all_cases() -> list[Case]:
    """Every module's cases."""
    return [case for name in MODULES for case in importlib.import_module(f"tests.tpu_compile.{name}").CASES]
