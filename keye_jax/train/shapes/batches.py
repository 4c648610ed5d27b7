"""Batches for training: conversations about scenes, tokenised as the processor does it, and their frames.

The tokens of a video depend only on its frames' times, so they are laid out once. Per scene the host only looks up the
tokens of questions and answers. Frames are drawn on the device, by `frame_patches`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.processor.frame_text import FrameEncoder
from keye_jax.processor.positions import mrope_positions
from keye_jax.processor.prompt import SafeTokenizer
from keye_jax.processor.settings import ProcessorSettings
from keye_jax.train.shapes.damage import damage
from keye_jax.train.shapes.draw import SceneArrays, draw, scene_arrays, to_uint8
from keye_jax.train.shapes.questions import Question, ask
from keye_jax.train.shapes.scene import HELD_OUT, SIDE, Scene, SceneOptions, make_scene


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """What a batch is made of.

    Attributes:
      scenes: what the scenes are like; all of a batch have equally many frames.
      rows: scenes of a batch, one a row.
      tokens: length of a row. Questions are asked as long as they fit.
      turns: most questions about a scene, each a turn of one conversation.
      apart: whether each is asked in a conversation of its own instead, about the one video; see `Batch.branch`.
      kinds: weights of the kinds of questions, as for `ask`.
    """

    scenes: SceneOptions = dataclasses.field(default_factory=SceneOptions)
    rows: int = 64
    tokens: int = 1152
    turns: int = 6
    apart: bool = False
    kinds: Mapping[str, float] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """A batch for one step; B rows of T tokens, V vision tokens a scene.

    Attributes:
      ids: int32 [B, T]. Behind the conversation the pad token stands.
      positions: int32 [3, B, T], time, row and column.
      targets: int32 [B, T], the token that follows where an answer is written, and -1 elsewhere.
      vision_index: int32 [B, T], the row of the vision embeddings [B * V] that stands there, or -1 for a token.
      lengths: int32 [B], tokens of the conversations.
      branch: int32 [B, T], 0 up to the first question and then the number of the conversation, or None where there is
        one; tokens of one do not see those of another.
      scenes: arrays of B scenes, for `frame_patches`.
    """

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    vision_index: np.ndarray
    lengths: np.ndarray
    branch: np.ndarray | None
    scenes: SceneArrays


@dataclasses.dataclass(frozen=True, eq=False)
class _Layout:
    """The beginning of every conversation about videos with the same frame times.

    Attributes:
      ids: int32 [P], up to the first question.
      positions: int32 [3, P].
      vision_index: int32 [P].
      delta: a later token at index i has position i + delta.
    """

    ids: np.ndarray
    positions: np.ndarray
    vision_index: np.ndarray
    delta: int


class Batches:
    """Makes batches with the tokenizer of a checkpoint, such as `write_model_files` writes.

    Args:
      directory: holds the tokenizer and the processor's configuration. The chat template must be that of the embedded
        model.
      config: the model's configuration.
      options: what a batch is made of.

    Raises:
      UserError: a file is missing or not valid, or no question fits a row.
    """

    def __init__(self, directory: str | Path, config: KeyeConfig, options: BatchOptions = BatchOptions()):
        directory = Path(directory)
        self.options, self._config = options, config
        tokenizer = SafeTokenizer(directory / "tokenizer.json")
        settings = ProcessorSettings.from_checkpoint(directory, config.vision_config)
        self._frames = FrameEncoder(tokenizer, settings.frame_text)
        self._encode = functools.lru_cache(maxsize=65536)(lambda text: tuple(tokenizer.encode_text(text)))
        self._control = tokenizer.control
        self._layouts: dict[tuple[float, ...], _Layout] = {}
        side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        self.frame_tokens = (SIDE // side) ** 2
        longest = self._layout(make_scene(0, options.scenes).times)
        if len(longest.ids) + 64 > options.tokens:
            allowed = f"at least {len(longest.ids) + 64} for {options.scenes.frames} frames"
            raise UserError(f"tokens is {options.tokens}; it must be {allowed}")

    def batch(self, seed: int, number: int) -> Batch:
        """Batch `number` of a seed: scenes number * rows and on. The same arguments give the same batch.

        Raises:
          UserError: the seed is one of those held out for evaluation, or negative.
        """
        if not 0 <= seed < HELD_OUT:
            raise UserError(f"seed is {seed}; it must be from 0 to {HELD_OUT - 1}, since others are for evaluation")
        first = number * self.options.rows
        scenes = [make_scene(seed, self.options.scenes, number=first + row) for row in range(self.options.rows)]
        asked = [
            ask(scene, self.options.turns, (seed, first + row), kinds=self.options.kinds)
            for row, scene in enumerate(scenes)
        ]
        return self.of(scenes, asked)

    def of(self, scenes: Sequence[Scene], questions: Sequence[Sequence[Question]]) -> Batch:
        """A batch of given scenes, each with its questions; those that do not fit a row are left out."""
        rows, tokens = len(scenes), self.options.tokens
        ids = np.full((rows, tokens), self._control["<|endoftext|>"], np.int32)
        positions = np.empty((3, rows, tokens), np.int32)
        targets = np.full((rows, tokens), -1, np.int32)
        vision_index = np.full((rows, tokens), -1, np.int32)
        lengths = np.empty(rows, np.int32)
        branch = np.zeros((rows, tokens), np.int32) if self.options.apart else None
        for row, (scene, asked) in enumerate(zip(scenes, questions, strict=True)):
            layout = self._layout(scene.times)
            start = len(layout.ids)
            text, follows, ends = self._turns(asked, tokens - start)
            end = start + len(text)
            ids[row, :start], ids[row, start:end] = layout.ids, text
            targets[row, start:end] = follows
            positions[:, row, :start] = layout.positions
            positions[:, row, start:] = np.arange(start, tokens) + layout.delta
            if branch is not None:
                for number, (first, last) in enumerate(itertools.pairwise([0, *ends]), 1):
                    positions[:, row, start + first : start + last] -= first
                    branch[row, start + first : start + last] = number
            first = row * len(scene.times) * self.frame_tokens
            vision_index[row, :start] = np.where(layout.vision_index >= 0, layout.vision_index + first, -1)
            lengths[row] = end
        return Batch(ids, positions, targets, vision_index, lengths, branch, scene_arrays(scenes))

    def _layout(self, times: tuple[float, ...]) -> _Layout:
        """That of videos whose frames have these times."""
        if times not in self._layouts:
            control, pad = self._control, self._config.video_token_id
            ids = [control["<|im_start|>"], *self._encode("user\n"), control["<|vision_start|>"]]
            for before, after in self._frames.interleave(np.array(times)):
                ids += [*before, *[pad] * self.frame_tokens, *after]
            ids.append(control["<|vision_end|>"])
            side = SIDE // self._config.vision_config.patch_size
            positions, delta = mrope_positions(
                ids,
                [],
                [(1, side, side)] * len(times),
                image_token_id=self._config.image_token_id,
                video_token_id=pad,
                merge_size=self._config.vision_config.spatial_merge_size,
            )
            seen = np.array(ids) == pad
            index = np.where(seen, np.cumsum(seen) - 1, -1).astype(np.int32)
            self._layouts[times] = _Layout(np.array(ids, np.int32), positions, index, delta)
        return self._layouts[times]

    def _turns(self, questions: Sequence[Question], room: int) -> tuple[list[int], list[int], list[int]]:
        """Tokens from the first question to the end of the last answer, the targets at them, and each answer's end."""
        start, end = self._control["<|im_start|>"], self._control["<|im_end|>"]
        newline, assistant = self._encode("\n"), self._encode("assistant\n")
        ids: list[int] = []
        targets: list[int] = []
        ends: list[int] = []
        for number, question in enumerate(questions):
            begins = number == 0 or self.options.apart
            asked = self._encode(question.text if begins else f"user\n{question.text}")
            before = [] if begins else [*newline, start]
            prompt = [*before, *asked, end, *newline, start, *assistant]
            answer = [*self._encode(question.answer), end]
            if len(ids) + len(prompt) + len(answer) > room:
                break
            ids += [*prompt, *answer]
            # The last token of the prompt is followed by the first one of the answer.
            targets += [*[-1] * (len(prompt) - 1), *answer, -1]
            ends.append(len(ids))
        return ids, targets, ends


@functools.partial(jax.jit, static_argnames=("patch", "at_once"))
def frame_patches(scenes: SceneArrays, key: jax.Array, *, patch: int = 14, at_once: int = 16) -> jax.Array:
    """Draws the frames of scenes as a low-quality video shows them, and cuts them into patches.

    Memory: the float32 frames of `at_once` scenes, a few times.

    Args:
      scenes: of B scenes with F frames.
      key: of the random damage.
      patch: side of a patch in pixels, p.
      at_once: scenes that are drawn together.

    Returns:
      uint8 [B * F, patches of a frame, 3 * p * p], in the processor's order.
    """
    side = SIDE // patch

    def drawn(scene_and_key: tuple[SceneArrays, jax.Array]) -> jax.Array:
        scene, key = scene_and_key
        frames = to_uint8(jnp, damage(draw(jnp, scene), key))
        grid = frames.reshape(-1, side, patch, side, patch, 3)
        return grid.transpose(0, 1, 3, 5, 2, 4).reshape(-1, side * side, 3 * patch * patch)

    patches = jax.lax.map(drawn, (scenes, jax.random.split(key, len(scenes.clock))), batch_size=at_once)
    return patches.reshape(-1, *patches.shape[2:])
