"""A run of training: from a checkpoint and a stage to another checkpoint, in as many sittings as it takes."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import load_params
from convert.adapter import Adapter, adaptable, read_adapter, write_adapter
from convert.detect import read_config
from convert.export import export
from keye_jax import interrupts
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.model.keye import Keye
from keye_jax.model.params import parameter_axes
from keye_jax.processor import Processor
from keye_jax.sharding import MeshRules, StepSharding
from keye_jax.train.checkpoints import RunCheckpoints
from keye_jax.train.config import StageConfig
from keye_jax.train.data import Batches, check_sharding
from keye_jax.train.forward import Losses, TrainOptions
from keye_jax.train.lora import from_adapter, init_pair, pair_layout, pair_names, targets, to_adapter
from keye_jax.train.optimizer import init_optimizer, make_optimizer
from keye_jax.train.report import Report
from keye_jax.train.steps import TrainStep, measures, selecting_share
from keye_jax.train.weights import ModelDef, Weights, dotted, training_sharding

_AHEAD = 2
"""Steps that are begun before the measures of the first of them are waited for."""


@dataclasses.dataclass
class TrainState:
    """What a step changes.

    Attributes:
      weights: those that train, with low-rank pairs.
      moments: of the optimiser.
      step: how many steps are done.
    """

    weights: Weights
    moments: Any
    step: int = 0


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is loaded for a stage.

    Attributes:
      config: of the model.
      structure: the model without its weights.
      frozen: the weights that do not train.
      trained: those that do, as they are before the first step.
      dtypes: of `trained` in the forward pass.
    """

    config: KeyeConfig
    structure: ModelDef
    frozen: Weights
    trained: Weights
    dtypes: Mapping[str, jnp.dtype]


def load_model(
    checkpoint: str | Path,
    stage: StageConfig,
    rules: MeshRules,
    *,
    adapter: Path | None = None,
    source: str = "stage",
    verify_checksums: bool = False,
) -> Model:
    """Loads a checkpoint for a stage: what trains, and what stays as it is.

    Args:
      checkpoint: a directory of either kind.
      rules: where weights lie; see `training_sharding`.
      adapter: a directory in PEFT's layout with the low-rank pairs to begin with; new ones without.
      source: what messages call the stage.
      verify_checksums: as for `convert.load_params`.

    Raises:
      UserError: checkpoint or adapter is not whole, or they, stage and model do not go together.
    """
    config = read_config(checkpoint)
    check_sharding(stage, rules, source)
    layout = parameter_axes(config)
    stage.check(config, [dotted(path) for path in layout], source)
    shardings: dict[str, Any] = {}
    for path, (shape, axes) in layout.items():
        node = shardings
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = training_sharding(rules, shape, axes)
    params = load_params(
        checkpoint,
        config,
        shardings=shardings if rules.devices > 1 else None,
        verify_checksums=verify_checksums,
    )
    structure, weights = ModelDef.split(Keye.from_params(config, params))
    if stage.dtype != "checkpoint":
        weights = {path: value.astype(stage.dtype) for path, value in weights.items()}
    trained, frozen, dtypes = {}, {}, {}
    for path, value in weights.items():
        if stage.trains(path):
            trained[path] = value.astype(jnp.float32) if stage.master else value
            dtypes[path] = value.dtype
        else:
            frozen[path] = value
    if stage.lora is not None:
        begun = None if adapter is None else read_adapter(adapter, config)
        trained |= _pairs(structure, config, stage, rules, begun, source)
    # Committed, as what a step makes of them and a run's checkpoint are: a step is compiled again where that changes.
    frozen, trained = jax.tree.map(lambda value: jax.device_put(value, value.sharding), (frozen, trained))
    return Model(config, structure, frozen, trained, dtypes)


def _pairs(
    structure: ModelDef, config: KeyeConfig, stage: StageConfig, rules: MeshRules, begun: Adapter | None, source: str
) -> Weights:
    """The low-rank pairs that train: those of an adapter, or new ones."""
    assert stage.lora is not None
    wanted = targets(stage.lora, config, source)
    there = {} if begun is None else _pairs_of(begun, config, stage, wanted.keys(), source)
    pairs: Weights = {}
    for index, (path, tensor) in enumerate(wanted.items()):
        if stage.trains(path):
            raise UserError(f"{source}: train and lora.targets both have {path}; a weight with a pair is frozen")
        made = init_pair(tensor, stage.lora, jax.random.fold_in(jax.random.key(stage.seed), index))
        layout = pair_layout(tensor, structure.axes[path], stage.lora.rank)
        for name, value, (shape, axes) in zip(pair_names(path), made, layout, strict=True):
            pairs[name] = jax.device_put(there.get(name, value), training_sharding(rules, shape, axes))
    return pairs


def _pairs_of(
    adapter: Adapter, config: KeyeConfig, stage: StageConfig, wanted: Collection[str], source: str
) -> dict[str, np.ndarray]:
    """The arrays of an adapter, which has the stage's rank and scale, and a pair for each weight that has one there."""
    assert stage.lora is not None
    for name, found, asked in (("rank", adapter.rank, stage.lora.rank), ("scale", adapter.scale, stage.lora.scale)):
        if found != asked:
            raise UserError(f"{source}: lora has the {name} {asked:g}; the adapter has {found:g}, and they must agree")
    if adapter.pairs.keys() != set(wanted):
        path = min(adapter.pairs.keys() ^ set(wanted))
        which = "adapter" if path in adapter.pairs else "stage"
        raise UserError(f"{source}: only the {which} has a pair for {path}; lora.targets must be those of the adapter")
    return from_adapter(adapter, config)


def train_options(stage: StageConfig, processor: Processor) -> TrainOptions:
    """How the losses of a stage are computed."""
    return TrainOptions(
        attention=stage.attention,
        kl=stage.loss.kl > 0,
        # Dense attention has a selection for this alone; evaluations measure it.
        recall=stage.attention == "sparse",
        detach=stage.detach,
        router=stage.loss.router > 0,
        remat=stage.remat,
        scan_layers=stage.scan_layers,
        pixel_scale=tuple(map(float, processor.pixel_scale)),
        pixel_shift=tuple(map(float, processor.pixel_shift)),
    )


class Trainer:
    """One stage on one model.

    Args:
      model: loaded for the stage.
      stage: what is done.
      options: how losses are computed.
      rules: the devices.
      steps: how many steps the run has.

    Attributes:
      state: what the steps so far have made.
    """

    def __init__(self, model: Model, stage: StageConfig, options: TrainOptions, rules: MeshRules, steps: int):
        self._model, self._stage, self.steps = model, stage, steps
        self._step = TrainStep(
            model=model.structure,
            options=options,
            loss=stage.loss,
            lora_scale=stage.lora.scale if stage.lora else 0.0,
            dtypes=model.dtypes,
            optimizer=make_optimizer(stage.optimizer, steps, list(model.trained)),
            shardings={path: value.sharding for path, value in model.trained.items()} if rules.devices > 1 else {},
            step=StepSharding.prefill(rules),
        )
        self.state = TrainState(model.trained, init_optimizer(self._step.optimizer, model.trained))

    def train(self, batches: Batches) -> dict[str, Any]:
        """One step on the next batches. Returns its measures, which may not be computed yet.

        Raises:
          StopIteration: the data have ended.
        """
        taken = [next(batches) for _ in range(self._stage.batch.accumulation)]
        placed, state = tuple(map(self._step.place, taken)), self.state
        state.weights, state.moments, found = self._step.train(state.weights, state.moments, self._model.frozen, placed)
        state.step += 1
        return found | {"selecting": selecting_share(taken, self._model.config.sa_config.topk)}

    def evaluate(self, batches: Batches) -> dict[str, float]:
        """Measures over all batches there are, with `loss`, by which checkpoints are compared.

        That is the next token's loss, or the indexers' KL divergence where the stage trains nothing else. It is not
        their sum: attention sharpens as it learns, so its divergence from the indexers may grow while answers improve.
        """
        total: Losses | None = None
        for batch in iter(lambda: next(batches, None), None):  # pyright: ignore[reportCallIssue, reportArgumentType]
            found = self._step.evaluate(self.state.weights, self._model.frozen, self._step.place(batch))
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        if total is None:
            raise UserError("--evaluation holds no sample that can be read; it must hold at least one")
        means = {name: float(value) for name, value in measures(total).items()}
        return means | {"loss": means["language" if self._stage.loss.language else "kl"]}

    def write_adapter(self, directory: str | Path, base: str) -> None:
        """Writes the pairs in PEFT's layout; there must be some."""
        assert self._stage.lora is not None
        adapter = to_adapter(self.state.weights, self._stage.lora, self._model.config)
        write_adapter(directory, adapter, self._model.config, base=base)


def export_model(model: Model, stage: StageConfig, weights: Weights, checkpoint: str | Path, dst: str | Path) -> None:
    """Writes a trained model in the released layout; pairs are merged into their weights.

    Args:
      model: as it was loaded for the stage.
      weights: those that train, after some steps.
      checkpoint: the one that was trained from, for all other weights and files.
      dst: a directory that does not exist or is empty.

    Raises:
      UserError: `dst` is not empty.
    """
    made: dict[str, Callable[[], Any]] = {
        path: lambda value=value: np.asarray(value) for path, value in weights.items() if path in model.dtypes
    }
    if stage.lora is not None:
        adapter, tensors = to_adapter(weights, stage.lora, model.config), adaptable(model.config)
        for path in adapter.pairs:
            made[path] = lambda path=path: adapter.merge(tensors[path], np.asarray(model.frozen[path]))
    export(checkpoint, dst, made)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run, or a sitting of it, ended.

    Attributes:
      step: steps that are done and saved.
      finished: whether that is all of them.
      signal: what stopped it, or None.
    """

    step: int
    finished: bool
    signal: signal.Signals | None


def run(
    trainer: Trainer,
    batches: Batches,
    checkpoints: RunCheckpoints,
    report: Report,
    stage: StageConfig,
    *,
    evaluation: Callable[[], Batches] | None = None,
    stop_after: float | None = None,
) -> Ended:
    """Trains from the last checkpoint to the end, to a signal, or for a while; what is done then is saved.

    A run that is killed loses what came after its last checkpoint. Resumed, it goes on bit for bit.

    Args:
      evaluation: makes the batches that are evaluated; None for none.
      stop_after: seconds after which this sitting ends; None for no limit.
    """
    start = time.monotonic()
    state = trainer.state
    found = checkpoints.restore((state.weights, state.moments))
    if found is not None:
        state.step, (state.weights, state.moments), position = found
        batches.restore(position)
    waiting: deque[tuple[int, dict[str, Any], float | None]] = deque()
    first = state.step + 1

    def show(most: int) -> None:
        while len(waiting) > most:
            step, values, epoch = waiting.popleft()
            numbers = {name: float(value) for name, value in jax.device_get(values).items()}
            if not np.isfinite(numbers["language"]) or not all(map(np.isfinite, numbers.values())):
                raise UserError(
                    f"step {step} gives a loss or a gradient that is not finite; "
                    f"start again from the last checkpoint with a lower optimizer.lr"
                )
            if step == first and stage.loss.kl and not numbers["selecting"]:
                report.say("no sample of the first step is longer than topk, so the indexer learns nothing from it")
            report.step(step, numbers | {"tokens": int(numbers["tokens"]), "targets": int(numbers["targets"])}, epoch)

    over, stopped = False, []
    with contextlib.ExitStack() as stack:
        while state.step < trainer.steps:
            late = stop_after is not None and time.monotonic() - start >= stop_after
            if stopped or late:
                break
            try:
                values = trainer.train(batches)
            except StopIteration:
                report.say(f"the data end after step {state.step:,}, since some of it cannot be read")
                over = True
                break
            if state.step == first:
                # Before, the step is compiled, which may take minutes, and there is nothing to save.
                stopped = stack.enter_context(_stop_signal())
            waiting.append((state.step, values, batches.epoch()))
            show(_AHEAD)
            last = state.step == trainer.steps
            loss = None
            if evaluation is not None and stage.evaluate_every and (last or state.step % stage.evaluate_every == 0):
                show(0)
                loss = _evaluate(trainer, evaluation, report)
            due = stage.checkpoint_every and state.step % stage.checkpoint_every == 0
            # What was evaluated is saved, or it could not be the best.
            if last or due or loss is not None:
                show(0)
                checkpoints.save(state.step, (state.weights, state.moments), batches.state(), loss)
        show(0)
        if state.step:
            checkpoints.save(state.step, (state.weights, state.moments), batches.state())
    return Ended(state.step, over or state.step >= trainer.steps, stopped[0] if stopped else None)


def _evaluate(trainer: Trainer, evaluation: Callable[[], Batches], report: Report) -> float:
    batches = evaluation()
    try:
        found = trainer.evaluate(batches)
    finally:
        batches.close()
    report.evaluation(trainer.state.step, found)
    return found["loss"]


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[signal.Signals]]:
    """Collects SIGINT and SIGTERM in a list in place of ending the process; a second one ends it."""
    got: list[signal.Signals] = []

    def take(number: int, frame: FrameType | None) -> None:
        if not got:
            got.append(signal.Signals(number))
        elif callable(handler := before[signal.Signals(number)]):
            handler(number, frame)
        else:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with interrupts.ended_by_second():
            yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
