"""`keye-jax inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from convert.inspection import Inspection, Part

# Problems of one checkpoint are often the same one many times over.
_PROBLEMS_SHOWN = 20


def inspect(
    path: Annotated[Path, typer.Argument(help="A config.json, or a checkpoint, safetensors or Orbax.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all problems.")] = False,
) -> int:
    """Shows parameters and bytes by part, without loading weights.

    Exits with 2 if a checkpoint is not whole.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    from convert.inspection import inspect as look

    found = look(path)
    if as_json:
        print(found.to_json())
    else:
        _print_table(found)
        for problem in found.problems[:_PROBLEMS_SHOWN]:
            print(f"  {problem}", file=sys.stderr)
        if len(found.problems) > _PROBLEMS_SHOWN:
            print(f"  ... and {len(found.problems) - _PROBLEMS_SHOWN} more; --json lists all", file=sys.stderr)
    return 2 if found.problems else 0


def _print_table(found: Inspection) -> None:
    # Plain columns: they read the same in a terminal, in a pipe and in a log.
    lines = [("part", "tensors", "parameters", "bytes")]
    lines += [(name, *_numbers(part)) for name, part in found.parts.items()]
    lines.append(("total", *_numbers(found.total)))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for number, line in enumerate(lines):
        if number in (1, len(lines) - 1):
            print("  ".join("-" * width for width in widths))
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
    print()
    print(f"{found.total.parameters:,} parameters")
    print(f"{found.active:,} of the decoder's are active for one token")
    dtypes = ", ".join(f"{name} {nbytes / 1e9:.2f} GB" for name, nbytes in found.dtypes.items())
    if found.kind == "config":
        print(f"config; in its dtype: {dtypes}")
    else:
        files = "1 file" if found.files == 1 else f"{found.files} files"
        whole = "whole" if not found.problems else f"NOT whole, {len(found.problems)} problems"
        print(f"{found.kind}, {files}: {dtypes or 'nothing readable'}; {whole}")


def _numbers(part: Part) -> tuple[str, str, str]:
    return f"{part.tensors:,}", f"{part.parameters:,}", f"{part.nbytes:,}"
