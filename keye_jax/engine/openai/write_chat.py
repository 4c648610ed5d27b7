"""Chat completions: whole bodies, and streams of chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from keye_jax.engine.openai.errors import error_body
from keye_jax.engine.openai.shared import TokenText, chat_logprobs, finish_reason, heat_body, usage_body
from keye_jax.engine.request import Choice, Event, Piece, RequestError, Result, TokenLogprob, ToolCallPiece


def completion_body(
    result: Result, *, completion_id: str, created: int, model: str, token_text: TokenText
) -> dict[str, Any]:
    """The body of a chat completion.

    Args:
      completion_id: its `id`.
      created: seconds since 1970.
      model: the name of the model.
      token_text: the text of one token, for log probabilities.

    Returns:
      An object for JSON. Besides OpenAI's fields a message has its reasoning, under both names that clients look for, a
      choice has `selection_heat` if that was asked for, and the body has `warnings` about media if there are any.
    """
    body: dict[str, Any] = {
        "id": completion_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [_choice(index, choice, token_text) for index, choice in enumerate(result.choices)],
        "usage": usage_body(result.usage),
    }
    return body | _warnings(result)


def _choice(index: int, choice: Choice, token_text: TokenText) -> dict[str, Any]:
    reasoning = choice.reasoning or None
    message: dict[str, Any] = {
        "role": "assistant",
        # As OpenAI has it: no text is null beside tool calls, and empty without.
        "content": choice.text or (None if choice.tool_calls else ""),
        "reasoning_content": reasoning,
        "reasoning": reasoning,
    }
    if choice.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.tool_calls
        ]
    return {
        "index": index,
        "message": message,
        "logprobs": None if choice.logprobs is None else chat_logprobs(choice.logprobs, token_text),
        "finish_reason": finish_reason(choice),
        **_heat(choice),
    }


def _heat(choice: Choice) -> dict[str, Any]:
    return {} if choice.selection_heat is None else {"selection_heat": heat_body(choice.selection_heat)}


def _warnings(result: Result) -> dict[str, Any]:
    return {"warnings": list(result.warnings)} if result.warnings else {}


@dataclasses.dataclass
class _Sent:
    """What a stream has sent of a choice: whether any text or call, and log probabilities of how many tokens."""

    any: bool = False
    logprobs: int = 0


class ChatStream:
    """The chunks of a chat completion as it comes. Put together they are what `completion_body` gives.

    The first chunk of a choice has the role. Log probabilities come with the chunk of their tokens, those of tokens
    that show no text with the one after it. The last chunk of a choice has its finish reason and, if that was asked
    for, `selection_heat`. `warnings` are in the last chunk of all.

    Args:
      completion_id, created, model, token_text: as for `completion_body`.
      include_usage: whether a chunk without choices ends the stream and has the usage.
    """

    def __init__(
        self, *, completion_id: str, created: int, model: str, token_text: TokenText, include_usage: bool = False
    ):
        self._head = {"id": completion_id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._token_text, self._include_usage = token_text, include_usage
        self._sent: list[_Sent] = []

    def take(self, event: Event) -> list[dict[str, Any]]:
        """The chunks to send for an event. An error gives an object with `error`, which ends the stream."""
        if isinstance(event, RequestError):
            return [error_body(event)[1]]
        if not isinstance(event, Result):
            return self._take_piece(event)
        chunks = []
        for index, choice in enumerate(event.choices):
            chunks += [*self._begin(index), self._end(index, choice)]
        chunks[-1] |= _warnings(event)
        if self._include_usage:
            chunks.append({**self._head, "choices": [], "usage": usage_body(event.usage)})
        return chunks

    def _take_piece(self, event: Piece | ToolCallPiece) -> list[dict[str, Any]]:
        chunks = self._begin(event.choice)
        sent = self._sent[event.choice]
        delta: dict[str, Any]
        if isinstance(event, ToolCallPiece):
            sent.any = True
            call: dict[str, Any] = {"index": event.index}
            if event.name is None:
                call["function"] = {"arguments": event.arguments}
            else:
                function = {"name": event.name, "arguments": event.arguments}
                call |= {"id": event.id, "type": "function", "function": function}
            delta = {"tool_calls": [call]}
        elif event.reasoning:
            delta = {"reasoning_content": event.text, "reasoning": event.text}
        else:
            sent.any = True
            delta = {"content": event.text}
        return [*chunks, self._chunk(event.choice, delta, event.logprobs)]

    def _begin(self, index: int) -> list[dict[str, Any]]:
        """The first chunks of choices up to this one, as far as they are not sent.

        They come in order, since OpenAI's client appends a choice that it has not seen.
        """
        new = range(len(self._sent), index + 1)
        self._sent.extend(_Sent() for _ in new)
        return [self._chunk(each, {"role": "assistant"}, ()) for each in new]

    def _end(self, index: int, choice: Choice) -> dict[str, Any]:
        sent = self._sent[index]
        rest = (choice.logprobs or ())[sent.logprobs :]
        chunk = self._chunk(index, {} if sent.any else {"content": ""}, rest)
        chunk["choices"][0] |= {"finish_reason": finish_reason(choice), **_heat(choice)}
        return chunk

    def _chunk(self, index: int, delta: Mapping[str, Any], logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        self._sent[index].logprobs += len(logprobs)
        shown = chat_logprobs(logprobs, self._token_text) if logprobs else None
        choice = {"index": index, "delta": dict(delta), "logprobs": shown, "finish_reason": None}
        # With `include_usage` all chunks but the last have an empty usage, as OpenAI has it.
        return {**self._head, "choices": [choice], **({"usage": None} if self._include_usage else {})}
