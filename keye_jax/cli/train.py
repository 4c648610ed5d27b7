"""`keye-jax train`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keye_jax import interrupts, presets
from keye_jax.cli import options
from keye_jax.errors import UserError

if TYPE_CHECKING:
    from keye_jax.train.config import StageConfig


def train(
    config: Annotated[
        list[str],
        typer.Option(
            help="The stage: a preset's name, such as 'lora', or a file. Several are done in turn, each in a folder of "
            "its name below --output."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the run. The same command resumes it.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Directory of a checkpoint, safetensors or Orbax, or its gs:// or s3:// URL. Without it, of generated "
            "data a new model."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="File of samples, a JSON object a line.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="File of samples that are evaluated during training.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of LoRA pairs in PEFT's layout to begin with; new ones if left out.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="When all steps are done, write the model there in the released layout.")
    ] = None,
    export_step: Annotated[
        str | None,
        typer.Option(
            metavar="last|best|STEP", help="Write that checkpoint of the run to --export now, and do not train."
        ),
    ] = None,
    stop_after: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="Save and end after that time; the same command resumes.")
    ] = None,
    verify_checksums: options.VerifyChecksums = False,
    sharding: options.Sharding = None,
) -> int:
    """Trains a checkpoint by stage files, and resumes where it was stopped.

    Ctrl-C and SIGTERM save and end the run. What trains, the loss, the speed and the data are in the stage file.
    """
    _check_installed("optax")
    if stop_after is not None and stop_after <= 0:
        raise UserError(f"--stop-after is {stop_after}; it must be a positive number of minutes")
    from keye_jax.runtime.compilation_cache import enable_compilation_cache
    from keye_jax.train.config import StageConfig

    sources = [presets.train_file(each) for each in config]
    stages = [(str(source), StageConfig.from_file(source)) for source in sources]
    for _, stage in stages:
        _check_files(stage, checkpoint, data, evaluation)
    if data is not None:
        _check_installed("grain")
    if export_step is not None and export is None:
        raise UserError(f"--export is missing; --export-step is {export_step!r}, and they go together")
    if export is not None and export.exists() and any(export.iterdir()):
        raise UserError(f"--export is {str(export)!r}; it must be a new folder or an empty one")
    enable_compilation_cache()

    from keye_jax.train import session
    from keye_jax.train.stages import train_in_turn

    given: dict[str, Any] = {
        "checkpoint": checkpoint,
        "output": output,
        "data": data,
        "evaluation": evaluation,
        "adapter": adapter,
        "export": export,
        "export_step": export_step,
        "verify_checksums": verify_checksums,
        "stop_after": None if stop_after is None else 60 * stop_after,
        "rules_for": lambda model: options.mesh_rules(sharding, model),
    }
    if len(stages) > 1:
        ended = train_in_turn(stages, begin=lambda name: print(f"stage {name}", file=sys.stderr, flush=True), **given)
    else:
        [(source, stage)] = stages
        ended = session.train(stage, source=source, **given)
    if export_step is not None:
        print(f"the checkpoint after step {ended.step:,} is in {export}")
    if ended.finished:
        return 0
    done = f"after step {ended.step:,}, which is saved; the same command goes on"
    if ended.signal:
        return interrupts.say_stopped(ended.signal, f" {done}")
    print(f"keye-jax: stopped by --stop-after {done}", file=sys.stderr)
    return 0


def _check_installed(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"training needs {package}: pip install 'keye-jax[train]'")


def _check_files(stage: StageConfig, checkpoint: Path | None, data: Path | None, evaluation: Path | None) -> None:
    """Raises UserError where the stage and the files that are given do not go together."""
    given = {"--data": data, "--evaluation": evaluation}
    if stage.data.source == "jsonl":
        needed = {"--data": True, "--evaluation": bool(stage.evaluate_every), "--checkpoint": True}
        given["--checkpoint"] = checkpoint
    else:
        needed = {"--data": False, "--evaluation": False}
    for name, value in given.items():
        if needed[name] != (value is not None):
            state = "missing" if value is None else "given"
            because = "evaluate_every" if name == "--evaluation" and stage.data.source == "jsonl" else "data.source"
            said = stage.evaluate_every if because == "evaluate_every" else repr(stage.data.source)
            raise UserError(f"{name} is {state}; the stage's {because} is {said}, and they go together")
