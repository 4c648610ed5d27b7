"""`python -m pallas_kernels.bench`: times all operations on this machine's device, beside their baselines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.bench import plot, power, tables
from pallas_kernels.bench.cases import BenchCase, cases
from pallas_kernels.bench.layers import Layer, layers, summary
from pallas_kernels.bench.measure import Programs, measure
from pallas_kernels.bench.timing import copy_bandwidth, matmul_rate

LAYERS = "layer"
"""The value of `--operation` that measures attention of whole layers."""


def main() -> None:
    """Parses the command line, measures, prints the tables and writes the files."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("--operation", action="append", help="measure only this operation; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a machine without an accelerator")
    parser.add_argument(
        "--power", action="store_true", help="also run each kernel for two seconds, and show the GPU's clock and power"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw attention of whole layers to this SVG or PNG file"
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="measure nothing; read the figures from this file, which --json wrote",
    )
    arguments = parser.parse_args()
    if arguments.plot and (problem := plot.problem(arguments.plot)):
        parser.error(problem)
    for name, file in (("--json", arguments.json), ("--plot", arguments.plot)):
        if file and (file.is_dir() or not file.parent.is_dir()):
            parser.error(f"{name} is {str(file)!r}; it must be a file in a directory that exists")
    if arguments.power and not power.available():
        parser.error("--power needs nvidia-smi, which is not on the PATH")
    if arguments.source:
        try:
            result = json.loads(arguments.source.read_text())
        except (OSError, ValueError):
            result = None
        if not isinstance(result, dict) or not {"ceilings", "rows", "layers"} <= result.keys():
            parser.error(f"--from is {str(arguments.source)!r}; it must be a file that --json wrote")
    else:
        # PyTorch's baselines share the device's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        result = _measure(parser, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    tables.show(result)
    if arguments.plot:
        plot.draw(result, arguments.plot)


def _measure(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict[str, Any]:
    chosen, whole = cases(quick=arguments.quick), layers(quick=arguments.quick)
    operations = sorted({case.operation for case in chosen} | {LAYERS})
    for operation in arguments.operation or []:
        if operation not in operations:
            parser.error(f"--operation is {operation!r}; it must be one of: {', '.join(operations)}")
    wanted = set(arguments.operation or operations)
    chosen = [case for case in chosen if case.operation in wanted]
    whole = whole if LAYERS in wanted else []

    device = jax.devices()[0]
    ceilings: dict[str, float | None] = {"flops": None, "bytes": None}
    if not arguments.quick:
        ceilings = {"flops": matmul_rate(), "bytes": copy_bandwidth()}
    programs = Programs([*chosen, *(case for layer in whole for case in (*layer.chunks, layer.dense))])

    def rows_of(case: BenchCase) -> list[dict[str, Any]]:
        rows = measure(case, programs, ceilings, with_power=arguments.power)
        times = ", ".join(f"{row['candidate']} {row['seconds'] * 1e3:.3f} ms" for row in rows if "seconds" in row)
        print(f"{case.operation}, {case.size}: {times}", file=sys.stderr, flush=True)
        return rows

    dense: dict[int, list[dict[str, Any]]] = {}

    def summary_of(layer: Layer) -> dict[str, Any]:
        if layer.tokens not in dense:
            dense[layer.tokens] = rows_of(layer.dense)
        return summary(layer, [rows_of(case) for case in layer.chunks], dense[layer.tokens])

    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "ceilings": ceilings,
        "rows": [row for case in chosen for row in rows_of(case)],
        "layers": [summary_of(layer) for layer in whole],
    }


if __name__ == "__main__":
    main()
