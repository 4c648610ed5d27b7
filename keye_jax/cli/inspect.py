"""`keye-jax inspect`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from convert.inspection import Inspection, Part

# Problems of one checkpoint are often the same one many times over.
_PROBLEMS_SHOWN = 20


def inspect(
    path: Annotated[
        Path, typer.Argument(help="A config.json, or a checkpoint, safetensors or Orbax, or its gs:// or s3:// URL.")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Read every file and compare it with the checksums of its conversion.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all problems.")] = False,
) -> int:
    """Shows parameters and bytes by part, without loading weights; with --check, finds damage.

    Exits with 2 if a checkpoint is not whole.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    from convert import buckets
    from convert.checks import gather
    from convert.inspection import inspect as look
    from keye_jax.cli.convert import ConversionProgress

    path = buckets.local(path)
    with ConversionProgress() as progress:
        found = look(path, check=check, progress=progress)
    text = _frame_text(path if path.is_dir() else path.parent)
    if as_json:
        print(json.dumps(found.to_dict() | {"frame_text": text}, indent=2))
    else:
        _print_table(found)
        if text is not None:
            guess = ", a guess: no file says it" if text["guessed"] else ""
            print(f"text of a video frame: {text['tokens_per_frame']:.1f} tokens ({text['format']}{guess})")
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        problems = gather(found.problems)
        for problem in problems[:_PROBLEMS_SHOWN]:
            print(f"  {problem}", file=sys.stderr)
        if len(problems) > _PROBLEMS_SHOWN:
            print(f"  ... and {len(problems) - _PROBLEMS_SHOWN} more; --json lists all", file=sys.stderr)
    return 2 if found.problems else 0


def _frame_text(directory: Path) -> dict[str, Any] | None:
    """The text around each frame of a video: its format, and its mean number of tokens; None without a tokenizer."""
    from keye_jax.processor.frame_text import GUESS, FrameEncoder, FrameText
    from keye_jax.processor.prompt import SafeTokenizer
    from keye_jax.processor.settings import read_frame_format

    tokenizer = directory / "tokenizer.json"
    if not tokenizer.is_file():
        return None
    stated = read_frame_format(directory)
    encoder = FrameEncoder(SafeTokenizer(tokenizer), FrameText.parse(stated or GUESS))
    return {
        "format": encoder.text.name,
        "guessed": stated is None,
        "tokens_per_frame": round(encoder.tokens_per_frame(), 2),
    }


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
