"""One sitting of a run, from files to files."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from convert import kind_of
from convert.synthetic import write_checkpoint
from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.sharding import MeshRules, StepSharding
from keye_jax.train.checkpoints import RunCheckpoints, fingerprint
from keye_jax.train.config import StageConfig
from keye_jax.train.data import Batches, FileBatches, check_groups
from keye_jax.train.generated import GeneratedBatches
from keye_jax.train.loop import Ended, Trainer, load_model, run, train_options
from keye_jax.train.report import Report
from keye_jax.train.shapes.files import write_model_files

ADAPTER, INITIAL = "adapter", "initial"
"""Folders below the output: of low-rank pairs in PEFT's layout, and of the weights that a new model begins with."""


def train(
    stage: StageConfig,
    *,
    source: str,
    checkpoint: Path | None,
    output: Path,
    data: Path | None = None,
    evaluation: Path | None = None,
    export: Path | None = None,
    stop_after: float | None = None,
    rules_for: Callable[[KeyeConfig], MeshRules] = lambda _: MeshRules.single_device(),
) -> Ended:
    """Trains a checkpoint by a stage; what an earlier sitting did in `output` is not done again.

    Args:
      source: what messages call the stage.
      checkpoint: a directory of either kind, with its tokenizer and templates. None for a new embedded model, with
        random weights that the stage's seed decides.
      output: folder of the run.
      data, evaluation: files of samples; None where the stage's data are generated.
      export: where the trained model is written in the released layout, once all steps are done.
      stop_after: seconds; None for no limit.
      rules_for: gives the devices for a model.

    Raises:
      UserError: a file or a value is not valid, or they do not go together.
    """
    if jax.process_count() > 1:
        raise UserError(f"there are {jax.process_count()} processes; training runs in one")
    if checkpoint is not None:
        kind_of(checkpoint)
    config = KeyeConfig.from_file(presets.EMBEDDED if checkpoint is None else checkpoint)
    rules = rules_for(config)
    step = StepSharding.prefill(rules)
    groups = step.size(step.batch)
    check_groups(stage, groups, step.size(step.rows), step.size(step.vision_patches), source)
    started = {
        "stage": stage.to_dict(),
        "checkpoint": None if checkpoint is None else fingerprint(checkpoint),
        "data": None if data is None else fingerprint(data),
        "evaluation": None if evaluation is None else fingerprint(evaluation),
        "groups": groups,
    }
    with contextlib.ExitStack() as opened:
        checkpoints = RunCheckpoints(output, started, keep=stage.keep)
        opened.callback(checkpoints.close)
        base = checkpoint or _initial(output, stage.seed)
        processor = Processor.from_checkpoint(base, config, defaults=dict(stage.data.media))

        def read(path: Path, epochs: float | None, *, shuffle: bool) -> FileBatches:
            return FileBatches(
                path, processor, config, stage, groups=groups, epochs=epochs, shuffle=shuffle, report=_warn
            )

        training: Batches
        if data is None:
            training, steps = GeneratedBatches(base, config, stage), stage.steps
        else:
            training = read(data, stage.epochs, shuffle=stage.data.shuffle)
            steps = stage.steps or -(-training.count() // stage.batch.accumulation)
        opened.callback(training.close)
        assert steps, "the stage has steps, or epochs of a file"
        evaluated: Callable[[], Batches] | None = None
        if evaluation is not None:
            evaluated = functools.partial(read, evaluation, 1, shuffle=False)
        elif data is None:
            evaluated = functools.partial(
                GeneratedBatches, base, config, stage, held_out=True, count=stage.data.evaluation
            )
        model = load_model(base, stage, rules, source=source)
        trainer = Trainer(model, stage, train_options(stage, processor), rules, steps)
        begun = max(checkpoints.steps, default=0)
        curves = None if stage.tensorboard is None else output / stage.tensorboard
        report = Report(output, steps=steps, begun=begun, tensorboard=curves)
        opened.callback(report.close)
        trained, frozen = (sum(x.size for x in weights.values()) for weights in (model.trained, model.frozen))
        report.say(f"{trained:,} numbers train, {frozen:,} do not; {steps:,} steps, {begun:,} of them done")
        ended = run(trainer, training, checkpoints, report, stage, evaluation=evaluated, stop_after=stop_after)
        if training.skipped:
            report.say(f"{training.skipped:,} samples were skipped")
        if stage.lora is not None:
            trainer.write_adapter(output / ADAPTER, str(base))
        if export is not None and ended.finished:
            trainer.export(base, export)
        return ended


def _initial(output: Path, seed: int) -> Path:
    """The folder of a new embedded model with random weights, which is made once."""
    folder = output / INITIAL
    if not folder.is_dir():
        partial = output / f"{INITIAL}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_checkpoint(partial, KeyeConfig.from_file(presets.EMBEDDED), seed=seed)
        write_model_files(partial)
        partial.rename(folder)
    return folder


def _warn(sentence: str) -> None:
    print(f"keye-jax: skipped: {sentence}", file=sys.stderr, flush=True)
