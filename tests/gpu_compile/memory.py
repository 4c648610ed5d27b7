"""`python -m tests.gpu_compile.memory`: what steps of prefill take by XLA's compiler for an H100, beside the estimates.

Two layers of the released model, whose steps take what all layers' do: a layer's memory is free for the next. It fails
where they differ by more than 10%, or where more layers take more.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Literal

import jax

from keye_jax import presets
from keye_jax.cli.options import quantization, with_quantization
from keye_jax.config import KeyeConfig
from keye_jax.model.attention import AttentionOptions
from keye_jax.runtime import lowering
from keye_jax.runtime.memory import prefill_workspace_bytes
from keye_jax.sharding import MeshRules
from tests.gpu_compile.steps import compile_step, hopper_runtime, use_compilers

MOST = 0.10
"""Share of what the compiler says by which an estimate may differ."""

_MORE_LAYERS = 6
_GROWTH = 0.06
"""Share by which a step of `_MORE_LAYERS` layers may take more than one of two."""

type _Case = tuple[str, Literal["float8_e4m3fn"] | None, int, int]

_FLOAT8: Literal["float8_e4m3fn"] = "float8_e4m3fn"
_QUICK: list[_Case] = [("mosaic_gpu", _FLOAT8, 8192, 2**15), ("xla", _FLOAT8, 8192, 2**15)]


def main() -> int:
    """Parses the command line, compiles and prints; returns 1 if an estimate is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_compile.memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="compile only what a test compiles")
    parser.add_argument("--experts", help="bits of the experts: fp8, int8 or int4")
    arguments = parser.parse_args()
    use_compilers(parser)
    config = with_quantization(KeyeConfig.from_file(presets.RELEASED), quantization(arguments.experts))
    every = itertools.product(
        ("mosaic_gpu", "xla"), (None, _FLOAT8), (1024, 2048, 4096, 8192), (2**13, 2**15, 2**17, 2**18)
    )
    wrong = 0
    print("implementation  cache           chunk  context  compiled  estimate  of it")
    for implementation, cache, chunk, context in _QUICK if arguments.quick else every:
        options = AttentionOptions(implementation=implementation, cache_dtype=cache)
        compiled = workspace_bytes(config, options, chunk, context, layers=2)
        estimate = prefill_workspace_bytes(
            config, MeshRules.single_device(), chunk, context, implementation=implementation, cache_dtype=cache
        )
        sizes = f"{compiled / 2**30:8.3f}  {estimate / 2**30:8.3f}  {estimate / compiled:5.2f}"
        print(f"{implementation:14}  {cache or '-':13}  {chunk:6,} {context:8,}  {sizes}", flush=True)
        wrong += abs(estimate / compiled - 1) > MOST
        if arguments.quick:
            more = workspace_bytes(config, options, chunk, context, layers=_MORE_LAYERS)
            print(f"with {_MORE_LAYERS} layers {more / 2**30:.3f}", flush=True)
            wrong += more / compiled - 1 > _GROWTH
    if wrong:
        print(f"{wrong} differ too much", file=sys.stderr)
    return 1 if wrong else 0


def workspace_bytes(config: KeyeConfig, options: AttentionOptions, chunk: int, context: int, *, layers: int) -> int:
    """Bytes that a step needs beside its arguments, of the last chunk of a prompt, by the compiler."""
    runtime = hopper_runtime(config, options, layers=layers, prefill_chunk=chunk)
    (program,) = lowering.prefill_programs(runtime, context, pages=runtime.table_width(context))
    found = compile_step(program).memory_analysis()
    assert found is not None, "this compiler says it"
    return found.temp_size_in_bytes + found.generated_code_size_in_bytes


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
