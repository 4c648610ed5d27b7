"""What an engine knows of a request on its way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

import jax
import numpy as np

from keye_jax.engine.handle import Handle
from keye_jax.engine.media.work import Decoded, Prompt
from keye_jax.engine.request import Choice, Request
from keye_jax.engine.stepper import SequenceData
from keye_jax.engine.text import AnswerWriter
from keye_jax.processor import PromptPlan

if TYPE_CHECKING:
    from llguidance import LLMatcher

type Steps = Callable[[str, int, int], None]
"""Told the name of a step of a request, how much of it is done, and out of how much."""


@dataclasses.dataclass(eq=False)
class Answering:
    """One answer of a request.

    Attributes:
      id: of its sequence.
      number: which of the n answers.
      data: what the devices know of it.
      writer, times: what was written so far, and when, in seconds from the submission.
      max_tokens: limit on its tokens.
      choice: the whole answer; None while it is written.
    """

    id: str
    number: int
    data: SequenceData
    writer: AnswerWriter
    max_tokens: int
    times: list[float] = dataclasses.field(default_factory=list)
    choice: Choice | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """What is kept of a medium.

    Attributes:
      embeds: `[pads, embed]`.
      shown: as in `Decoded.shown`; None if its frames are those of the plan.
    """

    embeds: np.ndarray
    shown: np.ndarray | None

    @property
    def nbytes(self) -> int:
        return self.embeds.nbytes


@dataclasses.dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
      submitted: when, by `time.perf_counter`.
      progress: told what is done of "decoding frames", "encoding frames" and "reading the prompt", and out of how much.
      plan: of a prompt without a chat template; None for other prompts.
      matcher: at the beginning of its grammar; None without one.
      prompt, decoded: what media workers said of it; None as long as they have not.
      choices: its answers.
      embeds, filled: `[pads, embed]` embeddings of its pads, and bool `[pads]`, which of them are there.
      frames, frames_decoded: of all media, those that have to be encoded, and those of them that are decoded.
      frames_left: of each medium, frames that are not encoded.
      cached: tokens of the prompt that the prefix cache had for the first answer.
      at: when things happened, in seconds from the submission; see `Timings`.
    """

    id: int
    request: Request
    handle: Handle
    submitted: float
    progress: Steps = lambda step, done, total: None
    plan: PromptPlan | None = None
    matcher: Future[LLMatcher] | None = None
    prompt: Prompt | None = None
    decoded: Decoded | None = None
    choices: list[Answering] = dataclasses.field(default_factory=list)
    embeds: np.ndarray | None = None
    filled: np.ndarray | None = None
    frames: int = 0
    frames_decoded: int = 0
    frames_left: list[int] = dataclasses.field(default_factory=list)
    cached: int = 0
    at: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def ready(self) -> int:
        """Tokens at the beginning of the prompt that can be read: those whose embeddings are there.

        The last token waits until all media are decoded, since they may turn out to be damaged and the text to change.
        """
        assert self.filled is not None and self.prompt is not None, "the prompt is known"
        there = len(self.filled) if self.filled.all() else int(np.argmin(self.filled))
        tokens = int(np.searchsorted(self.choices[0].data.pads_before, there, "right")) - 1
        if self.prompt.media and self.decoded is None:
            return min(tokens, len(self.prompt.input_ids) - 1)
        return tokens

    def stamp(self, name: str) -> None:
        """Notes when something happened for the first time, in seconds from the submission."""
        self.at.setdefault(name, time.perf_counter() - self.submitted)

    def stamp_last_token(self) -> float:
        """Notes that a token is there, and returns when."""
        now = self.at["last_token"] = time.perf_counter() - self.submitted
        return now


@dataclasses.dataclass(frozen=True, eq=False)
class Encoding:
    """Frames of one medium that are being encoded.

    Attributes:
      medium: its place in `Prompt.media`.
      frames, tokens: how many, and the tokens of each.
      first_pad: pad tokens of the prompt before them.
      encoded: what `Stepper.encode` returned.
    """

    job_id: int
    medium: int
    frames: int
    tokens: int
    first_pad: int
    encoded: jax.Array
