"""The processor turns messages in the OpenAI chat shape into the model's inputs, in two steps.

`plan` reads the headers of the media and computes the length of the prompt. `process` decodes the media.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError, shorten
from keye_jax.processor.decode import VideoFile
from keye_jax.processor.frame_list import FrameList
from keye_jax.processor.image import open_image, patchify, smart_resize, to_rgb, upright_size
from keye_jax.processor.media import DownloadedFile, fetch
from keye_jax.processor.messages import MediaPart, check_template_variables
from keye_jax.processor.options import merge_options, read_options, request_options, resized, resolve_options
from keye_jax.processor.positions import mrope_positions
from keye_jax.processor.prompt import ChatTemplate, Detokenizer, SafeTokenizer
from keye_jax.processor.settings import ProcessorSettings, read_template
from keye_jax.processor.video import DEFAULT_FPS, adaptive_factor, frame_indices, frame_size
from keye_jax.progress import Progress


@dataclasses.dataclass(frozen=True, eq=False)
class ModelInputs:
    """A prompt of T tokens with I images and F video frames, as the model takes it.

    Patches have p x p pixels. They are in prompt order, and in raster order within an image or frame.

    Attributes:
      input_ids: int32 [T].
      positions: int32 [3, T], time, row and column.
      position_delta: a token generated at index i has position i + position_delta on all axes.
      image_patches: uint8 [patches of all images, 3, p, p].
      image_grids: int32 [I, 3], (1, h, w) in patches.
      video_patches: uint8 [patches of all frames, 3, p, p].
      video_grids: int32 [F, 3], (1, h, w) in patches, one row a frame.
      frame_times: one array a video, float64 [frames], seconds.
      prompt_opens_thinking: whether the prompt ends inside `<think>`, so that the answer starts with thoughts.
      warnings: what the user should know about the media, one sentence each.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    position_delta: int
    image_patches: np.ndarray
    image_grids: np.ndarray
    video_patches: np.ndarray
    video_grids: np.ndarray
    frame_times: tuple[np.ndarray, ...]
    prompt_opens_thinking: bool
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class FrameShare:
    """The video frames that this process decodes, if several processes share the work.

    In the `ModelInputs` of this process, the pixels of all other frames are zeros.

    Attributes:
      here: takes the grids, int32 [F, 3], one row a frame; returns which frames this process decodes, bool [F].
      gather: takes int32 [F] with this process's values, and -1 elsewhere; returns the values of all processes.
    """

    here: Callable[[np.ndarray], np.ndarray]
    gather: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePlan:
    """An image whose pixels are not decoded yet.

    Attributes:
      image: the opened image.
      field: its name in error messages.
      height, width: size in pixels at which the model sees it.
      num_tokens: number of its pad tokens.
    """

    image: Image.Image
    field: str
    height: int
    width: int
    num_tokens: int


@dataclasses.dataclass(frozen=True, eq=False)
class VideoPlan:
    """A video whose frames are chosen but not decoded yet.

    Attributes:
      source: the file, or the list of frames.
      indices: int64 [frames], indices of the chosen frames in the video.
      times: float64 [frames], seconds.
      height, width: size in pixels at which the model sees a frame.
      tokens_per_frame: number of pad tokens of a frame, without its time stamp.
      num_tokens: number of tokens of the video, with all time stamps.
    """

    source: VideoFile | FrameList
    indices: np.ndarray
    times: np.ndarray
    height: int
    width: int
    tokens_per_frame: int
    num_tokens: int

    @property
    def frames(self) -> int:
        return len(self.indices)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptPlan:
    """A prompt whose media are opened but not decoded.

    Attributes:
      prompt_ids: token ids with one pad token for each image and each video.
      images, videos: in prompt order.
      prompt_opens_thinking: see `ModelInputs`.
      downloads: files that `close`, or the end of the plan's life, removes.
    """

    prompt_ids: tuple[int, ...]
    images: tuple[ImagePlan, ...]
    videos: tuple[VideoPlan, ...]
    prompt_opens_thinking: bool
    downloads: tuple[DownloadedFile, ...] = ()

    @property
    def text_tokens(self) -> int:
        """Number of tokens outside of images and videos."""
        return len(self.prompt_ids) - len(self.images) - len(self.videos)

    @property
    def image_tokens(self) -> int:
        return sum(image.num_tokens for image in self.images)

    @property
    def video_tokens(self) -> int:
        return sum(video.num_tokens for video in self.videos)

    @property
    def num_tokens(self) -> int:
        """Length of the prompt, T. Decoding a damaged video can change the text of a time stamp, and so T."""
        return self.text_tokens + self.image_tokens + self.video_tokens

    @property
    def num_frames(self) -> int:
        return sum(video.frames for video in self.videos)

    def close(self) -> None:
        """Removes the downloaded files."""
        for download in self.downloads:
            download.close()

    def __enter__(self) -> PromptPlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Processor:
    """Turns messages into `ModelInputs` with the tokenizer and the chat template of a checkpoint.

    Args:
      tokenizer, template: those of the checkpoint.
      config: the model's configuration; its token ids must be those of the tokenizer.
      settings: the checkpoint's settings, or the defaults.
      allow_remote: whether http(s) URLs may be fetched.
      allow_files: whether paths and file: URLs may be read; a server turns this off.
      defaults: options of media, such as `fps` or `max_pixels`, that apply if a request does not set them. The prefix
        `image_` or `video_` limits an option to one kind of media.

    Attributes:
      pixel_scale, pixel_shift: float32 [3], one value a channel; the vision encoder takes pixel * scale + shift.

    Raises:
      UserError: `defaults` are not valid, or a token id of `config` is not an added token of the tokenizer.
    """

    def __init__(
        self,
        tokenizer: SafeTokenizer,
        template: ChatTemplate,
        config: KeyeConfig,
        settings: ProcessorSettings,
        *,
        allow_remote: bool = False,
        allow_files: bool = True,
        defaults: Mapping[str, Any] | None = None,
    ):
        self._tokenizer = tokenizer
        self._template = template
        self._config = config
        self._settings = settings
        self._allow_remote = allow_remote
        self._allow_files = allow_files
        # adaptive_pixels does not reduce a total_pixels that the caller chose.
        chosen = read_options("video", defaults or {}, "", shared=True)
        self._total_pixels_chosen = "total_pixels" in chosen
        self._video_options = resolve_options(settings.video, chosen, "defaults")
        chosen = read_options("image", defaults or {}, "", shared=True)
        self._image_options = resolve_options(settings.image, chosen, "defaults")
        control = set(tokenizer.control.values())
        for name in ("image_token_id", "video_token_id"):
            value = getattr(config, name)
            if value not in control:
                raise UserError(f"config: {name} is {value}; it must be the id of an added token of tokenizer.json")
        scale = settings.rescale_factor / np.asarray(settings.image_std, np.float64)
        self.pixel_scale = scale.astype(np.float32)
        self.pixel_shift = (-np.asarray(settings.image_mean) / np.asarray(settings.image_std)).astype(np.float32)

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path,
        config: KeyeConfig,
        *,
        allow_remote: bool = False,
        allow_files: bool = True,
        defaults: Mapping[str, Any] | None = None,
    ) -> Processor:
        """Reads tokenizer.json, the chat template and preprocessor_config.json of a checkpoint.

        The template is in chat_template.jinja, chat_template.json or tokenizer_config.json. If there is no
        preprocessor_config.json, the publisher's values apply. The arguments are those of the class.

        Raises:
          UserError: a file is missing, is not valid, or contradicts `config`.
        """
        directory = Path(directory)
        return cls(
            SafeTokenizer(directory / "tokenizer.json"),
            ChatTemplate(*read_template(directory)),
            config,
            ProcessorSettings.from_checkpoint(directory, config.vision_config),
            allow_remote=allow_remote,
            allow_files=allow_files,
            defaults=defaults,
        )

    def token_id(self, text: str) -> int | None:
        """The id of the token named `text`, such as "<|im_end|>"; None if there is no such token."""
        return self._tokenizer.token_id(text)

    def detokenize(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, by default without special tokens. `<think>` and `</think>` are not special tokens."""
        return self._tokenizer.detokenize(ids, skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A new detokenizer for the tokens of one answer."""
        return Detokenizer(self._tokenizer, skip_special_tokens=skip_special_tokens)

    def plan(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        media_io_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> PromptPlan:
        """Renders the prompt, opens its media, and chooses frames and sizes. It decodes no pixels.

        Args:
          messages: the conversation in the OpenAI chat shape, or in one of the other shapes of docs/inputs.md. Content
            is a string or a list of parts of type `text`, `image_url`, `image`, `video_url` or `video`. A source is a
            path, a URL, `{"url": ...}`, the content of a file, a PIL image or an array uint8 [H, W, 3]. A video may
            also be an array uint8 [F, H, W, 3] or a list of images; `sample_fps` is the rate at which they were taken.
            The url object, the part and `preprocess_kwargs` in either may hold options.
          tools: function descriptions in the OpenAI shape, for templates that take them.
          template_variables: further variables of the template, such as `enable_thinking`.
          chat_template_kwargs: the same, by the name that it has in request bodies; it wins.
          media_io_kwargs, mm_processor_kwargs: options of all media of this request, by kind and for both kinds. Those
            of a part win.

        Raises:
          UserError: a message, a medium or an option is not valid; the text is one sentence.
        """
        asked = request_options(media_io_kwargs, mm_processor_kwargs)
        variables = check_template_variables(template_variables, "template_variables")
        variables |= check_template_variables(chat_template_kwargs, "chat_template_kwargs")
        rendered = self._template.render(messages, tools=tools, variables=variables)
        media = [
            dataclasses.replace(part, options=merge_options(asked[part.kind], part.options)) for part in rendered.media
        ]
        ids = self._tokenizer.encode_pieces(rendered.pieces)
        self._check_pads(ids, media)
        downloads: list[DownloadedFile] = []
        try:
            videos = sum(part.kind == "video" for part in media)
            images = tuple(self._plan_image(part, downloads) for part in media if part.kind == "image")
            plans = tuple(
                self._plan_video(part, downloads, single=videos == 1) for part in media if part.kind == "video"
            )
        except BaseException:
            for download in downloads:
                download.close()
            raise
        return PromptPlan(tuple(ids), images, plans, rendered.opens_thinking, tuple(downloads))

    def process(
        self, plan: PromptPlan, progress: Progress | None = None, share: FrameShare | None = None
    ) -> ModelInputs:
        """Decodes the media of a prompt.

        Args:
          plan: the result of `plan`.
          progress: called after each frame with the number of decoded frames and of frames to decode.
          share: the frames that this process decodes; None for all of them.

        Raises:
          UserError: an image or a video cannot be decoded.
        """
        patch = self._config.vision_config.patch_size
        image_grids = _grids([(image.height, image.width) for image in plan.images], patch)
        video_grids = _grids([(video.height, video.width) for video in plan.videos for _ in video.indices], patch)
        image_patches, video_patches = (
            # Pages of zeros that are never written, those of other processes' frames, take no memory.
            np.zeros((int(grids.prod(1).sum()), 3, patch, patch), np.uint8)
            for grids in (image_grids, video_grids)
        )
        start = 0
        for image in plan.images:
            rgb = to_rgb(image.image, image.field)
            shown = patchify(np.asarray(rgb.resize((image.width, image.height), Image.Resampling.BICUBIC)), patch)
            image_patches[start : start + len(shown)] = shown
            start += len(shown)

        here = share.here(video_grids) if share else np.ones(len(video_grids), bool)
        used = np.full(len(video_grids), -1, np.int32)
        first = start = done = 0
        for video in plan.videos:
            own = np.flatnonzero(here[first : first + video.frames])
            each = video.height * video.width // patch**2
            frames = video.source.read(video.indices[own], (video.height, video.width))
            for frame_number, (index, pixels) in zip(own, frames, strict=True):
                shown = patchify(pixels, patch)
                at = start + frame_number * each
                video_patches[at : at + each] = shown
                used[first + frame_number] = index
                done += 1
                if progress is not None:
                    progress(done, int(np.count_nonzero(here)))
            first, start = first + video.frames, start + each * video.frames
        if share:
            used = share.gather(used)
        ends = np.cumsum([video.frames for video in plan.videos])
        times = [
            video.source.info.times[used[end - video.frames : end]]
            for video, end in zip(plan.videos, ends, strict=True)
        ]

        input_ids = np.fromiter(self._expand(plan, times), np.int32)
        positions, delta = mrope_positions(
            input_ids,
            image_grids,
            video_grids,
            image_token_id=self._config.image_token_id,
            video_token_id=self._config.video_token_id,
            merge_size=self._config.vision_config.spatial_merge_size,
        )
        return ModelInputs(
            input_ids,
            positions,
            delta,
            image_patches,
            image_grids,
            video_patches,
            video_grids,
            tuple(times),
            plan.prompt_opens_thinking,
        )

    def _check_pads(self, ids: list[int], media: list[MediaPart]) -> None:
        for kind, token in (("image", self._config.image_token_id), ("video", self._config.video_token_id)):
            need, have = sum(part.kind == kind for part in media), ids.count(token)
            if need != have:
                raise UserError(
                    f"the messages hold {need} {kind}(s), but the chat template made {have} place(s) for them; "
                    "the numbers must be equal"
                )

    def _source(self, value: Any, field: str, downloads: list[DownloadedFile]) -> Any:
        """The source in a form that `open_image` or `VideoFile` takes: a path, bytes, an array or a PIL image."""
        if isinstance(value, str | Path):
            file = fetch(str(value), field, allow_remote=self._allow_remote, allow_files=self._allow_files)
            if not isinstance(file, DownloadedFile):
                return file
            downloads.append(file)
            return file.path
        if isinstance(value, bytes | np.ndarray | Image.Image):
            return value
        raise UserError(f"{field} is {shorten(value)}; it must be a path, a URL, an array or an image")

    def _plan_image(self, part: MediaPart, downloads: list[DownloadedFile]) -> ImagePlan:
        field = part.field
        options = resolve_options(self._image_options, part.options, part.part_field)
        image = open_image(self._source(part.source, field, downloads), field)
        with _named(field):
            height, width = resized(options) or smart_resize(
                *upright_size(image, field),
                factor=self._settings.token_side,
                min_pixels=options.min_pixels,
                max_pixels=options.max_pixels,
            )
        return ImagePlan(image, field, height, width, height * width // self._settings.token_side**2)

    def _plan_video(self, part: MediaPart, downloads: list[DownloadedFile], *, single: bool) -> VideoPlan:
        source, field, chosen = part.source, part.field, part.options
        options = resolve_options(self._video_options, chosen, part.part_field)
        video: FrameList | VideoFile
        if isinstance(source, list | tuple):
            opened = [self._source(frame, f"{field}[{i}]", downloads) for i, frame in enumerate(source)]
            video = FrameList(opened, options.sample_fps or DEFAULT_FPS, field)
        elif isinstance(source, np.ndarray):
            video = FrameList(source, options.sample_fps or DEFAULT_FPS, field)
        else:
            opened = self._source(source, field, downloads)
            if isinstance(opened, Image.Image):
                raise UserError(f"{field} is an image; a video must be a file, an array or a list of images")
            video = VideoFile(opened, field)
        info, total = video.info, options.total_pixels
        if single and not self._total_pixels_chosen and "total_pixels" not in chosen:
            total = int(total * adaptive_factor(info.duration, self._settings.adaptive_pixels))
        with _named(field):
            indices = frame_indices(
                info.num_frames,
                info.native_fps,
                fps=options.fps,
                min_frames=options.min_frames,
                max_frames=options.max_frames,
                total_pixels=total,
            )
            height, width = resized(options) or frame_size(
                len(indices),
                info.height,
                info.width,
                min_pixels=options.min_pixels,
                max_pixels=options.max_pixels,
                total_pixels=total,
            )
        tokens = height * width // self._settings.token_side**2
        times = info.times[indices]
        stamps = sum(len(stamp) for stamp in self._stamps(times))
        return VideoPlan(video, indices, times, height, width, tokens, stamps + tokens * len(indices))

    def _stamps(self, times: np.ndarray) -> Iterator[list[int]]:
        """The token ids of the text before each frame; `times` are in seconds."""
        for time in times.tolist():
            yield self._tokenizer.encode_template(self._settings.frame_format.format(time=time))

    def _expand(self, plan: PromptPlan, times: Sequence[np.ndarray]) -> Iterator[int]:
        """The ids of the whole prompt: all pad tokens, and the time stamps of the decoded frames (`times`, seconds)."""
        images = iter(plan.images)
        videos = iter(zip(plan.videos, times, strict=True))
        for token in plan.prompt_ids:
            if token == self._config.image_token_id:
                yield from [token] * next(images).num_tokens
            elif token == self._config.video_token_id:
                video, stamps = next(videos)
                for stamp in self._stamps(stamps):
                    yield from stamp
                    yield from [token] * video.tokens_per_frame
            else:
                yield token


def _grids(sizes: Sequence[tuple[int, int]], patch: int) -> np.ndarray:
    rows = [(1, height // patch, width // patch) for height, width in sizes]
    return np.array(rows, np.int32).reshape(-1, 3)


@contextlib.contextmanager
def _named(field: str) -> Iterator[None]:
    """Puts the name of a medium before the text of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
