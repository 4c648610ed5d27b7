"""`python -m tests.tpu_compile`: compiles all programs for every TPU generation and prints the compiler's figures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.tpu_compile.cases import CompileCase, all_cases
from tests.tpu_compile.compiler import CLOCK_HZ, TOPOLOGIES, Compiler, Cycles, Figures, library


def main() -> int:
    """Parses the command line, compiles and prints; returns 1 if a program fails or takes too much memory."""
    parser = argparse.ArgumentParser(prog="python -m tests.tpu_compile", description=__doc__)
    parser.add_argument("--kernel", action="append", help="compile only this kernel; may be repeated")
    parser.add_argument(
        "--generation", action="append", choices=TOPOLOGIES, help="compile only for this generation; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="compile only the subset that `make test` compiles")
    parser.add_argument(
        "--estimate", action="store_true", help="simulate units of the kernels' work too, for cycles and milliseconds"
    )
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

    # Two processes: both compile, or one compiles while the other simulates.
    simulator, tasks = Compiler(path, simulates=True), []
    compilers = [Compiler(path) for _ in range(1 if arguments.estimate else 2)]
    idle: queue.SimpleQueue[Compiler] = queue.SimpleQueue()
    for compiler in compilers:
        idle.put(compiler)

    def compiled(number: int, generation: str) -> Figures:
        compiler = idle.get()
        try:
            return compiler.figures(number, generation)
        finally:
            idle.put(compiler)

    with ThreadPoolExecutor(len(compilers)) as compiling, ThreadPoolExecutor(1) as simulating:
        try:
            known: dict[tuple[str, str], Future[Cycles | None]] = {}
            programs: dict[tuple[str, ...], Future[Figures]] = {}
            for number, case in enumerate(all_cases()):
                if case not in cases or (arguments.kernel and case.kernel not in arguments.kernel):
                    continue
                for generation in arguments.generation or TOPOLOGIES:
                    if case.generations and generation not in case.generations:
                        continue
                    # Cases of a kernel with the same arguments differ in what their arguments hold: one program.
                    program = case.kernel, str(case.arguments), generation
                    if program not in programs:
                        programs[program] = compiling.submit(compiled, number, generation)
                    key = case.simulation and (case.simulation.name or f"case {number}", generation)
                    if key and key not in known and arguments.estimate:
                        known[key] = simulating.submit(simulator.kernel_cycles, number, generation)
                    tasks.append((case, generation, programs[program], known.get(key) if key else None))
            rows = []
            for task in tasks:
                rows.append(_row(*task))
                print(_line(rows[-1]), file=sys.stderr, flush=True)
        finally:
            for executor in (compiling, simulating):
                executor.shutdown(wait=False, cancel_futures=True)
    for compiler in (*compilers, simulator):
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
    case: CompileCase, generation: str, compiled: Future[Figures], simulated: Future[Cycles | None] | None
) -> dict:
    """The figures of a case. `simulated` is that of its unit, which other cases may share."""
    row = {"kernel": case.kernel, "shape": case.shape, "generation": generation}
    try:
        figures = compiled.result()
    except RuntimeError as error:
        return row | {"problem": str(error)[:600]}
    row |= dataclasses.asdict(figures) | {"useful_flops": case.flops, "useful_bytes": case.nbytes}
    row["cycles"] = row["seconds"] = row["simulation_seconds"] = None
    unit, cycles = case.simulation, simulated and simulated.result()
    if unit and cycles:
        row["cycles"] = (cycles.unit + (unit.repeats - 1) * cycles.repeated) * -(-unit.units // figures.cores)
        row["seconds"] = row["cycles"] / CLOCK_HZ[generation]
        row["simulation_seconds"] = cycles.seconds
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
        f"{row['simulation_seconds']:.1f}" if row["simulation_seconds"] else "",
    ]


def _line(row: dict) -> str:
    return " | ".join([row["kernel"], row["shape"], row["generation"], *_cells(row)])


def _print(rows: list[dict]) -> None:
    """Prints a table, without the columns in which no row has a cell."""
    names = ["kernel", "shape", "for", "cycles", "ms", "roofline ms", "GFLOP", "MB", "VMEM MiB", "scratch MB"]
    names += ["compile s", "simulate s"]
    lines = [[row["kernel"], row["shape"], row["generation"], *_cells(row)] for row in rows]
    used = [i for i, _ in enumerate(names) if any(i < len(line) and line[i] for line in lines)]
    table = Table()
    for i in used:
        table.add_column(names[i], justify="right" if i > 2 else "left")
    for line in lines:
        table.add_row(*(line[i] for i in used if i < len(line)))
    Console(width=170).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
