"""Settings of the processor in a checkpoint's own files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keye_jax.config import VisionConfig
from keye_jax.errors import UserError, shorten
from keye_jax.parsing import read_json
from keye_jax.processor.frame_text import GUESS, FrameText
from keye_jax.processor.options import ImageOptions, VideoOptions, read_options, resolve_options

# Pixels. frame_size and total_pixels count tokens of 28x28 pixels.
_TOKEN_SIDE = 28
_FILE = "preprocessor_config.json"
# The files that may say how a frame's time is written; the first that does is believed.
_FRAME_FORMAT_FILES = ("video_preprocessor_config.json", "processor_config.json", _FILE)
# What is done to all pixels; the publisher's own code can leave a step out.
_STEPS = ("do_resize", "do_rescale", "do_normalize")
_IMAGE, _VIDEO = ImageOptions(), VideoOptions()
_VIDEO_NAMES = ("fps", "min_frames", "max_frames", "total_pixels")
_VIDEO_ONLY_NAMES = tuple(f"video_{name}" for name in (*_VIDEO_NAMES, "min_pixels", "max_pixels"))


@dataclasses.dataclass(frozen=True)
class ProcessorSettings:
    """The values of `preprocessor_config.json`; the defaults are the publisher's.

    Attributes:
      image, video: options that apply if a request sets none. In the file, `min_pixels` and `max_pixels` are those of
        images, and `video_min_pixels` and `video_max_pixels` those of video frames.
      rescale_factor, image_mean, image_std: normalised = (pixel * rescale_factor - mean) / std.
      frame_format: the text around each frame's pad tokens, a preset's name or a format string; see
        `keye_jax.processor.frame_text`. None: the files do not say, and keye-1.5 is a guess.
      adaptive_pixels: rows (seconds, factor). A video of at most `seconds` gets total_pixels * factor. Empty: off.
      token_side: side of one token in pixels.

    Raises:
      UserError: a value is not allowed.
    """

    image: ImageOptions = _IMAGE
    video: VideoOptions = _VIDEO
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    frame_format: str | None = None
    adaptive_pixels: tuple[tuple[float, float], ...] = ()
    token_side: int = _TOKEN_SIDE

    def __post_init__(self) -> None:
        if self.frame_format is not None:
            FrameText.parse(self.frame_format)
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise _wrong(name, getattr(self, name), "three numbers")
        if min(self.image_std) <= 0 or self.rescale_factor <= 0:
            raise UserError(f"{_FILE}: image_std and rescale_factor must be positive")
        seconds = [row[0] for row in self.adaptive_pixels]
        if seconds != sorted(seconds) or any(not 0 < row[1] <= 1 for row in self.adaptive_pixels):
            allowed = "rows [seconds, factor] by increasing seconds, with factors above 0 and at most 1"
            raise _wrong("adaptive_pixels", self.adaptive_pixels, allowed)

    @property
    def frame_text(self) -> FrameText:
        """The text around each frame's pad tokens."""
        return FrameText.parse(self.frame_format or GUESS)

    @classmethod
    def from_checkpoint(cls, directory: Path, vision: VisionConfig) -> ProcessorSettings:
        """Reads preprocessor_config.json in `directory`, if there is one.

        `frame_format` may also stand in video_preprocessor_config.json or processor_config.json, which are believed
        before preprocessor_config.json, in that order. In each file it may stand inside `video_processor`.

        Raises:
          UserError: a file is not JSON, a value is not allowed, or the patches are not the model's.
        """
        path = directory / _FILE
        values = read_json(path) if path.exists() else {}
        for name, expected in (("patch_size", vision.patch_size), ("merge_size", vision.spatial_merge_size)):
            if values.get(name, expected) != expected:
                raise _wrong(name, values[name], f"{expected}, as in config.json")
        for name in _STEPS:
            if values.get(name) not in (None, True):
                raise _wrong(name, values[name], "true, as the model was trained")
        side = vision.patch_size * vision.spatial_merge_size
        if side != _TOKEN_SIDE:
            allowed = f"such that patch_size x spatial_merge_size is {_TOKEN_SIDE} pixels, not {side}"
            raise UserError(f"config: vision_config.patch_size is {vision.patch_size}; it must be {allowed}")
        image = {name: values[name] for name in ("min_pixels", "max_pixels") if name in values}
        video = {name: values[name] for name in _VIDEO_NAMES + _VIDEO_ONLY_NAMES if name in values}
        read = {
            "image": resolve_options(_IMAGE, read_options("image", image, _FILE), _FILE),
            "video": resolve_options(_VIDEO, read_options("video", video, _FILE), _FILE),
        }
        for name in ("rescale_factor", "image_mean", "image_std", "adaptive_pixels"):
            if values.get(name) is not None:
                read[name] = _typed(name, values[name])
        return cls(**read, frame_format=read_frame_format(directory))


def read_frame_format(directory: Path) -> str | None:
    """The `frame_format` that the files of a checkpoint state; None if they state none.

    Raises:
      UserError: a file is not JSON, or the format is not valid.
    """
    for path in (directory / name for name in _FRAME_FORMAT_FILES):
        values = read_json(path) if path.exists() else {}
        nested = values.get("video_processor")
        for place in (values, nested if isinstance(nested, Mapping) else {}):
            value = place.get("frame_format")
            if value is None:
                continue
            try:
                FrameText.parse(str(value))
            except UserError as error:
                raise UserError(f"{path.name}: {error}") from error
            return str(value)
    return None


def _typed(name: str, value: Any) -> Any:
    try:
        match name:
            case "rescale_factor":
                return _number(value)
            case "adaptive_pixels":
                return tuple((_number(seconds), _number(factor)) for seconds, factor in value)
            case _:
                return tuple(_number(item) for item in value)
    except (TypeError, ValueError):
        pass
    kinds = {"rescale_factor": "a number", "adaptive_pixels": "rows [seconds, factor]"}
    raise _wrong(name, value, kinds.get(name, "a list of numbers"))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)


def _wrong(name: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{_FILE}: {name} is {shorten(value)}; it must be {allowed}")


def read_template(directory: Path) -> tuple[str, dict[str, str]]:
    """The chat template of a checkpoint, and the strings that it may use by name, such as `eos_token`.

    Raises:
      UserError: the checkpoint has no chat template, or a file is not JSON.
    """
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    variables = {}
    for name, value in config.items():
        value = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(value, str):
            variables[name] = value
    source: Any = None
    if (path := directory / "chat_template.jinja").exists():
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not a chat template: it must be in UTF-8 ({error})") from error
    elif (path := directory / "chat_template.json").exists():
        source = read_json(path).get("chat_template")
    source = source or config.get("chat_template")
    if isinstance(source, list):
        templates = [item for item in source if isinstance(item, Mapping)]
        source = next((item.get("template") for item in templates if item.get("name") == "default"), None)
    if not isinstance(source, str):
        raise UserError(
            f"no chat template in {directory}; a checkpoint must have it in chat_template.jinja, chat_template.json or "
            "tokenizer_config.json"
        )
    return source, variables
