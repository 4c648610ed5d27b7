"""The work on the media of one request: planning them, and decoding them in pieces. Needs no JAX."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from keye_jax.engine.media.frame_cache import FrameCache
from keye_jax.engine.media.hashes import FileHashes, media_hash
from keye_jax.errors import MediaError, UnreachableError, UserError
from keye_jax.processor import ImagePlan, Processor, PromptPlan, PromptTokens, VideoPlan
from keye_jax.processor.image import patchify

# In the frame cache, in place of the name that a medium has in its request.
_FIELD = "\0"


class Stopped(Exception):
    """The work is no longer wanted."""


@dataclasses.dataclass(frozen=True)
class Medium:
    """An image or a video of a prompt. An image counts as one frame.

    Attributes:
      kind: which of both.
      field: its name in error messages.
      hash: `media_hash`, 32 bytes; empty where nothing is kept by it.
      frames: how many.
      grid: (1, h, w) of a frame in patches.
      frame_bytes: size of a frame as the model takes it.
      tokens_per_frame: pad tokens of a frame.
      first_frame: the row of its first frame in `image_grids` or `video_grids`.
      first_pad: how many pad tokens stand before it in the prompt.
    """

    kind: Literal["image", "video"]
    field: str
    hash: bytes
    frames: int
    grid: tuple[int, int, int]
    frame_bytes: int
    tokens_per_frame: int
    first_frame: int
    first_pad: int

    @property
    def patches_per_frame(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def pads(self) -> int:
        """Number of its pad tokens."""
        return self.frames * self.tokens_per_frame


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """What is known of a prompt of T tokens before its media are decoded.

    The times of frames are those of the plan. Where a frame near by is shown in the place of one that cannot be
    decoded, `Decoded` has what the prompt is then.

    Attributes:
      input_ids: int32 [T], with all pad tokens.
      positions: int32 [3, T].
      position_delta: as in `ModelInputs`.
      image_grids, video_grids: int32 [I, 3] and [F, 3], as in `ModelInputs`.
      media: images and videos in the order of the prompt.
      frame_times: one array a video, float64 [frames], seconds.
      text_tokens, image_tokens, video_tokens: tokens by kind; together T.
      prompt_opens_thinking: as in `ModelInputs`.
      warnings: those of planning.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    position_delta: int
    image_grids: np.ndarray
    video_grids: np.ndarray
    media: tuple[Medium, ...]
    frame_times: tuple[np.ndarray, ...]
    text_tokens: int
    image_tokens: int
    video_tokens: int
    prompt_opens_thinking: bool
    warnings: tuple[str, ...]

    def restated(self, tokens: PromptTokens) -> Prompt:
        """The prompt with other text beside its frames; its pads stay the same in number and order."""
        names = [field.name for field in dataclasses.fields(PromptTokens)]
        text = len(tokens.input_ids) - self.image_tokens - self.video_tokens
        return dataclasses.replace(self, text_tokens=text, **{name: getattr(tokens, name) for name in names})


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """What came out of decoding the media of a prompt.

    Attributes:
      frame_times: one array a video, float64 [frames], seconds of the frames that are shown.
      undecodable_times: one array a video, as in `ModelInputs`.
      warnings: those of planning and of decoding.
      cached_frames: how many frames came from the frame cache.
      shown: of each video whose frames are not those of the plan, the index in the video of each frame that is shown,
        by the place of the video in `Prompt.media`.
      tokens: the prompt that states their times; None if the plan's does.
    """

    frame_times: tuple[np.ndarray, ...]
    undecodable_times: tuple[np.ndarray, ...]
    warnings: tuple[str, ...]
    cached_frames: int = 0
    shown: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    tokens: PromptTokens | None = None


class Sink(Protocol):
    """Where the patches of a request go."""

    def space(self, medium: int, first_frame: int, frames: int) -> np.ndarray:
        """Waits for room for the patches of frames of a medium, uint8 [bytes]. Raises Stopped."""
        ...

    def filled(self) -> None:
        """Says that the room is filled."""
        ...

    def check(self) -> None:
        """Raises Stopped if the work is no longer wanted."""
        ...


def describe(processor: Processor, plan: PromptPlan, files: FileHashes | None) -> Prompt:
    """All that is known of a planned prompt.

    Args:
      files: hashes of files; None leaves the hashes of media empty.

    Raises:
      MediaError: a file cannot be read any more.
    """
    tokens = processor.expand(plan)
    media: list[Medium] = []
    first = {"image": 0, "video": 0}
    pads = 0
    for each in processor.in_order(plan):
        kind, frames = ("image", 1) if isinstance(each, ImagePlan) else ("video", each.frames)
        per_frame = each.num_tokens if isinstance(each, ImagePlan) else each.tokens_per_frame
        grid = (1, each.height // processor.patch_size, each.width // processor.patch_size)
        try:
            digest = b"" if files is None else media_hash(each, processor.patch_size, files)
        except OSError as error:
            raise MediaError(f"{each.field} cannot be read any more: {error.strerror or error}") from error
        size = each.height * each.width * 3
        media.append(Medium(kind, each.field, digest, frames, grid, size, per_frame, first[kind], pads))
        first[kind] += frames
        pads += media[-1].pads
    images = sum(medium.pads for medium in media if medium.kind == "image")
    return Prompt(
        tokens.input_ids,
        tokens.positions,
        tokens.position_delta,
        tokens.image_grids,
        tokens.video_grids,
        tuple(media),
        tuple(video.times for video in plan.videos),
        len(tokens.input_ids) - pads,
        images,
        pads - images,
        plan.prompt_opens_thinking,
        plan.warnings,
    )


def frames_per_piece(medium: Medium, piece_patches: int) -> int:
    """Frames that are handed over together: `piece_patches` patches at most, and at least one frame."""
    return max(1, min(medium.frames, piece_patches // medium.patches_per_frame))


def decode(
    processor: Processor,
    plan: PromptPlan,
    media: Sequence[Medium],
    skip: Mapping[int, int],
    shown: Mapping[int, np.ndarray],
    sink: Sink,
    *,
    piece_patches: int,
    threads: int,
    cache: FrameCache | None,
) -> Decoded:
    """Decodes the media of a prompt, in its order, into pieces of whole frames of one medium.

    Args:
      media: those of `Prompt`.
      skip: how many of the first frames of a medium are left out, by the place of the medium in `media`.
      shown: as in `Decoded`, of videos that are left out; the others of these count as decodable.
      sink: takes the pieces.
      piece_patches: most patches of a piece of more than one frame.
      threads: of a video decoder.
      cache: is read, and written if no frame of a medium is left out.

    Raises:
      MediaError: nothing of an image or of a video can be decoded.
      Stopped: the sink says so.
    """
    warnings = list(plan.warnings)
    times: list[np.ndarray] = []
    undecodable: list[np.ndarray] = []
    replaced: dict[int, np.ndarray] = {}
    sentences: list[str] = []
    cached_frames = 0
    for number, (each, medium) in enumerate(zip(processor.in_order(plan), media, strict=True)):
        start = min(skip.get(number, 0), medium.frames)
        frames = _Frames(each, medium, processor.patch_size, threads, cache)
        used = np.arange(medium.frames) if isinstance(each, ImagePlan) else shown.get(number, each.indices).copy()
        at_once = frames_per_piece(medium, piece_patches)
        with contextlib.closing(frames.patches(start)) as patches, _as_media_error():
            for first in range(start, medium.frames, at_once):
                count = min(at_once, medium.frames - first)
                room = sink.space(number, first, count).reshape(count, medium.patches_per_frame, -1)
                for index in range(count):
                    sink.check()
                    used[first + index], seen = next(patches)
                    room[index] = seen.reshape(medium.patches_per_frame, -1)
                sink.filled()
            next(patches, None)  # finishes the entry of the cache
        warnings += frames.warnings
        cached_frames += frames.cached
        if isinstance(each, VideoPlan):
            missing, sentence = each.undecodable(used)
            undecodable.append(missing)
            times.append(each.source.info.times[used])
            if sentence:
                sentences.append(sentence)
                replaced[number] = used
    return Decoded(
        tuple(times),
        tuple(undecodable),
        tuple(dict.fromkeys(warnings + sentences)),
        cached_frames,
        replaced,
        processor.expand(plan, times) if replaced else None,
    )


@contextlib.contextmanager
def _as_media_error() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise MediaError(str(error)) from error


class _Frames:
    """The frames of a medium, from the cache or decoded.

    Attributes:
      warnings: those of decoding, complete after the last frame.
      cached: how many frames came from the cache.
    """

    def __init__(
        self, plan: ImagePlan | VideoPlan, medium: Medium, patch_size: int, threads: int, cache: FrameCache | None
    ):
        self._plan, self._medium, self._patch_size = plan, medium, patch_size
        self._threads, self._cache = threads, cache
        self._shape = (medium.frames, medium.patches_per_frame, 3, patch_size, patch_size)
        self.warnings: list[str] = []
        self.cached = 0

    def patches(self, start: int) -> Generator[tuple[int, np.ndarray]]:
        """The index in the video and the patches, uint8 [patches, 3, p, p], of each frame from `start` on."""
        if start == self._medium.frames:
            return
        if self._cache and (entry := self._cache.read(self._medium.hash, self._shape)):
            with entry:
                self.warnings += [text.replace(_FIELD, self._medium.field) for text in entry.warnings]
                for index in range(start, self._medium.frames):
                    if (shown := entry.frame(index)) is None:
                        break
                    self.cached += 1
                    yield entry.used[index], shown
                else:
                    return
            start += self.cached
            self.warnings.clear()
        writer = self._cache.write(self._medium.hash, self._shape) if self._cache and not start else None
        if writer is None:
            yield from self._decode(start)
            return
        with writer:
            for used, shown in self._decode(start):
                writer.add(used, shown)
                yield used, shown
            writer.finish([text.replace(self._medium.field, _FIELD) for text in self.warnings])

    def _decode(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        if isinstance(self._plan, ImagePlan):
            yield 0, patchify(self._plan.pixels(self.warnings.append), self._patch_size)
            return
        wanted = np.arange(start, self._medium.frames)
        for used, pixels in self._plan.pixels(wanted, threads=self._threads):
            yield used, patchify(pixels, self._patch_size)
        self.warnings += self._plan.source.warnings


def failure(error: BaseException, log: Callable[[str], None]) -> tuple[str, str]:
    """What kind of failure an exception is, as in `RequestError`, and a sentence about it.

    Args:
      log: takes a sentence if the exception is a defect, to be logged with its traceback.
    """
    if isinstance(error, UnreachableError):
        return "unreachable", str(error)
    if isinstance(error, MediaError):
        return "media", str(error)
    if isinstance(error, UserError):
        return "invalid", str(error)
    log("the media of a request failed")
    text: Any = " ".join(str(error).split())[:200]
    return "internal", f"reading the media failed: {type(error).__name__}{f': {text}' if text else ''}"
