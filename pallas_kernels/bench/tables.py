"""The figures, as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any]) -> None:
    """Prints what `python -m pallas_kernels.bench` measured."""
    console = Console(width=140)
    ceilings = result["ceilings"]
    if ceilings["flops"]:
        console.print(
            f"{result['device']}, JAX {result['jax']}: a bf16 matrix product runs at "
            f"{ceilings['flops'] / 1e12:.0f} TFLOP/s, a copy at {ceilings['bytes'] / 1e12:.2f} TB/s"
        )
    if result["rows"]:
        console.print(_operations(result))
    if result["layers"]:
        console.print(_layers(result))


def _operations(result: dict[str, Any]) -> Table:
    columns = ["operation", "size", "candidate", "ms", "on the device", "rate", "of ceiling"]
    with_power = any("watts" in row for row in result["rows"])
    table = Table(*columns, *(["MHz", "W", "capped"] if with_power else []), title=result["device"])
    for column in table.columns[3:]:
        column.justify = "right"
    for row in result["rows"]:
        size = row["size"]
        if "union" in row:
            size += f", unions of {row['union']:,.0f}"
        cells = [row["operation"], size, row["candidate"]]
        if "failed" in row:
            table.add_row(*cells, "", "", row["failed"], "")
            continue
        device = ""
        if "device_seconds" in row:
            device = f"{row['device_seconds'] * 1e3:.3f} in {row['launches']:.0f}"
        rate = f"{row['rate'] / 1e12:.3g} {'TFLOP/s' if row['unit'] == 'flops' else 'TB/s'}"
        share = f"{row['share_of_ceiling']:.0%}" if "share_of_ceiling" in row else ""
        cells += [f"{row['seconds'] * 1e3:.3f}", device, rate, share]
        if "watts" in row:
            power = f"{row['watts']:.0f} of {row['limit_watts']:.0f}"
            cells += [f"{row['clock_hertz'] / 1e6:,.0f}", power, f"{row['capped']:.0%}"]
        table.add_row(*cells)
    table.caption = "ms: wall clock, with launches. On the device: ms of the kernels alone, and kernels per call."
    if with_power:
        table.caption += " Capped: how often the limit of power held the clock down."
    return table


def _layers(result: dict[str, Any]) -> Table:
    title = "attention of one layer, all tokens"
    table = Table("tokens", "selections", "unions", "DSA, ms", "of it scores", "dense, ms", "DSA / dense", title=title)
    for column in table.columns[2:]:
        column.justify = "right"

    def milliseconds(key: str) -> str:
        return f"{layer[key] * 1e3:.2f}" if key in layer else ""

    for layer in result["layers"]:
        unions = " ".join(f"{sample['union']:.0f}" for sample in layer["samples"] if sample["union"] is not None)
        ratio = f"{layer['ratio']:.2f}" if "ratio" in layer else ""
        times = milliseconds("dsa_seconds"), milliseconds("scores_seconds"), milliseconds("dense_seconds"), ratio
        table.add_row(f"{layer['tokens']:,}", layer["selections"], unions, *times)
    first = result["layers"][0]
    table.caption = (
        f"DSA: scores, selection and attention of chunks of {first['chunk']:,} queries. Up to {len(first['samples'])} "
        f"chunks of a prompt are timed, and the others interpolated. Dense: {first['dense']}."
    )
    return table
