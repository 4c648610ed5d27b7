"""The processor turns messages in the OpenAI chat shape into the model's inputs, in two steps.

`plan` reads the headers of the media and computes the length of the prompt. `process` decodes the media.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from keye_jax.config import KeyeConfig
from keye_jax.errors import MediaError, UserError
from keye_jax.processor.frame_text import GUESS, PRESETS, FrameEncoder
from keye_jax.processor.guard import MediaGuard
from keye_jax.processor.image import patchify
from keye_jax.processor.media import DownloadedFile
from keye_jax.processor.messages import MediaPart, check_template_variables
from keye_jax.processor.model_inputs import ModelInputs, PromptPlan, PromptTokens
from keye_jax.processor.options import merge_options, request_options
from keye_jax.processor.planner import ImagePlan, MediaPlanner, VideoPlan
from keye_jax.processor.positions import mrope_positions
from keye_jax.processor.prompt import ChatTemplate, Detokenizer, RenderedPrompt, SafeTokenizer
from keye_jax.processor.settings import ProcessorSettings, read_template
from keye_jax.processor.targets import split_targets
from keye_jax.progress import Progress

MAX_DECODED_BYTES = 3 << 29
"""1.5 GiB. The longest context, of 256K tokens, takes 0.6 GiB of pixels."""


class Processor:
    """Turns messages into `ModelInputs` with the tokenizer and the chat template of a checkpoint. It may be pickled.

    Args:
      tokenizer, template: those of the checkpoint.
      config: the model's configuration; its token ids must be those of the tokenizer.
      settings: the checkpoint's settings, or the defaults.
      allow_remote: whether http(s) URLs may be fetched.
      allow_files: whether paths and file: URLs may be read.
      defaults: options of media, such as `fps` or `max_pixels`, that apply if a request does not set them. The prefix
        `image_` or `video_` limits an option to one kind of media.
      max_decoded_bytes: limit on a request's pixels as the model takes them, uint8, with the largest picture or frame
        of the request as it is decoded. A larger request is refused before it is decoded.
      guard: limits on what requests of strangers name; a server has one.

    Attributes:
      media: plans single images and videos.
      image_token_id, video_token_id: the pad tokens.
      patch_size: side of a patch, p, in pixels.
      pixel_scale, pixel_shift: float32 [3], one value a channel; the vision encoder takes pixel * scale + shift.

    Raises:
      UserError: `defaults` are not valid, a token id of `config` is not an added token of the tokenizer, or the text
        of a frame has a pad token.
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
        max_decoded_bytes: int = MAX_DECODED_BYTES,
        guard: MediaGuard | None = None,
    ):
        self._tokenizer = tokenizer
        self._template = template
        self._max_decoded_bytes = max_decoded_bytes
        self._encoder = FrameEncoder(tokenizer, settings.frame_text)
        self._frame_format_guessed = settings.frame_format is None
        self.media = MediaPlanner(
            settings, self._encoder, allow_remote=allow_remote, allow_files=allow_files, defaults=defaults, guard=guard
        )
        control = set(tokenizer.control.values())
        for name in ("image_token_id", "video_token_id"):
            value = getattr(config, name)
            if value not in control:
                raise UserError(f"config: {name} is {value}; it must be the id of an added token of tokenizer.json")
        self.image_token_id, self.video_token_id = config.image_token_id, config.video_token_id
        self._vocab_size = config.vocab_size
        self.patch_size = config.vision_config.patch_size
        self._merge_size = config.vision_config.spatial_merge_size
        pads = {config.image_token_id, config.video_token_id}
        if any(not pads.isdisjoint(before + after) for before, after in self._encoder.interleave(np.zeros(1))):
            raise UserError(f"frame_format is {settings.frame_format!r}; it must hold no pad token, only {{pads}}")
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
        max_decoded_bytes: int = MAX_DECODED_BYTES,
        guard: MediaGuard | None = None,
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
            max_decoded_bytes=max_decoded_bytes,
            guard=guard,
        )

    def token_id(self, text: str) -> int | None:
        """The id of the token named `text`, such as "<|im_end|>"; None if there is no such token."""
        return self._tokenizer.token_id(text)

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text of a user. No id is that of a control token.

        Raises:
          UserError: the tokenizer has a single character of the text only as a control token.
        """
        return self._tokenizer.encode_text(text)

    def strict_tokenizer_json(self) -> str:
        """The tokenizer as `tokenizer.json`, with every added token as a special one, which no text is made of."""
        return self._tokenizer.strict_json()

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
        learn: Sequence[bool] | None = None,
    ) -> PromptPlan:
        """Renders the prompt, measures its media, and chooses frames and sizes. It decodes no more than that needs.

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
          learn: for training, whether the model learns each of `messages`, answers of the assistant. The conversation
            then has no generation prompt.

        Raises:
          UserError: a message or an option is not valid; the text is one sentence.
          MediaError: an image or a video is not valid, or they are too large; it is a UserError.
        """
        asked = request_options(media_io_kwargs, mm_processor_kwargs)
        variables = check_template_variables(template_variables, "template_variables")
        variables |= check_template_variables(chat_template_kwargs, "chat_template_kwargs")
        rendered = self._template.render(messages, tools=tools, variables=variables, generation_prompt=learn is None)
        media = [
            dataclasses.replace(part, options=merge_options(asked[part.kind], part.options)) for part in rendered.media
        ]
        learnt: list[bool] = []
        if learn is None:
            ids = self._tokenizer.encode_pieces(rendered.pieces)
        else:
            ids = []
            opening = self._generation_prompt(messages, tools, variables, rendered)
            for pieces, is_answer in split_targets(rendered, learn, opening, self._template.end_of_turn):
                part = self._tokenizer.encode_pieces(pieces)
                ids += part
                learnt += [is_answer] * len(part)
        self._check_pads(ids, media)
        downloads: list[DownloadedFile] = []
        try:
            videos = sum(part.kind == "video" for part in media)
            images = tuple(self.media.image(part, downloads) for part in media if part.kind == "image")
            plans = tuple(
                self.media.video(part, downloads, single=videos == 1) for part in media if part.kind == "video"
            )
            self._check_bytes(images, plans)
        except BaseException as error:
            for download in downloads:
                download.close()
            if isinstance(error, UserError) and not isinstance(error, MediaError):
                raise MediaError(str(error)) from error
            raise
        warnings = [warning for medium in (*images, *plans) for warning in medium.warnings]
        if plans and self._frame_format_guessed:
            example = f"{GUESS} ({''.join(self._encoder.text.at(0.0))!r})"
            warnings.append(
                f"the checkpoint does not say how the time of a frame is written, so {example} is a guess; "
                f"frame_format in preprocessor_config.json sets it: {', '.join(PRESETS)}, or a format string"
            )
        return PromptPlan(
            tuple(ids), images, plans, rendered.opens_thinking, tuple(downloads), tuple(warnings), tuple(learnt)
        )

    def plan_raw(self, prompt: str | Sequence[int]) -> PromptPlan:
        """A prompt without a chat template and without media.

        Args:
          prompt: a text, in which nothing becomes a control token, or token ids, which stay as they are.

        Raises:
          UserError: the prompt is empty, or a token is not in the vocabulary or stands for media.
        """
        ids = self._tokenizer.encode_text(prompt) if isinstance(prompt, str) else prompt
        if not len(ids):
            raise UserError("prompt is empty; it must have at least one token")
        pads = (self.image_token_id, self.video_token_id)
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= token < self._vocab_size:
                raise UserError(f"prompt has token {token!r}; it must be a whole number below {self._vocab_size}")
            if token in pads:
                raise UserError(f"prompt has token {token}, which stands for media; a prompt of tokens has none")
        marks = [self.token_id("<think>"), self.token_id("</think>")]
        last = next((token for token in reversed(ids) if token in marks), None)
        return PromptPlan(tuple(map(int, ids)), (), (), last is not None and last == marks[0])

    def _generation_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, variables: Mapping[str, Any], rendered: RenderedPrompt
    ) -> str:
        """What the template writes behind a conversation for the assistant to go on."""
        ready = self._template.render(messages, tools=tools, variables=variables)
        return ready.pieces[-1][0].removeprefix(rendered.pieces[-1][0])

    def process(self, plan: PromptPlan, progress: Progress | None = None) -> ModelInputs:
        """Decodes the media of a prompt.

        Args:
          plan: the result of `plan`.
          progress: called after each frame with the number of decoded frames and of frames to decode.

        Raises:
          UserError: nothing of an image or of a video can be decoded.
        """
        warnings = list(plan.warnings)
        patch = self.patch_size
        image_grids, video_grids = self._grids(plan)
        image_patches, video_patches = (
            np.empty((int(grids.prod(1).sum()), 3, patch, patch), np.uint8) for grids in (image_grids, video_grids)
        )
        start = 0
        for image in plan.images:
            shown = patchify(image.pixels(warnings.append), patch)
            image_patches[start : start + len(shown)] = shown
            start += len(shown)

        used = np.zeros(len(video_grids), np.int32)
        first = start = 0
        for video in plan.videos:
            each = video.height * video.width // patch**2
            for frame_number, (index, pixels) in enumerate(video.pixels(np.arange(video.frames))):
                at = start + frame_number * each
                video_patches[at : at + each] = patchify(pixels, patch)
                used[first + frame_number] = index
                if progress is not None:
                    progress(first + frame_number + 1, plan.num_frames)
            warnings += video.source.warnings
            first, start = first + video.frames, start + each * video.frames
        times, undecodable = [], []
        first = 0
        for video in plan.videos:
            shown = used[first : first + video.frames]
            missing, sentence = video.undecodable(shown)
            times.append(video.source.info.times[shown])
            undecodable.append(missing)
            if sentence:
                warnings.append(sentence)
            first += video.frames

        tokens = self.expand(plan, times)
        return ModelInputs(
            tokens.input_ids,
            tokens.positions,
            tokens.position_delta,
            image_patches,
            image_grids,
            video_patches,
            video_grids,
            tuple(times),
            plan.prompt_opens_thinking,
            tuple(undecodable),
            tuple(dict.fromkeys(warnings)),
        )

    def expand(self, plan: PromptPlan, times: Sequence[np.ndarray] | None = None) -> PromptTokens:
        """The tokens of a prompt, before or after its media are decoded.

        Args:
          times: one array a video, float64 [frames], the seconds that the prompt states; those of `plan` if left out.
            The two differ only for a damaged video.
        """
        stated = [video.times for video in plan.videos] if times is None else times
        input_ids = np.fromiter(itertools.chain.from_iterable(self._expand(plan, stated)), np.int32)
        image_grids, video_grids = self._grids(plan)
        positions, delta = mrope_positions(
            input_ids,
            image_grids,
            video_grids,
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
            merge_size=self._merge_size,
        )
        return PromptTokens(input_ids, positions, delta, image_grids, video_grids)

    def targets(self, plan: PromptPlan, times: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Which tokens of a conversation belong to an answer to learn.

        Args:
          plan: made with `learn`.
          times: as for `expand`.

        Returns:
          bool [T], for the `input_ids` of `expand`.
        """
        stated = [video.times for video in plan.videos] if times is None else times
        counts = [len(tokens) for tokens in self._expand(plan, stated)]
        return np.repeat(np.array(plan.learnt, bool), counts)

    def in_order(self, plan: PromptPlan) -> list[ImagePlan | VideoPlan]:
        """The media in the order in which they stand in the prompt."""
        images, videos = iter(plan.images), iter(plan.videos)
        pads = {self.image_token_id: images, self.video_token_id: videos}
        return [next(pads[token]) for token in plan.prompt_ids if token in pads]

    def _grids(self, plan: PromptPlan) -> tuple[np.ndarray, np.ndarray]:
        """`image_grids` and `video_grids` of `ModelInputs`."""
        images = [(image.height, image.width) for image in plan.images]
        frames = [(video.height, video.width) for video in plan.videos for _ in video.indices]
        return _grids(images, self.patch_size), _grids(frames, self.patch_size)

    def _check_pads(self, ids: list[int], media: list[MediaPart]) -> None:
        for kind, token in (("image", self.image_token_id), ("video", self.video_token_id)):
            need, have = sum(part.kind == kind for part in media), ids.count(token)
            if need != have:
                raise UserError(
                    f"the messages hold {need} {kind}(s), but the chat template made {have} place(s) for them; "
                    "the numbers must be equal"
                )

    def _check_bytes(self, images: Sequence[ImagePlan], videos: Sequence[VideoPlan]) -> None:
        """Refuses a request whose pixels would take more than `max_decoded_bytes`."""
        model = sum(image.height * image.width * 3 for image in images)
        model += sum(video.frames * video.height * video.width * 3 for video in videos)
        frames = [video.source.info.height * video.source.info.width * 3 for video in videos]
        largest = max([*(image.source_bytes for image in images), *frames], default=0)
        if model + largest > self._max_decoded_bytes:
            count = f"{len(images)} image(s) and {sum(video.frames for video in videos)} frame(s)"
            raise UserError(
                f"messages hold {count} of {model:,} bytes for the model, and a decoded picture of {largest:,} bytes; "
                f"together they must be at most max_decoded_bytes {self._max_decoded_bytes:,}"
            )

    def _expand(self, plan: PromptPlan, times: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """The ids in place of each of `prompt_ids`: all pad tokens, and the time stamps of the decoded frames."""
        images = iter(plan.images)
        videos = iter(zip(plan.videos, times, strict=True))
        for token in plan.prompt_ids:
            if token == self.image_token_id:
                yield [token] * next(images).num_tokens
            elif token == self.video_token_id:
                video, stamps = next(videos)
                frame = [token] * video.tokens_per_frame
                yield [
                    each
                    for before, after in self._encoder.interleave(stamps, video.cues)
                    for each in (*before, *frame, *after)
                ]
            else:
                yield [token]


def _grids(sizes: Sequence[tuple[int, int]], patch: int) -> np.ndarray:
    rows = [(1, height // patch, width // patch) for height, width in sizes]
    return np.array(rows, np.int32).reshape(-1, 3)
