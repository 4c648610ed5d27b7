"""`python -m pallas_kernels.bench`: a table of all operations on this machine's device."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from pallas_kernels.bench.cases import Case, cases
from pallas_kernels.bench.timing import copy_bandwidth, matmul_rate, seconds_per_call


def main() -> None:
    """Parses the command line, measures, prints, and writes JSON if asked for."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("--operation", action="append", help="measure only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a machine without an accelerator")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    chosen = cases(quick=arguments.quick)
    operations = sorted({case.operation for case in chosen})
    for operation in arguments.operation or []:
        if operation not in operations:
            parser.error(f"--operation is {operation!r}; it must be one of: {', '.join(operations)}")

    device = jax.devices()[0].device_kind
    ceilings: dict[str, float | None] = {"flops": None, "bytes": None}
    if not arguments.quick:
        flops, nbytes = matmul_rate(), copy_bandwidth()
        ceilings = {"flops": flops, "bytes": nbytes}
        print(f"{device}: {flops / 1e12:.0f} TFLOP/s in a bf16 matrix product, {nbytes / 1e12:.2f} TB/s in a copy")
    rows = []
    for case in chosen:
        if not arguments.operation or case.operation in arguments.operation:
            rows += _measure(case, ceilings)
    _print(rows, device)
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": device, "ceilings": ceilings, "rows": rows}, indent=1) + "\n")


def _measure(case: Case, ceilings: dict[str, float | None]) -> list[dict]:
    """A row for each candidate; one that fails has its reason in place of a time."""
    inputs, rows = case.arguments(), []
    work, kind = (case.flops, "flops") if case.flops else (case.nbytes, "bytes")
    assert work is not None, case
    for name, function in case.candidates.items():
        row = {"operation": case.operation, "size": case.size, "candidate": name, "unit": kind}
        try:
            seconds = seconds_per_call(function, *inputs)
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            rows.append(row | {"failed": str(error).splitlines()[0][:100]})
            continue
        ceiling = ceilings[kind]
        share = work / seconds / ceiling if ceiling else None
        rows.append(row | {"seconds": seconds, "rate": work / seconds, "share_of_ceiling": share})
    return rows


def _print(rows: list[dict], device: str) -> None:
    table = Table("operation", "size", "candidate", "ms", "rate", "of ceiling", title=device)
    for column in table.columns[3:]:
        column.justify = "right"
    for row in rows:
        cells = [row["operation"], row["size"], row["candidate"]]
        if "failed" in row:
            table.add_row(*cells, "", row["failed"], "")
            continue
        unit = "TFLOP/s" if row["unit"] == "flops" else "TB/s"
        share = f"{row['share_of_ceiling']:.0%}" if row["share_of_ceiling"] else ""
        table.add_row(*cells, f"{row['seconds'] * 1e3:.3f}", f"{row['rate'] / 1e12:.3g} {unit}", share)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
