"""`python -m tests.tpu_compile`: compiles all programs for every TPU generation and prints the compiler's figures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.tpu_compile.cases import CompileCase, all_cases
from tests.tpu_compile.compiler import CLOCK_HZ, TOPOLOGIES, Compiler, Figures, library


def main() -> int:
    """Parses the command line, compiles and prints; returns 1 if a program fails or takes too much memory."""
    parser = argparse.ArgumentParser(prog="python -m tests.tpu_compile", description=__doc__)
    parser.add_argument("--kernel", action="append", help="compile only this kernel; may be repeated")
    parser.add_argument(
        "--generation", action="append", choices=TOPOLOGIES, help="compile only for this generation; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="compile only the subset that `make test` compiles")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    arguments = parser.parse_args()
    path = library()
    if path is None:
        parser.error(
            "libtpu is not installed: `make test-tpu-compile` installs it, or set TPU_LIBRARY_PATH (Linux, x86-64)"
        )
    cases = [case for case in all_cases() if case.quick or not arguments.quick]
    kernels = sorted({case.kernel for case in cases})
    for kernel in arguments.kernel or []:
        if kernel not in kernels:
            parser.error(f"--kernel is {kernel!r}; it must be one of: {', '.join(kernels)}")

    compiler, rows, known = Compiler(path), [], {}
    for number, case in enumerate(all_cases()):
        if case not in cases or (arguments.kernel and case.kernel not in arguments.kernel):
            continue
        for generation in arguments.generation or TOPOLOGIES:
            rows.append(_row(number, case, generation, compiler, None if arguments.quick else known))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
    compiler.close()
    _print(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    failed = [row for row in rows if row["problem"]]
    for row in failed:
        print(f"{row['kernel']}, {row['shape']}, {row['generation']}: {row['problem']}", file=sys.stderr)
    print(f"{len(rows) - len(failed)} of {len(rows)} compiled within VMEM and scratch")
    return 1 if failed else 0


def _row(
    number: int,
    case: CompileCase,
    generation: str,
    compiler: Compiler,
    known: dict[tuple[str, str], tuple[int, int] | None] | None,
) -> dict:
    """The figures of a case.

    Args:
      known: `Compiler.kernel_cycles` of units by name and generation, to which those of a new unit are added. None
        simulates nothing.
    """
    row = {"kernel": case.kernel, "shape": case.shape, "generation": generation}
    try:
        figures = compiler.figures(number, generation)
    except RuntimeError as error:
        return row | {"problem": str(error)[:600]}
    row |= dataclasses.asdict(figures) | {"useful_flops": case.flops, "useful_bytes": case.nbytes}
    row["cycles"] = row["seconds"] = None
    unit = case.simulation
    if unit is None or known is None:
        return row | {"problem": _excess(case, figures)}
    if (key := (unit.name or f"case {number}", generation)) not in known:
        known[key] = compiler.kernel_cycles(number, generation)
    if cycles := known[key]:
        once, repeated = cycles
        row["cycles"] = (once + (unit.repeats - 1) * repeated) * -(-unit.units // figures.cores)
        row["seconds"] = row["cycles"] / CLOCK_HZ[generation]
    return row | {"problem": _excess(case, figures)}


def _excess(case: CompileCase, figures: Figures) -> str:
    if figures.vmem > figures.vmem_capacity:
        return f"takes {figures.vmem:,} bytes of VMEM; there are {figures.vmem_capacity:,}"
    if figures.scratch > case.scratch:
        return f"takes {figures.scratch:,} bytes of HBM beyond arguments and results; it may take {case.scratch:,}"
    return ""


def _cells(row: dict) -> list[str]:
    if "vmem" not in row:
        return ["does not compile"]
    return [
        f"{row['cycles']:,}" if row["cycles"] else "",
        f"{row['seconds'] * 1e3:.3f}" if row["seconds"] else "",
        f"{row['roofline_seconds'] * 1e3:.3f}" if row["roofline_seconds"] is not None else "",
        f"{row['flops'] / 1e9:.1f}",
        f"{row['nbytes'] / 1e6:.1f}",
        f"{row['vmem'] / 2**20:.1f} of {row['vmem_capacity'] / 2**20:.0f}",
        f"{row['scratch'] / 1e6:.1f}",
        f"{row['compile_seconds']:.1f}",
    ]


def _line(row: dict) -> str:
    return " | ".join([row["kernel"], row["shape"], row["generation"], *_cells(row)])


def _print(rows: list[dict]) -> None:
    table = Table("kernel", "shape", "for", "cycles", "ms", "roofline ms", "GFLOP", "MB", "VMEM MiB", "scratch MB", "s")
    for column in table.columns[3:]:
        column.justify = "right"
    for row in rows:
        table.add_row(row["kernel"], row["shape"], row["generation"], *_cells(row))
    Console(width=170).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
