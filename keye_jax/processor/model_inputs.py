"""A prompt on its way to the model: planned, as tokens, and with the pixels of its media."""

from __future__ import annotations

import dataclasses

import numpy as np

from keye_jax.processor.media import DownloadedFile
from keye_jax.processor.planner import ImagePlan, VideoPlan


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
      undecodable_times: one array a video, float64 [n], seconds of the frames that cannot be decoded. Frames near them
        are shown in their place.
      warnings: sentences about what is missing, damaged or guessed.
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
    undecodable_times: tuple[np.ndarray, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class PromptTokens:
    """The tokens of a prompt, for which no pixels are needed. The attributes are those of `ModelInputs`."""

    input_ids: np.ndarray
    positions: np.ndarray
    position_delta: int
    image_grids: np.ndarray
    video_grids: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class PromptPlan:
    """A prompt whose media are measured but not decoded.

    Attributes:
      prompt_ids: token ids with one pad token for each image and each video.
      images, videos: in prompt order.
      prompt_opens_thinking: see `ModelInputs`.
      downloads: files that `close`, or the end of the plan's life, removes.
      warnings: as in `ModelInputs`.
      learnt: of a conversation to learn, whether each of `prompt_ids` belongs to an answer; empty otherwise.
    """

    prompt_ids: tuple[int, ...]
    images: tuple[ImagePlan, ...]
    videos: tuple[VideoPlan, ...]
    prompt_opens_thinking: bool
    downloads: tuple[DownloadedFile, ...] = ()
    warnings: tuple[str, ...] = ()
    learnt: tuple[bool, ...] = ()

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
