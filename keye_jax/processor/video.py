"""Videos: which frames the model sees, and at what size.

The formulas are those of the publisher's video processor. One token covers 28x28 = 784 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from keye_jax.errors import UserError
from keye_jax.processor.image_size import smart_resize

TOKEN_PIXELS = 28 * 28
MIN_FRAME_PIXELS = 64 * TOKEN_PIXELS
MAX_FRAME_PIXELS = 256 * TOKEN_PIXELS
TOTAL_PIXELS = 184320 * TOKEN_PIXELS
DEFAULT_FPS = 2.0
MIN_FRAMES = 2


def frame_indices(
    total_frames: int,
    native_fps: float,
    *,
    fps: float = DEFAULT_FPS,
    min_frames: int = MIN_FRAMES,
    max_frames: int | None = None,
    total_pixels: int = TOTAL_PIXELS,
) -> np.ndarray:
    """Indices of the frames that the model sees: `fps` a second, evenly spread from the first frame to the last.

    n = max(int(total_frames / native_fps * min(fps, native_fps)), min_frames), but at most `max_frames`, `total_frames`
    and total_pixels // (64 * 784). The indices are round(linspace(0, total_frames - 1, n)).

    Args:
      total_frames: number of frames of the video.
      native_fps: frames a second of the video.
      fps: wanted frames a second.
      min_frames, max_frames: limits on n; `max_frames` wins over `min_frames`.
      total_pixels: limit on the area of the n frames together, in pixels.

    Returns:
      int64 [n], increasing.

    Raises:
      UserError: a value is not positive, or `total_pixels` is too small for one frame of 64 tokens.
    """
    for name, value in (("total_frames", total_frames), ("native_fps", native_fps)):
        _check_positive(name, value)
    limits = {"min_frames": min_frames, "max_frames": max_frames, "total_pixels": total_pixels}
    count = min(frame_count(total_frames / native_fps, min(fps, native_fps), **limits), total_frames)
    return np.round(np.linspace(0, total_frames - 1, count)).astype(np.int64)


def frame_count(
    seconds: float,
    fps: float,
    *,
    min_frames: int = MIN_FRAMES,
    max_frames: int | None = None,
    total_pixels: int = TOTAL_PIXELS,
) -> int:
    """How many frames the model sees of a video that has enough of them; arguments as for `frame_indices`."""
    values = {"seconds": seconds, "fps": fps, "min_frames": min_frames, "max_frames": max_frames}
    for name, value in values.items():
        if value is not None:
            _check_positive(name, value)
    check_total_pixels(total_pixels)
    count = min(max(int(seconds * fps), min_frames), total_pixels // MIN_FRAME_PIXELS)
    return count if max_frames is None else min(count, max_frames)


def check_total_pixels(total_pixels: int) -> None:
    """Raises UserError if `total_pixels` is too small for one frame of 64 tokens."""
    if total_pixels < MIN_FRAME_PIXELS:
        allowed = f"at least {MIN_FRAME_PIXELS} (one frame of 64 tokens of 28x28 pixels)"
        raise UserError(f"total_pixels is {total_pixels}; it must be {allowed}")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name} is {value}; it must be positive")


def frame_size(
    frames: int,
    height: int,
    width: int,
    *,
    min_pixels: int = MIN_FRAME_PIXELS,
    max_pixels: int = MAX_FRAME_PIXELS,
    total_pixels: int = TOTAL_PIXELS,
) -> tuple[int, int]:
    """The size at which the model sees each of `frames` frames.

    The tokens of a frame are total_pixels // 784 // frames, clipped to min_pixels // 784 and max_pixels // 784.
    `smart_resize` then fits the frame between min_pixels and tokens * 784 pixels. The publisher finds the tokens by
    bisection.

    Args:
      frames: number of frames that the model sees.
      height, width: native size in pixels, after rotation.
      min_pixels, max_pixels: limits on one frame's area, in pixels.
      total_pixels: limit on the area of all frames together, in pixels.

    Returns:
      (height, width) in pixels, multiples of 28.

    Raises:
      UserError: a limit is not positive, min_pixels is above max_pixels, or the aspect ratio is above 200.
    """
    limits = {"frames": frames, "min_pixels": min_pixels, "max_pixels": max_pixels, "total_pixels": total_pixels}
    for name, value in limits.items():
        if value <= 0:
            raise UserError(f"{name} is {value}; it must be positive")
    if min_pixels > max_pixels:
        raise UserError(f"min_pixels is {min_pixels}; it must be at most max_pixels {max_pixels}")
    fewest = max(1, min_pixels // TOKEN_PIXELS)
    most = max(1, max_pixels // TOKEN_PIXELS)
    tokens = min(max(total_pixels // TOKEN_PIXELS // frames, fewest), most)
    return smart_resize(height, width, min_pixels=fewest * TOKEN_PIXELS, max_pixels=tokens * TOKEN_PIXELS)


def adaptive_factor(duration: float, table: Sequence[tuple[float, float]]) -> float:
    """The fraction of `total_pixels` that a video may use.

    Args:
      duration: length of the video in seconds.
      table: rows (seconds, factor) by increasing seconds. The first row with duration <= seconds applies; without one
        the fraction is 1.
    """
    return next((factor for seconds, factor in table if duration <= seconds), 1.0)
