"""Batches of the generated world, without end: scenes are made on the host, and their frames drawn on the device.

Questions take a core's time, so processes make batches ahead.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError, shorten
from keye_jax.page_allocator import PAGE_SIZE
from keye_jax.train.config import StageConfig
from keye_jax.train.packing import PackedArrays
from keye_jax.train.shapes.batches import Batch, BatchOptions, frame_patches
from keye_jax.train.shapes.batches import Batches as Conversations
from keye_jax.train.shapes.scene import SIDE, SceneOptions
from keye_jax.train.workers import Crashed, Workers

_log = logging.getLogger(__name__)
_SETTINGS = ("turns", "apart", "kinds", *(field.name for field in dataclasses.fields(SceneOptions)))


class GeneratedBatches:
    """Batches of scenes, one a row; see `keye_jax.train.data.Batches`.

    Args:
      checkpoint: has the tokenizer and the processor's configuration.
      model: its configuration.
      stage: `data.shapes` and `data.long.shapes` may hold the fields of `SceneOptions`, and `turns`, `apart`
        and `kinds` of `BatchOptions`.
      held_out: whether the scenes are others than those of training.
      count: how many batches there are; None for no end. Without end, `data.workers` processes make them ahead.

    Raises:
      UserError: a setting is not known or not allowed.
    """

    skipped = 0

    def __init__(
        self,
        checkpoint: str | Path,
        model: KeyeConfig,
        stage: StageConfig,
        *,
        held_out: bool = False,
        count: int | None = None,
    ):
        options = [each for each in read_options(stage) if each is not None]
        self._makers = _makers(checkpoint, model, options)
        self._most_ahead = 0 if count else 2 * stage.data.workers
        self._workers = Workers(stage.data.workers, _makers, checkpoint, model, options) if self._most_ahead else None
        self._ahead: deque[Future[Batch]] = deque()
        self._share = stage.data.long.share if stage.data.long else 0.0
        self._accumulation = stage.batch.accumulation
        self._patch, self._count = model.vision_config.patch_size, count
        # Even numbers are seeds of training, and odd ones of evaluations.
        self._seed = 2 * stage.seed + held_out
        self._number = 0

    def state(self) -> dict[str, Any]:
        return {"next": self._number}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._number = state["next"]
        self._forget()

    def epoch(self) -> None:
        return None

    def close(self) -> None:
        self._forget()
        if self._workers is not None:
            self._workers.close()

    def __next__(self) -> PackedArrays:
        if self._number == self._count:
            raise StopIteration
        made = self._make()
        key = jax.random.fold_in(jax.random.key(self._seed), self._number)
        self._number += 1
        rows, tokens = made.ids.shape
        pages = tokens // PAGE_SIZE
        side = SIDE // self._patch
        return PackedArrays(
            ids=made.ids,
            positions=made.positions,
            targets=made.targets,
            vision_index=made.vision_index,
            page_table=np.arange(rows * pages, dtype=np.int32).reshape(rows, pages),
            start=np.zeros(rows, np.int32),
            count=made.lengths,
            sequence=np.arange(rows, dtype=np.int32),
            branch=made.branch,
            images=((frame_patches(made.scenes, key, patch=self._patch), np.full((1, 2), side, np.int32)),),
        )

    def _make(self) -> Batch:
        """The next batch, and has processes make those behind it."""
        if self._workers is not None:
            while len(self._ahead) < self._most_ahead:
                number = self._number + len(self._ahead)
                self._ahead.append(self._workers.submit(_batch, self._which(number), self._seed, number))
            try:
                return self._ahead.popleft().result()
            except Crashed:
                _log.warning("two processes ended while they made batch %d; it is made in this one", self._number)
        return _batch(self._makers, self._which(self._number), self._seed, self._number)

    def _which(self, number: int) -> int:
        """Which options a batch has: 1 for long clips, which come evenly. All batches of a step have one shape."""
        step = number // self._accumulation
        return int(len(self._makers) > 1 and int((step + 1) * self._share) > int(step * self._share))

    def _forget(self) -> None:
        for each in self._ahead:
            each.cancel()
        self._ahead.clear()


def _makers(checkpoint: str | Path, model: KeyeConfig, options: list[BatchOptions]) -> list[Conversations]:
    """What makes batches, with each of the options."""
    return [Conversations(checkpoint, model, each) for each in options]


def _batch(makers: list[Conversations], which: int, seed: int, number: int) -> Batch:
    return makers[which].batch(seed, number)


def read_options(stage: StageConfig) -> tuple[BatchOptions, BatchOptions | None]:
    """The settings of a stage's batches, and of its long ones if it has some.

    Raises:
      UserError: a setting is not known or not allowed.
    """
    usual = _read_options("data.shapes", stage.data.shapes, stage.batch.rows, stage.batch.row)
    long = stage.data.long
    if long is None:
        return usual, None
    return usual, _read_options("data.long.shapes", long.shapes, stage.batch.tokens // long.length, long.length)


def _read_options(field: str, values: Mapping[str, Any], rows: int, tokens: int) -> BatchOptions:
    for name in values:
        if name not in _SETTINGS:
            raise UserError(f"{field}.{name} is not known; known are {', '.join(_SETTINGS)}")
    given = dict(values)
    own = {name: given.pop(name) for name in ("turns", "apart", "kinds") if name in given}
    if not isinstance(own.get("apart", False), bool):
        raise UserError(f"{field}.apart is {shorten(own['apart'])}; it must be true or false")
    if "objects" in given:
        given["objects"] = tuple(given["objects"]) if isinstance(given["objects"], list) else given["objects"]
    try:
        return BatchOptions(scenes=SceneOptions(**given), rows=rows, tokens=tokens, **own)
    except TypeError as error:
        raise UserError(f"{field} is {shorten(dict(values))}; a value has a wrong type ({error})") from error
