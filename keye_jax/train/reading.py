"""Reads samples in processes of their own: a plan from the headers of the media, and then the arrays. Needs no JAX."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keye_jax.errors import UserError
from keye_jax.processor import ModelInputs, Processor
from keye_jax.train.samples import read_conversation
from keye_jax.train.workers import Crashed, Workers


@dataclasses.dataclass(frozen=True)
class Broken:
    """Why a sample cannot be read."""

    message: str


@dataclasses.dataclass(frozen=True)
class Planned:
    """A sample whose media are measured but not decoded.

    Attributes:
      tokens: its length.
      images: patches of each image and each video frame, images first.
      content: what `Reader.decode` takes.
    """

    tokens: int
    images: tuple[int, ...]
    content: bytes


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sample of T tokens as arrays.

    Attributes:
      ids: int32 `[T]`.
      positions: int32 `[3, T]`.
      targets: int32 `[T]`, the token after each, if it is learnt; -1 otherwise.
      images: of each image and frame, images first: patches uint8 `[p, 3 * patch * patch]`, in raster order.
      sizes: int32 `[images, 2]`, height and width in patches.
      image_of, token_of: int32 `[T]`, the image that stands at a token and which of its merged tokens; -1 for text.
    """

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    images: list[np.ndarray]
    sizes: np.ndarray
    image_of: np.ndarray
    token_of: np.ndarray


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a process needs to know.

    Attributes:
      processor: of the checkpoint.
      folder: what paths in samples are relative to.
      template: variables of the chat template.
      merge: side of a merged token in patches.
    """

    processor: Processor
    folder: Path
    template: Mapping[str, Any]
    merge: int

    def plan(self, line: bytes) -> Planned | Broken:
        """Measures the sample in a line."""
        try:
            sample = read_conversation(line, self.folder)
            plan = self.processor.plan(
                sample.messages, tools=sample.tools, template_variables=self.template, learn=sample.learn
            )
        except (UserError, OSError) as error:
            return Broken(str(error))
        patch = self.processor.patch_size
        images = [image.height * image.width // patch**2 for image in plan.images]
        images += [video.height * video.width // patch**2 for video in plan.videos for _ in range(video.frames)]
        return Planned(plan.num_tokens, tuple(images), pickle.dumps(plan, pickle.HIGHEST_PROTOCOL))

    def decode(self, content: bytes) -> Sample | Broken:
        """Decodes the media of a planned sample."""
        plan = pickle.loads(content)
        try:
            inputs = self.processor.process(plan)
        except (UserError, OSError) as error:
            return Broken(str(error))
        return self._arrays(inputs, self.processor.targets(plan, inputs.frame_times))

    def _arrays(self, inputs: ModelInputs, learnt: np.ndarray) -> Sample:
        ids = inputs.input_ids
        targets = np.full(len(ids), -1, np.int32)
        targets[:-1] = np.where(learnt[1:], ids[1:], -1)
        image_of, token_of = np.full((2, len(ids)), -1, np.int32)
        images, sizes = [], []
        kinds = (
            (self.processor.image_token_id, inputs.image_patches, inputs.image_grids),
            (self.processor.video_token_id, inputs.video_patches, inputs.video_grids),
        )
        for token, patches, grids in kinds:
            counts = grids.prod(1) // self.merge**2
            where = np.flatnonzero(ids == token)
            image_of[where] = np.repeat(len(images) + np.arange(len(grids)), counts)
            token_of[where] = np.arange(len(where)) - np.repeat(np.cumsum(counts) - counts, counts)
            ends = np.cumsum(grids.prod(1))
            images += [
                patches[end - size : end].reshape(size, -1) for end, size in zip(ends, grids.prod(1), strict=True)
            ]
            sizes += [grids[:, 1:]]
        return Sample(
            ids, inputs.positions, targets, images, np.concatenate(sizes).astype(np.int32), image_of, token_of
        )


def _run(settings: Settings, method: str, argument: bytes) -> Any:
    return getattr(settings, method)(argument)


class Reader:
    """Plans and decodes samples, in processes or in this one.

    A process that a damaged file crashes costs only that sample, which is `Broken`.

    Args:
      settings: for all of them.
      workers: how many processes; 0 for this one.
    """

    def __init__(self, settings: Settings, workers: int):
        self._settings = settings
        content = pickle.dumps(settings, pickle.HIGHEST_PROTOCOL)
        self._workers = Workers(workers, pickle.loads, content) if workers else None

    def plan(self, line: bytes) -> Callable[[], Planned | Broken]:
        """Begins `Settings.plan`, and returns what waits for its result."""
        return self._submit("plan", line)

    def decode(self, content: bytes) -> Callable[[], Sample | Broken]:
        """Begins `Settings.decode`, and returns what waits for its result."""
        return self._submit("decode", content)

    def close(self) -> None:
        """Ends the processes."""
        if self._workers is not None:
            self._workers.close()

    def _submit(self, method: str, argument: bytes) -> Callable[[], Any]:
        if self._workers is None:
            return lambda: _run(self._settings, method, argument)
        future = self._workers.submit(_run, method, argument)

        def wait() -> Any:
            try:
                return future.result()
            except Crashed:
                return Broken("it crashes the process that decodes it")

        return wait
