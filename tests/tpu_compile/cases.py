"""The programs compiled for TPUs: every kernel at the released model's shapes, a decoder layer, the vision encoder.

Each module named in `MODULES` holds its own `CASES`. Those that take longest to compile come first.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

MODULES = ("model_cases", "index_cases", "attention_cases")
HBM_SCRATCH_BYTES = 3 * 10**9
"""Most HBM that a program may take beyond its arguments and results."""


@dataclasses.dataclass(frozen=True)
class Simulation:
    """One unit of a program's work, for the compiler's simulation.

    The simulation takes every operand for 0, and needs minutes for a large grid. So it gets one unit of the work, a
    block of queries or a sequence. Constants replace the operands that decide how much work there is.

    Attributes:
      function, arguments: the unit.
      units: number of units in the case; the cores of a device share them.
      repeats: how often a core repeats the simulated work for each unit: one core does all of a unit.
      less_work: the same unit with fewer keys. If given, only what the other keys add is repeated: start, end and masks
        are counted once for each unit.
      name: of the unit. Cases whose units have one name have the same unit, which is simulated once.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    units: int = 1
    repeats: int = 1
    name: str = ""
    less_work: Simulation | None = None


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """One program to compile for each generation.

    Attributes:
      kernel: name of the operation.
      shape: words that tell this program from the operation's others.
      function: a function of arrays.
      arguments: pytrees of `jax.ShapeDtypeStruct`.
      flops, nbytes: useful FLOPs and necessary bytes of HBM traffic by our own arithmetic; None to leave them out.
      simulation: the unit to simulate; None for no simulation.
      donated: numbers of the arguments whose memory the results take over.
      quick: whether `make test` compiles it too.
      scratch: most bytes of HBM that it may take beyond arguments and results.
      generations: those that it is compiled for; none means all.
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
    generations: tuple[str, ...] = ()


def all_cases() -> list[CompileCase]:
    """The cases of all modules."""
    return [case for name in MODULES for case in importlib.import_module(f"tests.tpu_compile.{name}").CASES]
