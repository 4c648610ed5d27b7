"""Text completions: whole bodies, and streams of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keye_jax.engine.openai.errors import error_body
from keye_jax.engine.openai.shared import TokenText, add_up, finish_reason, finite, usage_body
from keye_jax.engine.request import Event, Piece, RequestError, Result, TokenLogprob, ToolCallPiece


def text_completion_body(
    results: Sequence[Result], *, completion_id: str, created: int, model: str, token_text: TokenText
) -> dict[str, Any]:
    """The body of a text completion.

    Args:
      results: one for each prompt, each with the same number of choices. A choice's index counts through all of them.
      completion_id, created, model, token_text: as for `completion_body`.
    """
    choices = [choice for result in results for choice in result.choices]
    return {
        "id": completion_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "text": choice.text,
                "index": index,
                "logprobs": None if choice.logprobs is None else _Logprobs(token_text).add(choice.logprobs),
                "finish_reason": finish_reason(choice),
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage_body(add_up(results)),
    }


class _Logprobs:
    """Log probabilities in the shape of text completions, in pieces.

    `text_offset` counts the characters of the texts of the tokens before.
    """

    def __init__(self, token_text: TokenText):
        self._token_text, self._offset = token_text, 0
        self.count = 0

    def add(self, values: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Those of the next tokens."""
        self.count += len(values)
        tokens, offsets = [self._token_text(value.token) for value in values], []
        for text in tokens:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [finite(value.logprob) for value in values],
            "top_logprobs": [
                {self._token_text(token): finite(logprob) for token, logprob in value.top} for value in values
            ],
            "text_offset": offsets,
        }


class CompletionStream:
    """The chunks of a text completion as it comes. Put together they are what `text_completion_body` gives.

    Args:
      prompts: how many there are.
      n: choices of each.
      completion_id, created, model, token_text: as for `completion_body`.
      include_usage: whether a chunk without choices ends the stream and has the usage.
    """

    def __init__(
        self,
        *,
        prompts: int,
        n: int,
        completion_id: str,
        created: int,
        model: str,
        token_text: TokenText,
        include_usage: bool = False,
    ):
        self._head = {"id": completion_id, "object": "text_completion", "created": created, "model": model}
        self._n, self._prompts, self._include_usage = n, prompts, include_usage
        self._logprobs = [_Logprobs(token_text) for _ in range(prompts * n)]
        self._results: list[Result] = []

    def take(self, event: Event, prompt: int = 0) -> list[dict[str, Any]]:
        """The chunks to send for an event of the request of one prompt.

        An error gives an object with `error`, which ends the stream.
        """
        if isinstance(event, RequestError):
            return [error_body(event)[1]]
        first = prompt * self._n
        if isinstance(event, Piece):
            return [self._chunk(first + event.choice, event.text, event.logprobs)]
        if isinstance(event, ToolCallPiece):
            raise ValueError("a text completion has no tools")
        self._results.append(event)
        chunks = []
        for index, choice in enumerate(event.choices, first):
            rest = (choice.logprobs or ())[self._logprobs[index].count :]
            chunks.append(self._chunk(index, "", rest, finish_reason(choice)))
        if self._include_usage and len(self._results) == self._prompts:
            chunks.append({**self._head, "choices": [], "usage": usage_body(add_up(self._results))})
        return chunks

    def _chunk(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None = None
    ) -> dict[str, Any]:
        shown = self._logprobs[index].add(logprobs) if logprobs else None
        choice = {"text": text, "index": index, "logprobs": shown, "finish_reason": reason}
        return {**self._head, "choices": [choice], **({"usage": None} if self._include_usage else {})}
