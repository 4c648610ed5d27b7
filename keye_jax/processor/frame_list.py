"""A video given as its frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keye_jax.errors import UserError
from keye_jax.processor.decode import VideoInfo
from keye_jax.processor.image import open_image, to_rgb, upright_size


class FrameList:
    """A video given as its frames.

    Args:
      frames: an array uint8 [F, H, W, 3], or F sources that `open_image` takes.
      native_fps: frames a second.
      field: the name of the video in error messages.

    Raises:
      UserError: there are no frames, or the array or the first frame is not valid.
    """

    def __init__(self, frames: Sequence[Any] | np.ndarray[Any, Any], native_fps: float, field: str):
        if isinstance(frames, np.ndarray):
            kind, shape = frames.dtype, list(frames.shape)
            if kind != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
                raise UserError(f"{field} is an array {kind}{shape}; it must be uint8 [F, H, W, 3]")
        if not len(frames):
            raise UserError(f"{field} is an empty list; a video must have at least one frame")
        self._frames = frames
        self._field = field
        height, width = upright_size(self._image(0), f"{field}[0]")
        self.info = VideoInfo(height, width, native_fps, np.arange(len(frames)) / native_fps)

    def _image(self, index: int):
        return open_image(self._frames[index], f"{self._field}[{index}]")

    def read(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index, pixels) for each of `indices`, int64 [n]; pixels are uint8 [H, W, 3].

        Raises:
          UserError: a frame is not an image, or is damaged.
        """
        for index in indices.tolist():
            yield index, np.asarray(to_rgb(self._image(index), f"{self._field}[{index}]"))
