"""What is asked of an engine, and what it gives back: requests, events, results."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from keye_jax.errors import UserError
from keye_jax.processor import PromptPlan
from keye_jax.runtime.sampling import SamplingParams

DEFAULT_NEW_TOKENS = 4096
"""Most tokens of an answer, if a request does not say."""

type FinishReason = Literal["stop", "tool_calls", "length", "cancelled"]

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, and how its answers are drawn.

    Attributes:
      messages: the conversation, as for `Processor.plan`; None if `plan` is given.
      plan: a prompt that is planned already; the engine closes it.
      prompt: a prompt without a chat template and without media: a text, in which nothing becomes a control token, or
        token ids. A request has exactly one of `messages`, `plan` and `prompt`.
      options: further arguments of `Processor.plan`: tools, chat_template_kwargs, media_io_kwargs, mm_processor_kwargs.
      sampling: temperature, penalties and so on; the checkpoint's if left out. Choice i is drawn with seed + i.
      max_tokens: most tokens of one answer; if left out, what positions allow, and at most `DEFAULT_NEW_TOKENS`.
      n: number of answers (choices).
      stop: texts that end an answer and do not appear in it.
      logit_bias: what is added to the logits of tokens, by id.
      top_logprobs: log probabilities of how many of the likeliest tokens are wanted with each token; 0 for that of the
        token alone, None for none at all.
      grammar: what the answer has to be, as llguidance serialises it (`LLMatcher.grammar_from_json_schema`,
        `grammar_from_lark`, `grammar_from_regex`). It begins after the thoughts.
      thinking_budget: most tokens inside of the think block; then only its closing mark may be drawn. With a budget the
        answer opens no block but with its first token.
      selection_heat: whether each answer comes with what it looked at; the engine must have `selection_heat`.
      tool_names: functions whose calls are told apart from the answer's text; see `AnswerWriter`.
      max_tool_calls: an answer ends after so many calls; None for no limit.
      id: its name, unlike that of any other request. Ids of tool calls follow from it.
    """

    messages: Sequence[Mapping[str, Any]] | None = None
    plan: PromptPlan | None = None
    prompt: str | Sequence[int] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: SamplingParams | None = None
    max_tokens: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    top_logprobs: int | None = None
    grammar: str | None = None
    thinking_budget: int | None = None
    selection_heat: bool = False
    tool_names: tuple[str, ...] = ()
    max_tool_calls: int | None = None
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex, compare=False)

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.messages, self.plan, self.prompt)) != 1:
            raise UserError("a request has exactly one of messages, plan and prompt")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 1 <= self.n <= MAX_CHOICES:
            raise UserError(f"n is {self.n}; it must be from 1 to {MAX_CHOICES}")
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            raise UserError(f"stop has {len(self.stop)} texts; it must be at most {MAX_STOPS}, and none of them empty")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise UserError(f"thinking_budget is {self.thinking_budget}; it must be at least 0")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise UserError(f"top_logprobs is {self.top_logprobs}; it must be from 0 to {MAX_TOP_LOGPROBS}")


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token, before temperature and penalties.

    Attributes:
      token: its id.
      logprob: natural logarithm of its probability.
      top: (id, logprob) of the likeliest tokens, as many as were asked for.
      in_text: whether the token is one of the answer's text, and not of its reasoning, of the arguments of a call, or a
        mark between these.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    in_text: bool = True


@dataclasses.dataclass(frozen=True)
class Piece:
    """A new piece of an answer.

    Attributes:
      choice: which of the n answers.
      text: not empty; pieces put together are the answer.
      reasoning: whether it belongs to the reasoning.
      logprobs: of the tokens that came since the event before of this answer, if they were asked for. Those behind the
        last event are only in the result.
    """

    choice: int
    text: str
    reasoning: bool = False
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class ToolCallPiece:
    """The beginning of a tool call, or a new piece of its arguments.

    Attributes:
      choice: which of the n answers.
      index: which of the answer's calls.
      id: the call's name, in all its pieces.
      name: the function, in the first piece of a call; None in the others.
      arguments: empty in the first piece; pieces put together are the arguments.
      logprobs: as in `Piece`.
    """

    choice: int
    index: int
    id: str
    name: str | None
    arguments: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function that the answer calls.

    Attributes:
      id: "call_" and 24 hexadecimal digits, the same for the same request, choice and place.
      name: one of `Request.tool_names`.
      arguments: as the model wrote them: a JSON object, or its beginning if the answer was cut.
    """

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class TextPart:
    """A stretch of an answer between two tool calls, or between two stretches of the other kind.

    Attributes:
      text: not empty.
      reasoning: whether it belongs to the reasoning.
      logprobs: those of its pieces whose tokens are in the text.
    """

    text: str
    reasoning: bool = False
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class SelectionHeat:
    """What an answer looked at: where the positions lie that its steps of decode selected, in all layers together.

    The indexer selects the same number of positions in each layer and step, and all of them while the context is
    shorter than that. So as long as nothing is left out, a share only says how many tokens something has. The first
    token is drawn by the step that reads the prompt, which does not count. A step that was queued before the end of the
    answer was known does.

    Attributes:
      videos: for each video of the prompt, the share of each of its frames.
      images: the share of each image.
      text: the share of all other tokens of the prompt. Those of videos, images and text are shares of what was
        selected in the prompt, 1 together; or all are 0 if nothing was.
      answer: of all positions that were selected, the share that the answer's own tokens have.
    """

    videos: tuple[tuple[float, ...], ...]
    images: tuple[float, ...]
    text: float
    answer: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """A whole answer.

    Attributes:
      text, reasoning: what was written outside and inside of the think block, without tool calls.
      finish_reason: "stop" at an end token, a stop text or the last call that is allowed; "tool_calls" there if the
        answer has calls; "length" at the limit; "cancelled".
      token_ids: all drawn ids, an end token not included.
      reasoning_tokens: how many of them belong to the reasoning.
      logprobs: one a token, if they were asked for.
      token_seconds: when each token was there, in seconds from the submission.
      selection_heat: what it looked at, if that was asked for.
      tool_calls: in order.
      parts: reasoning, text and calls as they follow each other; None if nothing is known but the above.
    """

    text: str
    reasoning: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    reasoning_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    token_seconds: tuple[float, ...] = ()
    selection_heat: SelectionHeat | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    parts: tuple[TextPart | ToolCall, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    Attributes:
      prompt, image, video: of the prompt, and those of them that are images' and videos'.
      cached: of the prompt, those that were found in the prefix cache.
      completion, reasoning: of all answers.
    """

    prompt: int
    image: int
    video: int
    cached: int
    completion: int
    reasoning: int


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds from the submission of a request.

    Attributes:
      planned: until its prompt was planned.
      admitted: until pages were reserved for it.
      media: until its media were decoded; `planned` without media.
      first_token, last_token: until the first and the last token of any choice.
      encoded: until its media were encoded; `planned` if there was nothing to encode.
    """

    planned: float
    admitted: float
    media: float
    first_token: float
    last_token: float
    encoded: float = 0.0


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a request.

    Attributes:
      choices: its answers.
      usage: tokens.
      timings: seconds.
      frame_times: one list a video, seconds of the frames that were shown.
      warnings: what the user should know about the media.
      undecodable_times: one list a video, seconds of frames that cannot be decoded. Frames near them were shown.
    """

    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    frame_times: tuple[tuple[float, ...], ...] = ()
    warnings: tuple[str, ...] = ()
    undecodable_times: tuple[tuple[float, ...], ...] = ()


class RequestError(Exception):
    """A request that failed by itself; the engine goes on.

    Attributes:
      kind: "invalid" (the request's fault), "media" (its media), "unreachable" (its media cannot be fetched for now),
        "too_large" (it can never run here), "timeout", "internal" (the engine's fault), "cancelled", "closed" (the
        engine ends).
    """

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)
        self.kind = kind

    def __str__(self) -> str:
        return self.args[1]

    @property
    def transient(self) -> bool:
        """Whether the same request may pass later."""
        return self.kind in ("unreachable", "timeout", "internal")


type AnswerPiece = Piece | ToolCallPiece
type Event = AnswerPiece | Result | RequestError
