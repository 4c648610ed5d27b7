"""Options of images and videos, from requests and from the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from keye_jax.errors import UserError
from keye_jax.processor.media import shorten
from keye_jax.processor.video import DEFAULT_FPS, MAX_FRAME_PIXELS, MIN_FRAME_PIXELS, MIN_FRAMES, TOTAL_PIXELS

_INTEGERS = frozenset({"min_pixels", "max_pixels", "total_pixels", "min_frames", "max_frames"})
_NAMES = {
    "image": ("min_pixels", "max_pixels"),
    "video": ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "native_fps"),
}
# Fields that clients of the OpenAI interface send and that change nothing here.
_IGNORED = frozenset({"detail", "uuid", "format", "mime_type", "cache_control"})


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """Limits on the area of an image, in pixels."""

    min_pixels: int = 4 * 784
    max_pixels: int = 20480 * 784


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """How the frames of a video are chosen and sized; see `keye_jax.processor.video`.

    Attributes:
      fps: wanted frames a second.
      min_frames, max_frames: limits on the number of frames.
      min_pixels, max_pixels: limits on one frame's area, in pixels.
      total_pixels: limit on the area of all frames together, in pixels.
      native_fps: frames a second of a video given as a list or array of frames; not used for files.
      start, end: the part of the video that is shown, in seconds; None is its start or its end.
      subtitles: a path or URL of subtitles, or True for those in the video file; None for none.
    """

    fps: float = DEFAULT_FPS
    min_frames: int = MIN_FRAMES
    max_frames: int | None = None
    min_pixels: int = MIN_FRAME_PIXELS
    max_pixels: int = MAX_FRAME_PIXELS
    total_pixels: int = TOTAL_PIXELS
    native_fps: float = DEFAULT_FPS
    start: float | None = None
    end: float | None = None
    subtitles: str | bool | None = None


def read_options(kind: str, values: Mapping[str, Any], field: str, *, shared: bool = False) -> dict[str, Any]:
    """Checks the options of one kind of media.

    Args:
      kind: "image" or "video".
      values: options by name, with or without the prefix `image_` or `video_`. A prefixed name wins. An option that is
        None is not set.
      field: the name of `values` in error messages.
      shared: whether `values` may hold options of the other kind, which are left out of the result.

    Returns:
      The options by name without prefix.

    Raises:
      UserError: a name is unknown, a value is not a positive number, or a minimum is above its maximum.
    """
    result: dict[str, Any] = {}
    where = f"{field}." if field else ""
    for name, value in sorted(values.items(), key=lambda item: str(item[0]).startswith(f"{kind}_")):
        plain = str(name).removeprefix(f"{kind}_")
        if plain in _NAMES[kind]:
            if value is not None:
                result[plain] = _number(f"{where}{name}", plain, value)
        elif not (shared and any(str(name).removeprefix(f"{other}_") in names for other, names in _NAMES.items())):
            unknown, allowed = shorten(str(name))[1:-1], ", ".join(_NAMES[kind])
            raise UserError(f"{where}{unknown} is not known; an option of {kind} must be one of {allowed}")
    for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
        if low in result and high in result and result[low] > result[high]:
            raise UserError(f"{where}{low} is {result[low]}; it must be at most {high} {result[high]}")
    return result


def _number(field: str, name: str, value: Any) -> int | float:
    whole = name in _INTEGERS
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not number or (whole and value != int(value)):
        raise UserError(f"{field} is {shorten(value)}; it must be a positive {'integer' if whole else 'number'}")
    return int(value) if whole else float(value)


def part_options(kind: str, part: Mapping[str, Any], source: Any, source_key: str, field: str) -> dict[str, Any]:
    """The options of one message part, collected from the four places in which a client may write them.

    Later places win: `preprocess_kwargs` of the part, the part itself, `preprocess_kwargs` of the url object, the url
    object itself.

    Args:
      kind: "image" or "video".
      part: the message part.
      source: the value under `source_key`: the url object, or the source itself.
      source_key: "image_url", "image", "video_url" or "video".
      field: the name of the part in error messages.

    Raises:
      UserError: as `read_options`, or `preprocess_kwargs` is not an object.
    """
    result: dict[str, Any] = {}
    levels = [(part, field, {"type", source_key})]
    if isinstance(source, Mapping):
        levels.append((source, f"{field}.{source_key}", {"url"}))
    for values, where, taken in levels:
        extra = values.get("preprocess_kwargs") or {}
        if not isinstance(extra, Mapping):
            raise UserError(f"{where}.preprocess_kwargs is {shorten(extra)}; it must be an object")
        plain = {name: value for name, value in values.items() if name not in taken | _IGNORED | {"preprocess_kwargs"}}
        result |= read_options(kind, extra, f"{where}.preprocess_kwargs")
        result |= read_options(kind, plain, where)
    return result


def resolve_options[T: (ImageOptions, VideoOptions)](defaults: T, chosen: Mapping[str, Any], field: str) -> T:
    """Replaces defaults by a request's options.

    A default that contradicts a chosen option is moved: a chosen max_pixels below the default min_pixels lowers
    min_pixels to it.

    Raises:
      UserError: a chosen minimum is above a chosen maximum.
    """
    values = dataclasses.asdict(defaults) | dict(chosen)
    for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
        if values.get(low) is None or values.get(high) is None or values[low] <= values[high]:
            continue
        if low in chosen and high in chosen:
            raise UserError(f"{field}.{low} is {values[low]}; it must be at most {high} {values[high]}")
        if low in chosen:
            values[high] = values[low]
        else:
            values[low] = values[high]
    return type(defaults)(**values)
