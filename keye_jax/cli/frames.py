"""`keye-jax frames`: what the model sees of a video or an image."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keye_jax.cli import options
from keye_jax.cli.groups import MediaGroup, expanded
from keye_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from keye_jax.processor import ImagePlan, MediaPlanner, VideoPlan


@expanded
def frames(
    file: Annotated[str, typer.Argument(help="Video or image, a file or URL.")],
    out: Annotated[
        Path | None, typer.Option(help="New or empty directory for the frames as PNG; without it nothing is decoded.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Checkpoint whose settings and tokenizer apply; the publisher's settings if left out."),
    ] = None,
    *,
    media: MediaGroup,
    allow_remote: options.AllowRemote = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Show which frames of a video the model sees, at which times and sizes.

    With --out, write them as PNG, exactly the pixels that the model sees. An image is one frame.
    """
    planner = _planner(checkpoint, allow_remote, media.given())
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_new_folder(out)) if out is not None else None
        plan = stack.enter_context(planner.file(file, "FILE"))
        found = _look(plan, planner, folder)
    found = {"file": file} | found
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        _print_table(found)
        for warning in found["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
    return 0


def _planner(checkpoint: Path | None, allow_remote: bool, chosen: dict[str, Any]) -> MediaPlanner:
    from convert import buckets
    from keye_jax.config import KeyeConfig
    from keye_jax.processor import MediaPlanner, Processor
    from keye_jax.processor.settings import ProcessorSettings

    if checkpoint is None:
        return MediaPlanner(ProcessorSettings(), allow_remote=allow_remote, defaults=chosen)
    checkpoint = buckets.local(checkpoint)
    config = KeyeConfig.from_file(checkpoint)
    return Processor.from_checkpoint(checkpoint, config, allow_remote=allow_remote, defaults=chosen).media


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Makes a folder, and removes it and what is in it if the work in it fails.

    Raises:
      UserError: there is a file of that name, or a folder that is not empty, or it cannot be made.
    """
    existed = path.is_dir()
    if path.exists() and (not existed or any(path.iterdir())):
        raise UserError(f"--out is {str(path)!r}; it must be a new or an empty directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield path
    except BaseException as error:
        with contextlib.suppress(OSError):
            for file in path.iterdir():
                file.unlink()
            if not existed:
                path.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"--out is {str(path)!r}; it cannot be written to: {error.strerror or error}") from error
        raise


def _look(plan: ImagePlan | VideoPlan, planner: MediaPlanner, folder: Path | None) -> dict[str, Any]:
    """What is printed of a plan. Writes its frames into `folder`, if there is one."""
    from keye_jax.processor import ImagePlan

    result: dict[str, Any] = {"width": plan.width, "height": plan.height}
    warnings = list(plan.warnings)
    if isinstance(plan, ImagePlan):
        row: dict[str, Any] = {"tokens": plan.num_tokens}
        if folder is not None:
            row["file"] = _write(plan.pixels(warnings.append), folder / "image.png")
        return {"kind": "image", **result, "num_tokens": plan.num_tokens, "frames": [row], "warnings": warnings}
    import numpy as np

    info = plan.source.info
    used, files = plan.indices.tolist(), []
    if folder is not None:
        for number, (index, pixels) in enumerate(plan.pixels(np.arange(plan.frames))):
            used[number] = index
            files.append(_write(pixels, folder / f"{number:05d}_{info.times[index]:.3f}s.png"))
    warnings += [warning for warning in plan.source.warnings if warning not in warnings]
    undecodable, sentence = plan.undecodable(np.array(used))
    warnings += [sentence] if sentence else []
    times = info.times[used]
    rows: list[dict[str, Any]] = [
        {"index": index, "time": round(time, 3), "tokens": plan.tokens_per_frame}
        for index, time in zip(used, times.tolist(), strict=True)
    ]
    total = plan.tokens_per_frame * plan.frames
    if planner.encoder is not None:
        for row, (before, after) in zip(rows, planner.encoder.interleave(times, plan.cues), strict=True):
            row["text_tokens"] = len(before) + len(after)
        total += sum(row["text_tokens"] for row in rows)
        result["frame_format"] = planner.encoder.text.name
    for row, name in zip(rows, files, strict=False):
        row["file"] = name
    source = {"width": info.width, "height": info.height, "frames": info.num_frames, "fps": round(info.native_fps, 3)}
    return {
        "kind": "video",
        **result,
        "source": source,
        "num_tokens": total,
        "frames": rows,
        "undecodable_frame_times": [round(time, 3) for time in undecodable.tolist()],
        "warnings": warnings,
    }


def _write(pixels: np.ndarray, path: Path) -> str:
    from PIL import Image

    Image.fromarray(pixels).save(path)
    return path.name


def _print_table(found: dict[str, Any]) -> None:
    names = [name for name in ("index", "time", "tokens", "text_tokens", "file") if name in found["frames"][0]]
    lines = [[name.replace("_", " ") for name in names]]
    lines += [[f"{row[name]:.3f}" if name == "time" else str(row[name]) for name in names] for row in found["frames"]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    size, count = f"{found['width']}x{found['height']}", len(found["frames"])
    print(f"\n{found['kind']}: {count} frame(s) of {size} pixels, {found['num_tokens']:,} tokens")
