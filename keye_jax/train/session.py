"""One sitting of a run, from files to files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jax

from convert import kind_of
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.sharding import MeshRules, StepSharding
from keye_jax.train.checkpoints import RunCheckpoints, fingerprint
from keye_jax.train.config import StageConfig
from keye_jax.train.data import FileBatches, check_groups
from keye_jax.train.loop import Ended, Trainer, load_model, run, train_options
from keye_jax.train.report import Report

ADAPTER = "adapter"
"""The folder, below the output, of low-rank pairs in PEFT's layout."""


def train(
    stage: StageConfig,
    *,
    source: str,
    checkpoint: Path,
    output: Path,
    data: Path | None,
    evaluation: Path | None = None,
    export: Path | None = None,
    stop_after: float | None = None,
    rules_for: Callable[[KeyeConfig], MeshRules] = lambda _: MeshRules.single_device(),
) -> Ended:
    """Trains a checkpoint by a stage; what an earlier sitting did in `output` is not done again.

    Args:
      source: what messages call the stage.
      checkpoint: a directory of either kind, with its tokenizer and templates.
      output: folder of the run.
      data, evaluation: files of samples.
      export: where the trained model is written in the released layout, once all steps are done.
      stop_after: seconds; None for no limit.
      rules_for: gives the devices for a model.

    Raises:
      UserError: a file or a value is not valid, or they do not go together.
    """
    if jax.process_count() > 1:
        raise UserError(f"there are {jax.process_count()} processes; training runs in one")
    kind_of(checkpoint)
    config = KeyeConfig.from_file(checkpoint)
    processor = Processor.from_checkpoint(checkpoint, config, defaults=dict(stage.data.media))
    rules = rules_for(config)
    step = StepSharding.prefill(rules)
    groups = step.size(step.batch)
    check_groups(stage, groups, step.size(step.rows), step.size(step.vision_patches), source)
    assert data is not None

    def batches(path: Path, epochs: float | None, *, shuffle: bool) -> FileBatches:
        return FileBatches(path, processor, config, stage, groups=groups, epochs=epochs, shuffle=shuffle, report=_warn)

    training = batches(data, stage.epochs, shuffle=stage.data.shuffle)
    checkpoints = report = None
    try:
        steps = stage.steps or -(-training.count() // stage.batch.accumulation)
        started = {
            "stage": stage.to_dict(),
            "checkpoint": fingerprint(checkpoint),
            "data": fingerprint(data),
            "evaluation": None if evaluation is None else fingerprint(evaluation),
            "groups": groups,
        }
        checkpoints = RunCheckpoints(output, started, keep=stage.keep)
        model = load_model(checkpoint, stage, rules, source=source)
        trainer = Trainer(model, stage, train_options(stage, processor), rules, steps)
        begun = max(checkpoints.steps, default=0)
        curves = None if stage.tensorboard is None else output / stage.tensorboard
        report = Report(output, steps=steps, begun=begun, tensorboard=curves)
        trained, total = sum(x.size for x in model.trained.values()), sum(x.size for x in model.frozen.values())
        report.say(f"{trained:,} numbers train, {total:,} do not; {steps:,} steps, {begun:,} of them done")
        ended = run(
            trainer,
            training,
            checkpoints,
            report,
            stage,
            evaluation=None if evaluation is None else lambda: batches(evaluation, 1, shuffle=False),
            stop_after=stop_after,
        )
        if training.skipped:
            report.say(f"{training.skipped:,} samples were skipped")
        if stage.lora is not None:
            trainer.write_adapter(output / ADAPTER, str(checkpoint))
        if export is not None and ended.finished:
            trainer.export(checkpoint, export)
        return ended
    finally:
        training.close()
        for opened in (checkpoints, report):
            if opened is not None:
                opened.close()


def _warn(sentence: str) -> None:
    print(f"keye-jax: skipped: {sentence}", file=sys.stderr, flush=True)
