"""`python -m tests.gpu_compile.launches`: kernels that a layer launches, by XLA's compiler for H100s.

They are counted in the compiled programs of three layers and of two, without what devices exchange. XLA chooses among
its ways of a product by their times where there is a GPU, so some steps have a kernel more or less there: a product in
parts needs one more to add them up. It fails where experts of fewer bits take more kernels than those of 16 with the
same cache.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Literal

import jax

from keye_jax import presets
from keye_jax.cli.options import quantization, with_quantization
from keye_jax.config import KeyeConfig
from keye_jax.model.attention import AttentionOptions
from keye_jax.runtime import lowering
from tests.gpu_compile.steps import compile_step, hopper_runtime, use_compilers

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_KERNEL = re.compile(r"^ *(?:ROOT )?%\S+ = .*? (fusion|custom-call|sort|copy|reduce-window|scatter)\(", re.MULTILINE)
_EXPERTS = (None, "fp8", "int8", "int4")
_CACHES: tuple[Literal["float8_e4m3fn"] | None, ...] = (None, "float8_e4m3fn")


def main() -> int:
    """Parses the command line, compiles and prints; returns 1 if experts of fewer bits take more kernels."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_compile.launches", description=__doc__)
    parser.add_argument("--context", type=int, default=2**15, help="tokens of a prompt, and that a row has room for")
    parser.add_argument("--sharding", default="one_device", help="a preset")
    parser.add_argument("--devices", type=int, default=1, help="GPUs of one host that it is for")
    arguments = parser.parse_args()
    use_compilers(parser)
    few = arguments.devices
    print(f"experts  cache          prompt  decode x {few}  decode x 16")
    wrong = 0
    for cache in _CACHES:
        first: list[int] = []
        for experts in _EXPERTS:
            found = [launches(experts, cache, rows, arguments) for rows in (0, few, 16)]
            counts = f"{found[0]:6}  {found[1]:10}  {found[2]:11}"
            print(f"{experts or '-':7}  {cache or '-':13}  {counts}", flush=True)
            first = first or found
            wrong += any(one > other for one, other in zip(found, first, strict=True))
    return 1 if wrong else 0


def launches(
    experts: str | None, cache: Literal["float8_e4m3fn"] | None, rows: int, arguments: argparse.Namespace
) -> int:
    """Kernels of a layer in a step of decode of this number of rows, or with 0 in the last chunk of a prompt."""
    context, on = arguments.context, {"sharding": arguments.sharding, "devices": arguments.devices}
    config = with_quantization(KeyeConfig.from_file(presets.RELEASED), quantization(experts))
    counts: list[int] = []
    for layers in (2, 3):
        runtime = hopper_runtime(
            config, AttentionOptions(implementation="mosaic_gpu", cache_dtype=cache), layers=layers, **on
        )
        if rows:
            program = lowering.decode_program(runtime, rows, context)
        else:
            (program,) = lowering.prefill_programs(runtime, context, pages=runtime.table_width(context))
        counts.append(_count(compile_step(program).as_text() or ""))
    return counts[1] - counts[0]


def _count(text: str) -> int:
    """Instructions of a compiled program that are kernels, in the computations that the host or a graph runs."""
    bodies = dict(_COMPUTATION.findall(text))
    (entry,) = re.findall(r"^ENTRY %?(\S+) ", text, re.MULTILINE)
    graphs = [name for name in bodies if name.startswith("command_buffer")]
    return sum(len(_KERNEL.findall(bodies[name])) for name in {entry, *graphs})


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
