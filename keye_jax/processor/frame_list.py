"""Videos that are not video files: a list or an array of frames, and an animated picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keye_jax.errors import UserError
from keye_jax.processor.image import opened_image, to_rgb, upright_size
from keye_jax.processor.pixels import resized_pixels
from keye_jax.processor.timeline import VideoInfo

# Milliseconds. Browsers show a frame of at most 10 ms for 100 ms.
_SHORTEST_MS, _INSTEAD_MS = 10, 100


class FrameList:
    """A video given as its frames. Files are opened when they are read, and closed after.

    Args:
      frames: an array uint8 [F, H, W, 3], or F sources that `open_image` takes.
      sample_fps: frames a second at which they were taken.
      field: the name of the video in error messages.

    Attributes:
      frames: as given.
      info: the frames and their times; the size is that of the first frame.
      warnings: sentences about what was not as expected in the frames read so far.

    Raises:
      UserError: there are no frames, or the array or the first frame is not valid.
    """

    def __init__(self, frames: Sequence[Any] | np.ndarray[Any, Any], sample_fps: float, field: str):
        if isinstance(frames, np.ndarray):
            kind, shape = frames.dtype, list(frames.shape)
            if kind != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
                raise UserError(f"{field} is an array {kind}{shape}; it must be uint8 [F, H, W, 3]")
        if not len(frames):
            raise UserError(f"{field} is an empty list; a video must have at least one frame")
        self.frames = frames
        self._field = field
        self.warnings: list[str] = []
        with opened_image(frames[0], f"{field}[0]") as image:
            height, width = upright_size(image, f"{field}[0]")
        self.info = VideoInfo(height, width, sample_fps, np.arange(len(frames)) / sample_fps)

    def read(self, indices: np.ndarray, size: tuple[int, int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index, pixels) for each of `indices`, int64 [n]; pixels are uint8 [H, W, 3].

        H and W are `size`. Without it they are the frame's own, which may differ from those of the first frame.

        Raises:
          UserError: a frame is not an image, or nothing of it can be decoded.
        """
        for index in indices.tolist():
            field = f"{self._field}[{index}]"
            with opened_image(self.frames[index], field) as image:
                pixels = np.asarray(to_rgb(image, field, self._warn))
            if pixels.shape[:2] != (self.info.height, self.info.width):
                first = f"the first, {self.info.width}x{self.info.height}"
                self._warn(f"{self._field} has frames of several sizes; all are resized as {first}")
            yield index, pixels if size is None else resized_pixels(pixels, size)

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)


class AnimatedImage:
    """An animated GIF, WebP, PNG or AVIF as a video. One frame at a time is in memory.

    The times are the sums of the frames' durations; at most 10 ms counts as 100 ms, as in browsers. The constructor
    decodes all frames once, because only then are their durations known.

    Args:
      source: a path, or the content of a file.
      field: the name of the video in error messages.

    Attributes:
      info: the frames and their times.
      warnings: sentences about what is missing.

    Raises:
      UserError: the file is not an image, or its first frame is damaged.
    """

    def __init__(self, source: Path | bytes, field: str):
        self._source = source
        self._field = field
        self.warnings: list[str] = []
        with opened_image(source, field) as image:
            height, width = upright_size(image, field)
        durations = np.array([self._duration(image) for _, image in self._play()])
        times = (np.cumsum(durations) - durations) / 1000
        constant = len(set(durations.tolist())) == 1
        self.info = VideoInfo(height, width, 1000 * len(durations) / float(durations.sum()), times, constant)

    @staticmethod
    def _duration(image: Image.Image) -> float:
        """Milliseconds for which the frame at which an animation stands is shown."""
        duration = float(image.info.get("duration") or 0)
        return duration if duration > _SHORTEST_MS else _INSTEAD_MS

    def _play(self) -> Iterator[tuple[int, Image.Image]]:
        """Yields (index, image); the image stands at that frame, which is decoded."""
        with opened_image(self._source, self._field) as image:
            # The default image of an APNG is for programs that do not know APNG.
            first = int(bool(image.info.get("default_image")))
            for number in itertools.count(first):
                try:
                    image.seek(number)
                    image.load()
                except Exception as error:  # of a damaged file, Pillow's formats raise exceptions of any kind
                    if number == first:
                        raise UserError(f"{self._field} is an animation whose first frame is damaged") from error
                    if not isinstance(error, EOFError) or number < getattr(image, "n_frames", 1):
                        self._warn(f"{self._field} is cut off or damaged; it is shown up to frame {number - first}")
                    return
                yield number - first, image

    def read(self, indices: np.ndarray, size: tuple[int, int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index, pixels) for each of `indices`, int64 [n], increasing; pixels are uint8 [H, W, 3] over white.

        H and W are `size`, or the size in `info`.

        Raises:
          UserError: the file has changed and has fewer frames.
        """
        wanted = indices.tolist()
        for index, image in self._play():
            if not wanted:
                return
            if index == wanted[0]:
                pixels = np.asarray(to_rgb(image, self._field))
                pixels = pixels if size is None else resized_pixels(pixels, size)
                while wanted and index == wanted[0]:
                    yield wanted.pop(0), pixels
        if wanted:
            raise UserError(f"{self._field} has no frame {wanted[0]}; the file has changed since it was planned")

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)
