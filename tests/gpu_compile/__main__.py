"""`python -m tests.gpu_compile`: compiles every Hopper kernel with each ptxas, and fails if one compiles badly."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from tests.gpu_compile.cases import CASES, KernelCase
from tests.gpu_compile.compiler import Figures, compilers, kernels, prepared, run_ptxas, use_plugin, version


def main() -> int:
    """Parses the command line, compiles and prints; returns 1 if a kernel does not compile as it is written."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_compile", description=__doc__)
    parser.add_argument(
        "--ptxas", type=Path, action="append", help="a ptxas, in place of the prepared ones; repeatable"
    )
    parser.add_argument("--kernel", action="append", help="compile only this kernel; may be repeated")
    parser.add_argument("--quick", action="store_true", help="compile only the subset that `make test` compiles")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    arguments = parser.parse_args()
    folder = prepared()
    if folder is None:
        parser.error("the compilers are not there: `make test-gpu-compile` installs them, or set GPU_COMPILERS_PATH")
    for path in arguments.ptxas or []:
        if not path.is_file():
            parser.error(f"--ptxas is {str(path)!r}; it must be a file that is there")
    names = sorted({case.kernel for case in CASES})
    for name in arguments.kernel or []:
        if name not in names:
            parser.error(f"--kernel is {name!r}; it must be one of: {', '.join(names)}")

    use_plugin(folder)
    cases = [case for case in CASES if case.quick or not arguments.quick]
    cases = [case for case in cases if not arguments.kernel or case.kernel in arguments.kernel]
    rows = compile_all(cases, arguments.ptxas or compilers(folder))
    _print(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    failed = [row for row in rows if row["problems"]]
    for row in failed:
        print(f"{row['case']}, {row['kernel']}, ptxas {row['ptxas']}: {'; '.join(row['problems'])}", file=sys.stderr)
    print(f"{len(rows) - len(failed)} of {len(rows)} compiled well, with JAX {jax.__version__}")
    return 1 if failed else 0


def compile_all(cases: list[KernelCase], with_compilers: list[Path]) -> list[dict]:
    """A row for each kernel of each case and each ptxas. PTX that several cases have is compiled once."""
    rows, known = [], {}
    for case in cases:
        try:
            found = kernels(case)
        except Exception as error:
            found = {}
            print(f"{case}: {error}", file=sys.stderr)
        if not found:
            rows.append({"case": str(case), "kernel": "", "ptxas": "", "problems": ["it does not lower to PTX"]})
        for name, ptx in found.items():
            for path in with_compilers:
                key = hashlib.sha256(ptx.encode()).digest(), path
                if key not in known:
                    try:
                        known[key] = run_ptxas(path, ptx)
                    except RuntimeError as error:
                        known[key] = str(error)
                rows.append({"case": str(case), "kernel": name, "ptxas": version(path), **_row(case, known[key])})
                print(" | ".join(_cells(rows[-1])), file=sys.stderr, flush=True)
    return rows


def _row(case: KernelCase, found: Figures | str) -> dict:
    if isinstance(found, str):
        return {"problems": [found]}
    problems = list(found.problems)
    if found.stack > case.stack:
        problems.append(f"{found.stack} bytes of a thread's registers are in memory; {case.stack} may be")
    return dataclasses.asdict(found) | {"problems": problems}


def _cells(row: dict) -> list[str]:
    cells = [row["case"], row["kernel"], row["ptxas"]]
    if "registers" not in row:
        return [*cells, "does not compile", "", "", ""]
    figures = [str(row["registers"]), str(row["stack"]), str(row["spills"])]
    return [*cells, *figures, ", ".join(problem[:40] for problem in row["problems"])]


def _print(rows: list[dict]) -> None:
    table = Table("case", "kernel", "ptxas", "registers", "stack", "spilled bytes", "problems")
    for row in rows:
        table.add_row(*_cells(row))
    Console(width=170).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
