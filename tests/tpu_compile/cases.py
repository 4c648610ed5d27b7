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
class Simulation:
    """What the compiler's simulation is asked for in place of a whole program.

    It takes every number that an operand holds for 0, and needs minutes for a large grid. So it gets one unit of the
    work, one block of queries or one sequence, with constants in place of the numbers that decide how much there is to
    do.

    Attributes:
      function, arguments: the unit.
      units: how many of them the case has; a chip's cores share them.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    units: int = 1


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile for each generation.

    Attributes:
      kernel: name of the operation.
      shape: what is distinctive about the arguments.
      function: of arrays.
      arguments: pytrees of `jax.ShapeDtypeStruct`.
      flops, nbytes: useful work and necessary HBM traffic, our own arithmetic, for the roofline; None to leave it out.
      simulation: what is simulated; None for nothing.
      donated: numbers of the arguments whose memory the results take over.
      quick: compiled in `make test` as well.
      scratch: most HBM in bytes, beyond arguments and results, that it may take.
    """

    kernel: str
    shape: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float | None = None
    nbytes: float | None = None
    simulation: Simulation | None = None
    donated: tuple[int, ...] = ()
    quick: bool = False
    scratch: int = HBM_SCRATCH_BYTES


def spec(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


integers = functools.partial(spec, dtype=jnp.int32)
floats = functools.partial(spec, dtype=jnp.float32)


def all_cases() -> list[Case]:
    """Every module's cases."""
    return [case for name in MODULES for case in importlib.import_module(f"tests.tpu_compile.{name}").CASES]
