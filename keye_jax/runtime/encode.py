"""Batching images and frames for the vision encoder: a bounded number of patches in one step on each device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from keye_jax.runtime.prefill import round_up

ENCODE_PATCHES = 8192
"""Patches encoded in one step: whole frames, at least one (the publisher's Chunk ViT)."""


IMAGE_PATCHES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 81920)
"""Patches that an image is padded to where steps have few shapes: the last are 20,480 tokens, the publisher's limit."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageBatch:
    """Images of one size that are encoded in one step.

    Attributes:
      patches: `[f, p, features]`; images that are fewer, or have fewer patches, are padded with zeros behind.
      height, width: of each image in patches.
      images: how many there are.
    """

    patches: np.ndarray
    height: int
    width: int
    images: int


def batch_images(patches: np.ndarray, grids: np.ndarray, devices: int) -> Iterator[ImageBatch]:
    """Batches of neighbouring images of one size.

    Args:
      patches: `[sum(h*w), features]`, each image's in raster order.
      grids: int `[g, 3]`: 1, height and width in patches.
      devices: how many share the images out.
    """
    done = 0
    for height, width, images in _runs(grids):
        each = height * width
        at_once = _at_once(images, each, devices)
        for first in range(0, images, at_once):
            here = min(at_once, images - first)
            batch = np.zeros((at_once, round_up(each), patches.shape[1]), patches.dtype)
            batch[:here, :each] = patches[done : done + here * each].reshape(here, each, -1)
            yield ImageBatch(batch, height, width, here)
            done += here * each


def image_batch(patches: np.ndarray, grid: np.ndarray, devices: int) -> ImageBatch:
    """One batch of a fixed shape: as many images as fill `ENCODE_PATCHES` on each device, of which some may be empty.

    Args:
      patches: `[n * h * w, features]`, of at most `images_at_once` images of one size.
      grid: int `[3]`: 1, height and width in patches.
      devices: as for `batch_images`.
    """
    height, width = int(grid[1]), int(grid[2])
    each = height * width
    images = len(patches) // each
    batch = np.zeros((images_at_once(each, devices), padded_patches(each), patches.shape[1]), patches.dtype)
    batch[:images, :each] = patches.reshape(images, each, -1)
    return ImageBatch(batch, height, width, images)


def padded_patches(patches: int) -> int:
    """The next one of `IMAGE_PATCHES`; beyond the last, a multiple of it."""
    return next(
        (size for size in IMAGE_PATCHES if size >= patches), -(-patches // IMAGE_PATCHES[-1]) * IMAGE_PATCHES[-1]
    )


def images_at_once(patches: int, devices: int) -> int:
    """Images of `patches` patches in one batch of a fixed shape."""
    return devices * max(1, ENCODE_PATCHES // padded_patches(patches))


def _at_once(images: int, patches: int, devices: int) -> int:
    """How many of a number of images, of `patches` patches each, are encoded in one step."""
    return devices * max(1, min(-(-images // devices), ENCODE_PATCHES // round_up(patches)))


def _runs(grids: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Height, width and number of each run of grids of one size."""
    start = 0
    for end in range(1, len(grids) + 1):
        if end == len(grids) or (grids[end] != grids[start]).any():
            yield int(grids[start, 1]), int(grids[start, 2]), end - start
            start = end
