"""Packs samples into batches of one shape. Needs no JAX.

A sample fills whole rows, and lies on one group of devices: those that share its keys. Groups get equal work, since
each has the same number of rows, and a sample goes to the group with the most free ones. Images and frames have a
number of places of each size, which are shared out over all devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from keye_jax.train.config import PAGE_TOKENS, BatchConfig
from keye_jax.train.reading import Sample


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a sample lies in a batch.

    Attributes:
      group: of devices.
      row: its first row, of all rows of the batch.
      rows: how many it has room for.
      buckets: of each of its images, the index of a size in `BatchConfig.images` in increasing order.
    """

    group: int
    row: int
    rows: int
    buckets: tuple[int, ...]


class Packer:
    """Places samples one by one.

    Args:
      config: the shapes.
      groups: of devices; each has the same number of rows.
    """

    def __init__(self, config: BatchConfig, groups: int = 1):
        self._config, self._groups = config, groups
        self._sizes = sorted(config.images)
        self._free_rows = [config.rows // groups] * groups
        self._free_images = [config.images[size] for size in self._sizes]
        self._free_samples = [config.samples_of(groups)] * groups

    def place(self, tokens: int, images: Sequence[int]) -> Place | None:
        """Takes room for a sample; None if there is not enough left.

        Args:
          tokens: its length.
          images: patches of each image.
        """
        rows = -(-tokens // self._config.row)
        group = max(range(self._groups), key=lambda each: self._free_rows[each])
        if rows > self._free_rows[group] or not self._free_samples[group]:
            return None
        free, buckets = list(self._free_images), []
        for patches in images:
            bucket = next(
                (i for i, size in enumerate(self._sizes) if size >= patches and free[i]),
                None,
            )
            if bucket is None:
                return None
            free[bucket] -= 1
            buckets.append(bucket)
        each = self._config.rows // self._groups
        row = (group + 1) * each - self._free_rows[group]
        self._free_images = free
        self._free_rows[group] -= rows
        self._free_samples[group] -= 1
        return Place(group, row, rows, tuple(buckets))


def whole_problem(config: BatchConfig, groups: int, tokens: int, images: Sequence[int]) -> str | None:
    """Why a sample fits into no batch; None if it fits into an empty one."""
    if tokens > config.length:
        return f"it has {tokens:,} tokens; batch.length is {config.length:,}"
    largest = max(config.images, default=0)
    if (most := max(images, default=0)) > largest:
        return f"it has an image or frame of {most:,} patches; the largest of batch.images is {largest:,}"
    if Packer(config, groups).place(tokens, images) is None:
        return f"its {tokens:,} tokens and {len(images):,} images and frames are more than a batch has room for"
    return None


@dataclasses.dataclass(frozen=True)
class PackedArrays:
    """A batch as NumPy arrays: the fields of `keye_jax.train.forward.PackedBatch` and of its metadata.

    Attributes:
      ids, positions, targets, vision_index: int32 `[rows, t]`, positions `[3, rows, t]`.
      page_table: int32 `[samples, m]`, pages of a group, from its first; the samples of one group after the other.
      start, count, sequence: int32 `[rows]`; samples count from the first of their group.
      images: of each size, patches uint8 `[n, p, features]`, which may be on the device, and sizes int32 `[n, 2]`, or
        `[1, 2]` where all are alike.
      branch: int32 `[rows, t]`, as of `PackedContext`, or None.
    """

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    vision_index: np.ndarray
    page_table: np.ndarray
    start: np.ndarray
    count: np.ndarray
    sequence: np.ndarray
    images: tuple[tuple[Any, np.ndarray], ...]
    branch: np.ndarray | None = None


def pack(
    config: BatchConfig, placed: Sequence[tuple[Place, Sample]], *, groups: int, features: int, merge: int
) -> PackedArrays:
    """The batch of placed samples.

    Args:
      groups: as for `Packer`.
      features: numbers of a patch.
      merge: side of a merged token in patches.
    """
    rows, t = config.rows, config.row
    pages, per_row, group_rows = config.length // PAGE_TOKENS, t // PAGE_TOKENS, rows // groups
    ids, targets, vision = np.zeros((rows, t), np.int32), np.full((rows, t), -1, np.int32), np.full((rows, t), -1)
    positions = np.zeros((3, rows, t), np.int32)
    group_samples = config.samples_of(groups)
    table = np.zeros((groups * group_samples, pages), np.int32)
    numbers = [0] * groups
    start, count, sequence = np.zeros((3, rows), np.int32)
    sizes = sorted(config.images)
    # What stands in an empty place is one merged token, so that no size is 0.
    images = [
        (np.zeros((config.images[size], size, features), np.uint8), np.full((config.images[size], 2), merge, np.int32))
        for size in sizes
    ]
    tokens_of = [size // merge**2 for size in sizes]
    first_token = np.cumsum([0, *(config.images[size] * each for size, each in zip(sizes, tokens_of, strict=True))])
    used = [0] * len(sizes)
    for place, sample in placed:
        index, numbers[place.group] = numbers[place.group], numbers[place.group] + 1
        length, here = len(sample.ids), slice(place.row, place.row + place.rows)
        rows_of = np.arange(place.rows) * t
        start[here], count[here], sequence[here] = rows_of, np.clip(length - rows_of, 0, t), index
        first_page = (place.row - place.group * group_rows) * per_row
        table[place.group * group_samples + index] = np.minimum(first_page + np.arange(pages), group_rows * per_row - 1)
        bases = np.zeros(len(sample.images) + 1, np.int64)
        for number, (patches, bucket) in enumerate(zip(sample.images, place.buckets, strict=True)):
            at, used[bucket] = used[bucket], used[bucket] + 1
            images[bucket][0][at, : len(patches)] = patches
            images[bucket][1][at] = sample.sizes[number]
            bases[number] = first_token[bucket] + at * tokens_of[bucket]
        seen = np.where(sample.image_of >= 0, bases[sample.image_of] + sample.token_of, -1)
        for array, values, empty in ((ids, sample.ids, 0), (targets, sample.targets, -1), (vision, seen, -1)):
            array[here] = _in_rows(values, place.rows, t, empty)
        for axis in range(3):
            positions[axis, here] = _in_rows(sample.positions[axis], place.rows, t, 0)
    return PackedArrays(ids, positions, targets, vision.astype(np.int32), table, start, count, sequence, tuple(images))


def _in_rows(values: np.ndarray, rows: int, t: int, empty: int) -> np.ndarray:
    padded = np.full(rows * t, empty, values.dtype)
    padded[: len(values)] = values
    return padded.reshape(rows, t)
