"""Batches of a file of samples: in a shuffled order that a checkpoint keeps, decoded by other processes, packed."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.sharding import MeshRules, StepSharding
from keye_jax.train.config import StageConfig
from keye_jax.train.packing import PackedArrays, Packer, Place, pack, whole_problem
from keye_jax.train.reading import Broken, Planned, Reader, Sample, Settings
from keye_jax.train.samples import Lines


class Batches(Protocol):
    """Batches for training, one after the other.

    Attributes:
      skipped: samples that could not be read so far.
    """

    skipped: int

    def __next__(self) -> PackedArrays: ...

    def state(self) -> dict[str, Any]:
        """Where the batches stand, for `restore`: a JSON object. The batch that `__next__` returned last is before."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, with the same batches."""
        ...

    def epoch(self) -> float | None:
        """Passes over the data so far; None if it has no end."""
        ...

    def close(self) -> None: ...


@dataclasses.dataclass
class _Waiting:
    """A sample that is in no batch yet.

    Attributes:
      position: in the order of all epochs.
      plan: waits for its plan.
    """

    position: int
    plan: Callable[[], Planned | Broken]


@dataclasses.dataclass
class _Pack:
    """A batch that is being decoded.

    Attributes:
      samples: their places, positions, and what waits for their arrays.
      state: that of the batches behind it.
      nbytes: of its images.
    """

    samples: list[tuple[Place, int, Callable[[], Sample | Broken]]]
    state: dict[str, Any]
    nbytes: int


class FileBatches:
    """The batches of a JSONL file; see `Batches`.

    Memory: `data.byte_budget` of decoded images, at least those of one batch, and the batch itself.

    Args:
      path: the file.
      processor: of the checkpoint.
      model, stage: configurations.
      groups: of devices, as for `Packer`.
      epochs: how often each sample comes; None for no end.
      shuffle: whether the order changes with every epoch; in that of the file otherwise.
      report: takes a sentence for each sample that is skipped.

    Raises:
      UserError: there is no sample; or, when a batch is asked for, one is broken and the stage says to refuse it.
    """

    def __init__(
        self,
        path: str | Path,
        processor: Processor,
        model: KeyeConfig,
        stage: StageConfig,
        *,
        groups: int = 1,
        epochs: float | None = None,
        shuffle: bool = True,
        report: Callable[[str], None] = lambda _: None,
    ):
        import grain  # here, since generated data do without

        self._lines = Lines(path)
        order = grain.MapDataset.source(self._lines).seed(stage.seed)
        self._order: Any = (order.shuffle() if shuffle else order).repeat()
        self._end = None if epochs is None else max(1, round(epochs * len(self._lines)))
        self._stage, self._groups, self._report = stage, groups, report
        self._merge = model.vision_config.spatial_merge_size
        self._features = 3 * processor.patch_size**2
        settings = Settings(processor, Path(path).absolute().parent, stage.data.template, self._merge)
        self._reader = Reader(settings, stage.data.workers)
        self.restore({"next": 0, "waiting": [], "skipped": 0})

    def state(self) -> dict[str, Any]:
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        self._state = dict(state)
        self.skipped, self._next = state["skipped"], state["next"]
        self._waiting = deque(self._plan(position) for position in state["waiting"])
        self._decoding: deque[_Pack] = deque()
        self._said: set[int] = set()
        self._some_are_good = False

    def epoch(self) -> float:
        return (self._state["next"] - len(self._state["waiting"])) / len(self._lines)

    def close(self) -> None:
        self._reader.close()

    def __iter__(self) -> Iterator[PackedArrays]:
        return self

    def __next__(self) -> PackedArrays:
        budget = self._stage.data.byte_budget
        while not self._decoding or sum(each.nbytes for each in self._decoding) < budget:
            if len(self._decoding) > self._stage.data.workers or (made := self._next_pack()) is None:
                break
            self._decoding.append(made)
        if not self._decoding:
            raise StopIteration
        decoded = self._decoding.popleft()
        ahead = self.skipped - decoded.state["skipped"]
        placed = []
        for place, position, wait in decoded.samples:
            sample = wait()
            if isinstance(sample, Sample) and len(sample.ids) > place.rows * self._stage.batch.row:
                sample = Broken("damage changes its length")
            if isinstance(sample, Broken):
                self._skip(position, sample.message)
            else:
                placed.append((place, sample))
        # Samples that were skipped for later batches are skipped again after a restore.
        self._state = decoded.state | {"skipped": self.skipped - ahead}
        for later in self._decoding:
            later.state["skipped"] += len(decoded.samples) - len(placed)
        if not placed:
            return next(self)
        return pack(self._stage.batch, placed, groups=self._groups, features=self._features, merge=self._merge)

    def count(self) -> int:
        """How many batches are left, from the headers of the media. The batches do not move on."""
        before, batches = self._state, 0
        while self._next_samples():
            batches += 1
        self.restore(before)
        return batches

    def _plan(self, position: int) -> _Waiting:
        return _Waiting(position, self._reader.plan(self._order[position][1]))

    def _next_samples(self) -> list[tuple[Place, int, Planned]]:
        """Places the samples of the next batch: the oldest first, then those of the next ones that still fit."""
        packer, chosen = Packer(self._stage.batch, self._groups), []
        looked = 0
        while looked < self._stage.data.lookahead:
            if looked == len(self._waiting):
                if self._end is not None and self._next >= self._end:
                    break
                self._look_ahead()
            each = self._waiting[looked]
            plan = each.plan()
            each.plan = lambda plan=plan: plan
            if isinstance(plan, Planned):
                problem = whole_problem(self._stage.batch, self._groups, plan.tokens, plan.images)
                plan = plan if problem is None else Broken(problem)
                self._some_are_good |= problem is None
            if isinstance(plan, Broken):
                del self._waiting[looked]
                self._skip(each.position, plan.message)
                continue
            place = packer.place(plan.tokens, plan.images)
            if place is None:
                looked += 1
                continue
            del self._waiting[looked]
            chosen.append((place, each.position, plan))
        return chosen

    def _look_ahead(self) -> None:
        """Begins to plan some more samples."""
        for _ in range(max(1, 2 * self._stage.data.workers)):
            if self._end is None or self._next < self._end:
                self._waiting.append(self._plan(self._next))
                self._next += 1

    def _next_pack(self) -> _Pack | None:
        chosen = self._next_samples()
        if not chosen:
            return None
        waiting = [each.position for each in self._waiting]
        state = {"next": self._next, "waiting": waiting, "skipped": self.skipped}
        nbytes = sum(patches * self._features for _, _, plan in chosen for patches in plan.images)
        samples = [(place, position, self._reader.decode(plan.content)) for place, position, plan in chosen]
        return _Pack(samples, state, nbytes)

    def _skip(self, position: int, message: str) -> None:
        number = self._order[position][0]
        sentence = f"{self._lines.path}, line {number}: {message}"
        if self._stage.data.broken == "refuse":
            raise UserError(sentence)
        self.skipped += 1
        if number not in self._said:
            self._said.add(number)
            self._report(sentence)
        if self.skipped >= len(self._lines) and not self._some_are_good:
            raise UserError(f"{self._lines.path} has no sample that can be read; the last one says: {message}")


def check_sharding(stage: StageConfig, rules: MeshRules, source: str) -> None:
    """Refuses a mesh that a stage cannot train on. Raises UserError as `check_groups` does."""
    if rules.axes("expert_hidden"):
        raise UserError("rules.expert_hidden splits the experts' columns; training needs a sharding without it")
    step = StepSharding.prefill(rules)
    check_groups(stage, step.size(step.batch), step.size(step.rows), step.size(step.vision_patches), source)


def check_groups(stage: StageConfig, groups: int, row_parts: int, image_parts: int, source: str) -> None:
    """Refuses shapes that devices cannot share out evenly.

    Args:
      groups: of devices that have samples of their own.
      row_parts, image_parts: into how many parts devices split rows and images.
      source: what messages call the stage.

    Raises:
      UserError: a number is not a multiple of the parts.
    """
    batch = stage.batch
    if batch.rows % row_parts:
        raise UserError(
            f"{source}: batch.tokens is {batch.tokens}; it must be a multiple of {row_parts} rows of {batch.row} "
            "tokens, into which the sharding splits it"
        )
    if batch.tokens // groups < batch.length:
        raise UserError(
            f"{source}: batch.length is {batch.length}; it must be at most batch.tokens {batch.tokens} divided by the "
            f"{groups} groups of devices that have samples of their own"
        )
    long = stage.data.long
    if long is not None and (batch.tokens // long.length) % row_parts:
        raise UserError(
            f"{source}: batch.tokens is {batch.tokens}; it must be a multiple of {row_parts} rows of data.long.length "
            f"{long.length} tokens, into which the sharding splits it"
        )
    for patches, count in batch.images.items():
        if count % image_parts:
            raise UserError(
                f"{source}: batch.images has {count} places of {patches} patches; it must have a multiple of "
                f"{image_parts}, into which the sharding splits them"
            )
