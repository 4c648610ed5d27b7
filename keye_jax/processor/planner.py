"""Plans single images and videos: what the model will see of them, before anything is decoded."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keye_jax.errors import UserError, shorten
from keye_jax.processor.decode import VideoFile
from keye_jax.processor.frame_list import FrameList
from keye_jax.processor.frame_text import FrameEncoder
from keye_jax.processor.guard import MediaGuard
from keye_jax.processor.image import (
    MAX_SHOWN_PIXELS,
    image_notes,
    is_image,
    opened_image,
    to_rgb,
    upright_size,
)
from keye_jax.processor.image_size import largest_area, smart_resize
from keye_jax.processor.media import DownloadedFile, fetch
from keye_jax.processor.messages import MediaPart
from keye_jax.processor.options import VideoOptions, read_options, resized, resolve_options
from keye_jax.processor.selection import select_frames
from keye_jax.processor.settings import ProcessorSettings
from keye_jax.processor.subtitles import Cue, clip_cues, container_subtitles, read_subtitles
from keye_jax.processor.video import DEFAULT_FPS, adaptive_factor, frame_size

# Bytes a pixel of a decoded picture, in which Pillow keeps RGB.
_DECODED_PIXEL_BYTES = 4


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePlan:
    """An image whose pixels are not decoded yet. No file stays open.

    Attributes:
      source: what `open_image` takes.
      field: its name in error messages.
      height, width: size in pixels at which the model sees it.
      num_tokens: number of its pad tokens.
      source_bytes: size of the decoded picture.
      warnings: as in `ModelInputs`.
    """

    source: Any
    field: str
    height: int
    width: int
    num_tokens: int
    source_bytes: int
    warnings: tuple[str, ...] = ()

    def pixels(self, warn: Callable[[str], None]) -> np.ndarray:
        """Decodes the image as the model sees it, uint8 [height, width, 3].

        Args:
          warn: takes a sentence if the file is cut off or damaged.

        Raises:
          UserError: nothing of the image can be decoded.
        """
        with opened_image(self.source, self.field) as image:
            rgb = to_rgb(image, self.field, warn)
            return np.asarray(rgb.resize((self.width, self.height), Image.Resampling.BICUBIC))


@dataclasses.dataclass(frozen=True, eq=False)
class VideoPlan:
    """A video whose frames are chosen but not decoded yet.

    Attributes:
      source: the file, or the list of frames.
      field: its name in error messages.
      indices: int64 [frames], indices of the chosen frames in the video.
      times: float64 [frames], seconds.
      height, width: size in pixels at which the model sees a frame.
      tokens_per_frame: number of pad tokens of a frame, without its time stamp.
      num_tokens: number of tokens of the video, with all time stamps and subtitles.
      cues: subtitles, by increasing start.
      warnings: as in `ModelInputs`.
    """

    source: VideoFile | FrameList
    field: str
    indices: np.ndarray
    times: np.ndarray
    height: int
    width: int
    tokens_per_frame: int
    num_tokens: int
    cues: tuple[Cue, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def frames(self) -> int:
        return len(self.indices)

    def pixels(self, which: np.ndarray, *, threads: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Decodes frames as the model sees them.

        Args:
          which: int64 [n], increasing, positions in `indices`.
          threads: of a video decoder; 0 for one a core.

        Returns:
          For each, the index in the video of the frame used, and its pixels, uint8 [height, width, 3].

        Raises:
          UserError: no frame can be decoded.
        """
        size = (self.height, self.width)
        if isinstance(self.source, FrameList):
            return self.source.read(self.indices[which], size)
        return self.source.read(self.indices[which], size, threads=threads)

    def undecodable(self, used: np.ndarray) -> tuple[np.ndarray, str | None]:
        """The times of the frames that could not be decoded, float64 [n] in seconds, and a sentence about them.

        Args:
          used: int64 [frames], the frames that were decoded in place of `indices`.
        """
        times = self.times[used != self.indices]
        if not len(times):
            return times, None
        where = f"at {times[0]:.1f} s" if len(times) == 1 else f"from {times[0]:.1f} to {times[-1]:.1f} s"
        return times, (
            f"{self.field}: {len(times)} of {self.frames} frames cannot be decoded, {where}; "
            "frames near them are shown in their place"
        )


class MediaPlanner:
    """Plans single images and videos; needs no tokenizer.

    Args:
      settings: the checkpoint's settings, or the defaults.
      encoder: counts the tokens of the text of a video; None leaves them out.
      allow_remote, allow_files, defaults, guard: as of `Processor`.

    Attributes:
      encoder: the same.

    Raises:
      UserError: `defaults` are not valid.
    """

    def __init__(
        self,
        settings: ProcessorSettings,
        encoder: FrameEncoder | None = None,
        *,
        allow_remote: bool = False,
        allow_files: bool = True,
        defaults: Mapping[str, Any] | None = None,
        guard: MediaGuard | None = None,
    ):
        self._settings = settings
        self._guard = guard
        self.encoder = encoder
        self._allow_remote = allow_remote
        self._allow_files = allow_files
        # adaptive_pixels does not reduce a total_pixels that the caller chose.
        chosen = read_options("video", defaults or {}, "", shared=True)
        self._total_pixels_chosen = "total_pixels" in chosen
        self._video_options = resolve_options(settings.video, chosen, "defaults")
        chosen = read_options("image", defaults or {}, "", shared=True)
        self._image_options = resolve_options(settings.image, chosen, "defaults")

    @property
    def most_pixels(self) -> int:
        """Pixels that no image or frame exceeds, as the model sees it, unless a request sets its own limits."""
        factor = self._settings.token_side
        return max(
            largest_area(factor=factor, min_pixels=options.min_pixels, max_pixels=options.max_pixels)
            for options in (self._image_options, self._video_options)
        )

    @property
    def reads_files(self) -> bool:
        """Whether a request may name local files."""
        return self._allow_files and (self._guard is None or self._guard.root is not None)

    @contextlib.contextmanager
    def file(self, value: Any, field: str, options: Mapping[str, Any] | None = None) -> Iterator[ImagePlan | VideoPlan]:
        """Plans one image or video, as the only one of a request; its content tells which it is.

        Args:
          value: a path, a URL, or the content of a file.
          field: its name in error messages.
          options: of it; those of the other kind are left out.

        Raises:
          UserError: the medium is not valid.
        """
        downloads: list[DownloadedFile] = []
        try:
            source = self._source(value, field, downloads)
            kind = "image" if is_image(source) else "video"
            chosen = read_options(kind, options or {}, "options", shared=True)
            part = MediaPart(kind, source, chosen, field, field)
            yield self.image(part, downloads) if kind == "image" else self.video(part, downloads, single=True)
        finally:
            for download in downloads:
                download.close()

    def _source(self, value: Any, field: str, downloads: list[DownloadedFile]) -> Any:
        """The source in a form that `open_image` or `VideoFile` takes: a path, bytes, an array or a PIL image."""
        found = self._found(value, field)
        if isinstance(found, DownloadedFile):
            downloads.append(found)
            found = found.path
        if self._guard is not None and isinstance(found, Path | bytes):
            self._guard.check_bytes(len(found) if isinstance(found, bytes) else found.stat().st_size, field)
        return found

    def _found(self, value: Any, field: str) -> Any:
        if isinstance(value, Path):  # no text from outside is one
            return fetch(str(value), field, allow_remote=self._allow_remote, allow_files=self._allow_files)
        if isinstance(value, str):
            allowed = {"allow_remote": self._allow_remote, "allow_files": self._allow_files}
            return fetch(value, field, **allowed, guard=self._guard)
        if isinstance(value, bytes | np.ndarray | Image.Image):
            return value
        raise UserError(f"{field} is {shorten(value)}; it must be a path, a URL, an array or an image")

    def image(self, part: MediaPart, downloads: list[DownloadedFile]) -> ImagePlan:
        """Plans an image.

        Args:
          part: the part of the message.
          downloads: takes the files that the caller has to close.

        Raises:
          UserError: the image or an option is not valid.
        """
        field = part.field
        options = resolve_options(self._image_options, part.options, part.part_field)
        source = self._source(part.source, field, downloads)
        with opened_image(source, field) as image:
            size, notes = upright_size(image, field), image_notes(image, field)
        if self._guard is not None:
            self._guard.check_pixels(*size, field)
        with _named(field):
            height, width = resized(options) or smart_resize(
                *size,
                factor=self._settings.token_side,
                min_pixels=options.min_pixels,
                max_pixels=options.max_pixels,
            )
            _check_area(height, width)
        tokens = height * width // self._settings.token_side**2
        return ImagePlan(source, field, height, width, tokens, size[0] * size[1] * _DECODED_PIXEL_BYTES, notes)

    def video(self, part: MediaPart, downloads: list[DownloadedFile], *, single: bool) -> VideoPlan:
        """Plans a video.

        Args:
          part: the part of the message.
          downloads: takes the files that the caller has to close.
          single: whether it is the only video of the request.

        Raises:
          UserError: the video or an option is not valid.
        """
        field, chosen = part.field, part.options
        options = resolve_options(self._video_options, chosen, part.part_field)
        every = False
        video: FrameList | VideoFile
        if isinstance(part.source, list | tuple | np.ndarray):
            source: Any = part.source
            if not isinstance(source, np.ndarray):
                source = [self._source(frame, f"{field}[{i}]", downloads) for i, frame in enumerate(source)]
            # `fps` of a list is the rate at which its frames were taken, as in the tools of Qwen and Keye, unless that
            # is given apart. Then `fps` chooses among them.
            video = FrameList(source, options.sample_fps or chosen.get("fps") or DEFAULT_FPS, field)
            every = options.sample_fps is None or "fps" not in chosen
        else:
            source = self._source(part.source, field, downloads)
            if isinstance(source, Image.Image):
                raise UserError(f"{field} is an image; a video must be a file, an array or a list of images")
            video = VideoFile(source, field)
        info, total = video.info, options.total_pixels
        if self._guard is not None:
            self._guard.check_pixels(info.width, info.height, field)
            self._guard.check_seconds(info.duration, field)
        if single and not self._total_pixels_chosen and "total_pixels" not in chosen:
            total = int(total * adaptive_factor(info.duration, self._settings.adaptive_pixels))
        with _named(field):
            indices = select_frames(info, options, total, every=every)
            height, width = resized(options) or frame_size(
                len(indices),
                info.height,
                info.width,
                min_pixels=options.min_pixels,
                max_pixels=options.max_pixels,
                total_pixels=total,
            )
            _check_area(height, width)
        tokens = height * width // self._settings.token_side**2
        times = info.times[indices]
        warnings = list(video.warnings)
        cues = self._cues(options, source, field, downloads, warnings.append)
        text = self.encoder.num_tokens(times, cues) if self.encoder else 0
        return VideoPlan(
            video, field, indices, times, height, width, tokens, text + tokens * len(indices), cues, tuple(warnings)
        )

    def _cues(
        self,
        options: VideoOptions,
        video: Any,
        field: str,
        downloads: list[DownloadedFile],
        warn: Callable[[str], None],
    ) -> tuple[Cue, ...]:
        """The subtitles of a video, whose source is `video`, within its clip."""
        if not options.subtitles:
            return ()
        if options.subtitles == "container":
            if not isinstance(video, Path | bytes):
                raise UserError(f"{field} is a list of frames, which holds no subtitles; give them as a file")
            cues = container_subtitles(video, field)
        else:
            cues = read_subtitles(self._source(options.subtitles, "subtitles", downloads), "subtitles", warn)
        return clip_cues(cues, options.start, options.end)


def _check_area(height: int, width: int) -> None:
    if height * width > MAX_SHOWN_PIXELS:
        size = f"{height}x{width} (height x width)"
        raise UserError(f"the model would see {size}; the area must be at most {MAX_SHOWN_PIXELS} pixels")


@contextlib.contextmanager
def _named(field: str) -> Iterator[None]:
    """Puts the name of a medium before the text of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
