"""Options of images and videos, from requests and from the command line."""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keye_jax.errors import UserError, shorten, shorten_name
from keye_jax.processor.image import MAX_SHOWN_PIXELS
from keye_jax.processor.video import DEFAULT_FPS, MAX_FRAME_PIXELS, MIN_FRAME_PIXELS, MIN_FRAMES, TOTAL_PIXELS

LOW_DETAIL_PIXELS = 512 * 512
# Limits on values.
MAX_COUNT = 10**9
MAX_PIXELS = 10**12
MAX_SIDE = 10**5
MIN_RATE, MAX_RATE = 1e-6, 1e6
MAX_SECONDS = 10**9
MAX_LISTED = 10**5


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """Limits on the area of an image, in pixels.

    Attributes:
      min_pixels, max_pixels: limits on the area, in pixels.
      resized_height, resized_width: the size at which the model sees the image, in pixels, in place of the limits on
        its area. Both are set, or none.
    """

    min_pixels: int = 4 * 784
    max_pixels: int = 20480 * 784
    resized_height: int | None = None
    resized_width: int | None = None


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """How the frames of a video are chosen and sized; see `keye_jax.processor.video`.

    Of `frame_indices`, `frame_times` and `num_frames` at most one is set. It takes the place of `fps`.

    Attributes:
      fps: wanted frames a second.
      min_frames, max_frames: limits on the number of frames.
      min_pixels, max_pixels: limits on one frame's area, in pixels.
      total_pixels: limit on the area of all frames together, in pixels.
      start, end: the part of the video that the model sees, in seconds.
      num_frames: wanted number of frames.
      frame_times: wanted frames by their times, in seconds, rising.
      frame_indices: wanted frames by their indices from 0, rising.
      resized_height, resized_width: the size at which the model sees a frame, in pixels, in place of the limits on its
        area. Both are set, or none.
      sample_fps: frames a second at which the frames of a list or array were taken; not used for files.
      subtitles: a source of subtitles, or "container" for those in the file.
    """

    fps: float = DEFAULT_FPS
    min_frames: int = MIN_FRAMES
    max_frames: int | None = None
    min_pixels: int = MIN_FRAME_PIXELS
    max_pixels: int = MAX_FRAME_PIXELS
    total_pixels: int = TOTAL_PIXELS
    start: float | None = None
    end: float | None = None
    num_frames: int | None = None
    frame_times: tuple[float, ...] | None = None
    frame_indices: tuple[int, ...] | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    sample_fps: float | None = None
    subtitles: Any = None


_FIELDS = {
    kind: tuple(field.name for field in dataclasses.fields(options))
    for kind, options in (("image", ImageOptions), ("video", VideoOptions))
}
# Names that other tools give to the options.
_ALIASES = {
    "nframes": "num_frames",
    "max_frames_num": "max_frames",
    "max_num_frames": "max_frames",
    "native_fps": "sample_fps",
    "raw_fps": "sample_fps",
}
# Fields that clients send and that change nothing here.
_IGNORED = frozenset(
    (
        *("uuid", "format", "mime_type", "media_type", "cache_control", "filename", "id", "index"),
        *("backend", "video_backend", "load_backend", "image_mode", "do_sample_frames", "use_fast", "return_tensors"),
        *("return_metadata", "device"),
    )
)
# Objects in which clients put further options of one kind.
_NESTED = {
    "image": ("preprocess_kwargs", "image_kwargs", "images_kwargs"),
    "video": ("preprocess_kwargs", "video_kwargs", "videos_kwargs"),
}
_CHOICES = frozenset({"fps", "num_frames", "frame_times", "frame_indices"})
_CONFLICTS = {name: _CHOICES - {name} for name in _CHOICES} | {
    "frame_times": _CHOICES - {"frame_times"} | {"start", "end"},
    "frame_indices": _CHOICES - {"frame_indices"} | {"start", "end"},
    "start": frozenset({"frame_times", "frame_indices"}),
    "end": frozenset({"frame_times", "frame_indices"}),
}
_PAIRS = (("min_pixels", "max_pixels"), ("min_frames", "max_frames"))
_DETAILS = ("low", "high", "auto")


def read_options(kind: str, values: Mapping[str, Any], field: str, *, shared: bool = False) -> dict[str, Any]:
    """Checks the options of one kind of media.

    Args:
      kind: "image" or "video".
      values: options by name, with or without the prefix `image_` or `video_`. A prefixed name wins. An option that is
        None is not set.
      field: the name of `values` in error messages.
      shared: whether `values` may hold options of the other kind, which are left out of the result.

    Returns:
      The options by the names of `ImageOptions` or `VideoOptions`.

    Raises:
      UserError: a name is unknown, a value is not allowed, a minimum is above its maximum, or two options contradict
        each other.
    """
    result = _read(kind, values, field, shared)
    _check_conflicts(result, field)
    return result


def _read(kind: str, values: Mapping[str, Any], field: str, shared: bool) -> dict[str, Any]:
    result: dict[str, Any] = {}
    given: dict[str, str] = {}
    where = f"{field}." if field else ""
    named = {name if isinstance(name, str) else shorten(name): value for name, value in values.items()}
    for name, value in sorted(named.items(), key=lambda item: item[0].startswith(f"{kind}_")):
        option = _option(kind, name)
        if option is None:
            if not (shared and any(_option(other, name) for other in _FIELDS)):
                allowed = ", ".join(_FIELDS[kind])
                raise UserError(
                    f"{where}{shorten_name(name)} is not known; an option of {kind} must be one of {allowed}"
                )
        elif value is not None:
            value = _READERS[option](f"{where}{name}", value)
            same = option not in given or given[option].startswith(f"{kind}_") != name.startswith(f"{kind}_")
            if not same and result[option] != value:
                raise UserError(f"{where}{name} is {shorten(value)}; {given[option]} says {shorten(result[option])}")
            result[option], given[option] = value, name
    for low, high in _PAIRS:
        if low in result and high in result and result[low] > result[high]:
            raise UserError(f"{where}{low} is {result[low]}; it must be at most {high} {result[high]}")
    return result


def _option(kind: str, name: str) -> str | None:
    """The option of `kind` that a caller calls `name`."""
    plain = name.removeprefix(f"{kind}_")
    plain = _ALIASES.get(plain, plain)
    return plain if plain in _FIELDS[kind] else None


def _check_conflicts(chosen: Mapping[str, Any], field: str) -> None:
    for name in chosen:
        for other in sorted(_CONFLICTS.get(name, frozenset()) & chosen.keys()):
            where = f"{field}.{name}" if field else name
            raise UserError(f"{where} is {shorten(chosen[name])}; {other} must not be given beside it")


def merge_options(base: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `base`, replaced by those of `chosen`. What contradicts `chosen` is dropped from `base`."""
    base = _compatible(base, chosen)
    for low, high in _PAIRS:
        lowest, highest = ({**base, **chosen}.get(name) for name in (low, high))
        if lowest is not None and highest is not None and lowest > highest:
            base = {name: value for name, value in base.items() if name not in (low, high)}
    return base | dict(chosen)


def _compatible(base: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `base` that may be set beside those of `chosen`."""
    dropped = frozenset[str]().union(*(_CONFLICTS.get(name, frozenset()) for name in chosen))
    return {name: value for name, value in base.items() if name not in dropped}


def collect_options(
    kind: str, levels: Sequence[tuple[Mapping[str, Any], str, str]], *, is_frames: bool
) -> dict[str, Any]:
    """The options of one message part, collected from all places in which a client may write them.

    Later levels win. On a level, `preprocess_kwargs` and the like come first.

    Args:
      kind: "image" or "video".
      levels: rows (values, field, key): the part, and the objects inside of it that lead to its source. `key` is what
        `values` has the source under.
      is_frames: whether the source is a list or array of frames, for which `fps` is the rate at which they were taken.

    Raises:
      UserError: as `read_options`; or `detail` is not low, high or auto.
    """
    result: dict[str, Any] = {}
    for values, where, key in levels:
        detail = values.get("detail")
        if detail is not None:
            if not isinstance(detail, str) or detail not in _DETAILS:
                raise UserError(f"{where}.detail is {shorten(detail)}; it must be one of {', '.join(_DETAILS)}")
            result["detail"] = detail
        for nested in _NESTED[kind]:
            result |= _read(kind, _mapping(values.get(nested), f"{where}.{nested}"), f"{where}.{nested}", False)
        skipped = _IGNORED | {"type", "detail", key, *_NESTED[kind]}
        result |= _read(kind, {name: value for name, value in values.items() if name not in skipped}, where, False)
    _check_conflicts({name: value for name, value in result.items() if not (is_frames and name == "fps")}, levels[0][1])
    return result


def request_options(media_io_kwargs: Any, mm_processor_kwargs: Any) -> dict[str, dict[str, Any]]:
    """The options that a request sets for all of its media.

    Args:
      media_io_kwargs: as vLLM takes it: an object with `image` and `video`. There -1 means no limit, and `num_frames`
        beside `fps` is a maximum.
      mm_processor_kwargs: options of both kinds, and in `images_kwargs` and `videos_kwargs` those of one kind. They
        win over `media_io_kwargs`.

    Returns:
      The options by name, for "image" and for "video".

    Raises:
      UserError: as `read_options`; or a value is not an object.
    """
    media = _mapping(media_io_kwargs, "media_io_kwargs")
    for name in media:
        if name not in ("image", "video", "audio"):
            raise UserError(f"media_io_kwargs.{shorten_name(name)} is not known; it must be image, video or audio")
    values = _mapping(mm_processor_kwargs, "mm_processor_kwargs")
    every_nested = {name for names in _NESTED.values() for name in names}
    result = {}
    for kind, nested in _NESTED.items():
        field = f"media_io_kwargs.{kind}"
        limits = {
            name: value
            for name, value in _mapping(media.get(kind), field).items()
            if name not in _IGNORED and not (name in ("fps", "num_frames") and _is_number(value) and value == -1)
        }
        if limits.get("fps") is not None and limits.get("num_frames") is not None:
            limits["max_frames"] = limits.pop("num_frames")
        shared = {name: value for name, value in values.items() if name not in _IGNORED | every_nested}
        chosen = read_options(kind, limits, field)
        chosen = merge_options(chosen, read_options(kind, shared, "mm_processor_kwargs", shared=True))
        for name in nested:
            field = f"mm_processor_kwargs.{name}"
            own = {key: value for key, value in _mapping(values.get(name), field).items() if key not in _IGNORED}
            chosen = merge_options(chosen, read_options(kind, own, field))
        result[kind] = chosen
    return result


def resolve_options[T: (ImageOptions, VideoOptions)](defaults: T, chosen: Mapping[str, Any], field: str) -> T:
    """Replaces defaults by a request's options.

    A default that contradicts a chosen option gives way: a chosen max_pixels below the default min_pixels lowers
    min_pixels to it, and a chosen num_frames clears frame_times. `detail` "low" limits the area of an image to
    `LOW_DETAIL_PIXELS`, unless max_pixels is chosen too.

    Raises:
      UserError: a chosen minimum is above a chosen maximum, `end` is not after `start`, or only one side of the resized
        picture is given.
    """
    chosen = dict(chosen)
    if chosen.pop("detail", None) == "low":
        chosen.setdefault("max_pixels", min(defaults.max_pixels, LOW_DETAIL_PIXELS))
    where = f"{field}." if field else ""
    values: dict[str, Any] = {item.name: item.default for item in dataclasses.fields(defaults)}
    values |= _compatible(vars(defaults), chosen) | chosen
    for low, high in _PAIRS:
        if values.get(low) is None or values.get(high) is None or values[low] <= values[high]:
            continue
        if low in chosen and high in chosen:
            raise UserError(f"{where}{low} is {values[low]}; it must be at most {high} {values[high]}")
        if low in chosen:
            values[high] = values[low]
        else:
            values[low] = values[high]
    start, end = values.get("start") or 0, values.get("end")
    if end is not None and end <= start:
        raise UserError(f"{where}end is {end:g} s; it must be after start {start:g} s")
    height, width = values["resized_height"], values["resized_width"]
    if (height is None) != (width is None):
        given, other = ("width", "height") if height is None else ("height", "width")
        raise UserError(f"{where}resized_{given} is {height or width}; resized_{other} must be given too")
    if height is not None and height * width > MAX_SHOWN_PIXELS:
        raise UserError(
            f"{where}resized_height x resized_width is {height}x{width}; the area must be at most {MAX_SHOWN_PIXELS}"
        )
    return type(defaults)(**values)


def resized(options: ImageOptions | VideoOptions, *, factor: int = 28) -> tuple[int, int] | None:
    """(height, width) in pixels that the options set, as the nearest multiples of `factor`; None if they set none."""
    if options.resized_height is None or options.resized_width is None:
        return None
    height, width = (
        max(factor, round(side / factor) * factor) for side in (options.resized_height, options.resized_width)
    )
    return height, width


def _mapping(value: Any, field: str) -> Mapping[str, Any]:
    """`value`, or an empty mapping for None."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{field} is {shorten(value)}; it must be an object")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _integer(low: int, high: int) -> Callable[[str, Any], int]:
    kind = "a positive integer" if low > 0 else "an integer from 0"

    def read(field: str, value: Any) -> int:
        # An infinite or undefined number fails the comparison. An integer of any length passes through it unharmed.
        if not _is_number(value) or not low <= value <= high or value != int(value):
            raise UserError(f"{field} is {shorten(value)}; it must be {kind}, at most {high}")
        return int(value)

    return read


def _rate(field: str, value: Any) -> float:
    if not _is_number(value) or not MIN_RATE <= value <= MAX_RATE:
        allowed = f"a positive number, at least {MIN_RATE:f} and at most {MAX_RATE:.0f} frames a second"
        raise UserError(f"{field} is {shorten(value)}; it must be {allowed}")
    return float(value)


def _seconds(field: str, value: Any) -> float:
    """Seconds from a number or from a text such as "90", "1:30", "01:30.5" or "1:02:03"."""
    number = value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(?:(?:([0-9]{1,6}):)?([0-9]{1,6}):)?([0-9]{1,10}(?:\.[0-9]{0,9})?)\s*", value)
        hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, -1.0)
        clock = match is None or ((not match[1] or minutes < 60) and (not match[2] or seconds < 60))
        number = hours * 3600 + minutes * 60 + seconds if clock else -1
    if not _is_number(number) or not 0 <= number <= MAX_SECONDS:
        allowed = f"seconds from 0 to {MAX_SECONDS}, or a text such as 1:30 or 1:02:03.5"
        raise UserError(f"{field} is {shorten(value)}; it must be {allowed}")
    return float(number)


def _rising(read: Callable[[str, Any], Any], what: str) -> Callable[[str, Any], tuple]:
    def read_all(field: str, value: Any) -> tuple:
        items = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(items, list | tuple) or not 0 < len(items) <= MAX_LISTED:
            raise UserError(f"{field} is {shorten(value)}; it must be a list of 1 to {MAX_LISTED} {what}")
        result = tuple(read(f"{field}[{index}]", item) for index, item in enumerate(items))
        for index in range(1, len(result)):
            if result[index] <= result[index - 1]:
                raise UserError(f"{field}[{index}] is {result[index]}; it must be above the one before it")
        return result

    return read_all


_COUNT = _integer(1, MAX_COUNT)
_AREA = _integer(1, MAX_PIXELS)
_SIDE = _integer(1, MAX_SIDE)
_READERS: dict[str, Callable[[str, Any], Any]] = {
    **{"min_pixels": _AREA, "max_pixels": _AREA, "total_pixels": _AREA},
    **{"min_frames": _COUNT, "max_frames": _COUNT, "num_frames": _COUNT},
    **{"resized_height": _SIDE, "resized_width": _SIDE},
    **{"fps": _rate, "sample_fps": _rate, "start": _seconds, "end": _seconds},
    "subtitles": lambda field, value: value,
    "frame_times": _rising(_seconds, "times in seconds"),
    "frame_indices": _rising(_integer(0, MAX_COUNT), "indices of frames"),
}
