"""Which frames of a video the model sees: those asked for, or so many a second, in the part of the video asked for."""

from __future__ import annotations

import numpy as np

from keye_jax.errors import UserError
from keye_jax.processor.decode import VideoInfo
from keye_jax.processor.options import VideoOptions
from keye_jax.processor.video import MIN_FRAME_PIXELS, check_total_pixels, frame_count, frame_indices

# Seconds. Stamps are rounded to their ticks, and times that a user writes to what was shown to him.
_TOLERANCE = 2e-3


def select_frames(info: VideoInfo, options: VideoOptions, total_pixels: int, *, every: bool = False) -> np.ndarray:
    """Indices of the frames that the model sees, int64 [n], increasing.

    At a constant rate they are the publisher's, `frame_indices`. At a variable rate as many moments are spread evenly
    over the time, and each shows the frame that a player shows then. A frame that is shown for longer than from one
    moment to the next appears once.

    Args:
      info: of the video.
      options: `fps` and its limits, `start` and `end`, or the frames asked for.
      total_pixels: limit on the area of all frames together, in pixels.
      every: whether all frames are wanted, as far as the limits allow, in place of `fps`.

    Raises:
      UserError: an option asks for what the video does not have, or for more frames than `total_pixels` allows.
    """
    check_total_pixels(total_pixels)
    times = info.times
    if options.frame_indices is not None:
        chosen = np.array(options.frame_indices, np.int64)
        if chosen.max() >= info.num_frames:
            raise UserError(f"frame_indices has {chosen.max()}; the video has frames 0 to {info.num_frames - 1}")
        return _few_enough("frame_indices", np.unique(chosen), total_pixels)
    if options.frame_times is not None:
        latest = max(options.frame_times)
        if latest > info.duration + _TOLERANCE:
            raise UserError(f"frame_times has {latest:g}; the video ends at {info.duration:.3f} s")
        return _few_enough("frame_times", np.unique(_shown_at(times, np.array(options.frame_times))), total_pixels)

    first, last = _part(info, options.start, options.end)
    count = last - first + 1
    if options.num_frames is not None:
        wanted = min(options.num_frames, count)
        if wanted > total_pixels // MIN_FRAME_PIXELS:
            allowed = total_pixels // MIN_FRAME_PIXELS
            raise UserError(f"num_frames is {options.num_frames}; total_pixels {total_pixels} allows {allowed}")
        if info.constant:
            return first + np.round(np.linspace(0, count - 1, wanted)).astype(np.int64)
        return _evenly_in_time(times, first, last, wanted, fewest=wanted)
    limits = {"min_frames": options.min_frames, "max_frames": options.max_frames, "total_pixels": total_pixels}
    if every:
        wanted = min(count, options.max_frames or count, total_pixels // MIN_FRAME_PIXELS)
        return first + np.round(np.linspace(0, count - 1, wanted)).astype(np.int64)
    if info.constant:
        return first + frame_indices(count, info.native_fps, fps=options.fps, **limits)
    seconds = times[last] - times[first] + info.duration - times[-1]
    moments = frame_count(seconds, options.fps, **limits)
    return _evenly_in_time(times, first, last, moments, fewest=min(options.min_frames, moments, count))


def _part(info: VideoInfo, start: float | None, end: float | None) -> tuple[int, int]:
    """The first and the last frame of the part from `start` to `end`, in seconds."""
    start, end = start or 0.0, info.duration if end is None else end
    if start > info.duration - _TOLERANCE:
        raise UserError(f"start is {start:g}; the video ends at {info.duration:.3f} s")
    first = int(np.searchsorted(info.times, start - _TOLERANCE))
    last = int(np.searchsorted(info.times, end + _TOLERANCE, "right")) - 1
    if first > last:  # the part lies between two frames, and the earlier one is shown all the time
        first = last = max(last, 0)
    return first, last


def _shown_at(times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The frames that are shown at some moments, int64; both in seconds."""
    return np.maximum(np.searchsorted(times, moments + _TOLERANCE, "right") - 1, 0)


def _evenly_in_time(times: np.ndarray, first: int, last: int, moments: int, *, fewest: int) -> np.ndarray:
    """The frames shown at moments evenly spread from one frame to another; evenly by number if there are too few."""
    chosen = np.unique(_shown_at(times, np.linspace(times[first], times[last], moments)))
    if len(chosen) < fewest:
        chosen = first + np.round(np.linspace(0, last - first, fewest)).astype(np.int64)
    return chosen


def _few_enough(name: str, chosen: np.ndarray, total_pixels: int) -> np.ndarray:
    allowed = total_pixels // MIN_FRAME_PIXELS
    if len(chosen) > allowed:
        raise UserError(f"{name} has {len(chosen)} frames; total_pixels {total_pixels} allows {allowed}")
    return chosen
