"""One sitting of a run, from files to files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from convert import buckets, kind_of
from convert.detect import read_config
from convert.synthetic import write_checkpoint
from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.sharding import MeshRules, StepSharding
from keye_jax.train.checkpoints import RUN, RunCheckpoints, fingerprint
from keye_jax.train.config import StageConfig
from keye_jax.train.data import Batches, FileBatches, check_sharding
from keye_jax.train.generated import GeneratedBatches
from keye_jax.train.loop import Ended, Trainer, export_model, load_model, run, train_options
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
    adapter: Path | None = None,
    export: Path | None = None,
    export_step: str | None = None,
    verify_checksums: bool = False,
    stop_after: float | None = None,
    rules_for: Callable[[KeyeConfig], MeshRules] = lambda _: MeshRules.single_device(),
) -> Ended:
    """Trains a checkpoint by a stage; what an earlier sitting did in `output` is not done again.

    Args:
      source: what messages call the stage.
      checkpoint: a directory of either kind, or its URL in a bucket, with its tokenizer and templates. None for a new
        embedded model, with random weights that the stage's seed decides.
      output: folder of the run.
      data, evaluation: files of samples; None where the stage's data are generated.
      adapter: folder of low-rank pairs in PEFT's layout to begin with; new ones without.
      export: where the trained model is written in the released layout, once all steps are done.
      export_step: the checkpoint that is written to `export` in place of training: "last", "best" or a step; None to
        train.
      verify_checksums: as for `convert.load_params`.
      stop_after: seconds; None for no limit.
      rules_for: gives the devices for a model.

    Raises:
      UserError: a file or a value is not valid, or they do not go together.
    """
    if jax.process_count() > 1:
        raise UserError(f"there are {jax.process_count()} processes; training runs in one")
    named = None if checkpoint is None else str(checkpoint)
    if checkpoint is not None:
        checkpoint = buckets.local(checkpoint)
        kind_of(checkpoint)
    if checkpoint is not None and stage.layers is not None:
        raise UserError(f"{source}: layers is {stage.layers}; it is for a new model, and --checkpoint is given")
    if adapter is not None and stage.lora is None:
        raise UserError(f"{source}: lora is missing; --adapter is given, and they go together")
    config = read_config(checkpoint) if checkpoint is not None else _new_config(stage)
    rules = rules_for(config)
    step = StepSharding.prefill(rules)
    groups = step.size(step.batch)
    if export_step is not None and not (output / RUN).is_file():
        raise UserError(f"--output is {str(output)!r}; it must be the folder of a run, since --export-step is given")
    check_sharding(stage, rules, source)
    started = {
        "stage": stage.to_dict(),
        "checkpoint": None if checkpoint is None else fingerprint(checkpoint),
        "data": None if data is None else fingerprint(data),
        "evaluation": None if evaluation is None else fingerprint(evaluation),
        "groups": groups,
    }
    if adapter is not None:
        started["adapter"] = fingerprint(adapter)
    with contextlib.ExitStack() as opened:
        checkpoints = RunCheckpoints(output, started, keep=stage.keep)
        opened.callback(checkpoints.close)
        base = checkpoint or _initial(output, config, stage.seed)
        if export_step is not None:
            model = load_model(base, stage, rules, adapter=adapter, source=source)
            number, weights = checkpoints.restore_weights(model.trained, export_step)
            assert export is not None
            export_model(model, stage, weights, base, export)
            return Ended(number, finished=True, signal=None)
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
            steps = stage.steps or _steps_of(training, stage, source)
        opened.callback(training.close)
        assert steps, "the stage has steps, or epochs of a file"
        evaluated: Callable[[], Batches] | None = None
        if evaluation is not None:
            evaluated = functools.partial(read, evaluation, 1, shuffle=False)
        elif data is None:
            evaluated = functools.partial(
                GeneratedBatches, base, config, stage, held_out=True, count=stage.data.evaluation
            )
        model = load_model(base, stage, rules, adapter=adapter, source=source, verify_checksums=verify_checksums)
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
            trainer.write_adapter(output / ADAPTER, named or str(base))
        if export is not None and ended.finished:
            export_model(model, stage, trainer.state.weights, base, export)
        return ended


def _steps_of(batches: FileBatches, stage: StageConfig, source: str) -> int:
    """Whole steps that the epochs of a stage make."""
    count, each = batches.count(), stage.batch.accumulation
    if count < each:
        raise UserError(f"{source}: batch.accumulation is {each}; the data make only {count} batches in all epochs")
    return count // each


def _new_config(stage: StageConfig) -> KeyeConfig:
    """The configuration of a new embedded model."""
    config = KeyeConfig.from_file(presets.EMBEDDED)
    return dataclasses.replace(config, num_hidden_layers=stage.layers or config.num_hidden_layers)


def _initial(output: Path, config: KeyeConfig, seed: int) -> Path:
    """The folder of a new model with random weights, which is made once."""
    folder = output / INITIAL
    if not folder.is_dir():
        partial, files = (output / f"{INITIAL}.{name}" for name in ("partial", "files"))
        for each in (partial, files):
            shutil.rmtree(each, ignore_errors=True)
        write_checkpoint(partial, config, seed=seed, unused=False)
        write_model_files(files)
        for file in files.iterdir():
            if file.name != "config.json":
                file.rename(partial / file.name)
        shutil.rmtree(files)
        partial.rename(folder)
    return folder


def _warn(sentence: str) -> None:
    print(f"keye-jax: skipped: {sentence}", file=sys.stderr, flush=True)
