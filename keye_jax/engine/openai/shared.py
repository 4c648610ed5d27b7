"""What the bodies and streams of several interfaces have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keye_jax.engine.request import Choice, Result, SelectionHeat, TokenLogprob, Usage

# Stands for minus infinity, which JSON does not have.
LOWEST_LOGPROB = -9999.0

type TokenText = Callable[[int], str]
"""The text of one token, for log probabilities."""


def add_up(results: Sequence[Result]) -> Usage:
    """The tokens of several requests together."""
    names = ("prompt", "image", "video", "cached", "completion", "reasoning")
    return Usage(*(sum(getattr(result.usage, name) for result in results) for name in names))


def usage_body(usage: Usage) -> dict[str, Any]:
    """The usage of a chat or text completion."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached,
            "image_tokens": usage.image,
            "video_tokens": usage.video,
            "text_tokens": usage.prompt - usage.image - usage.video,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def finish_reason(choice: Choice) -> str:
    """Why an answer ended, in OpenAI's words. One that was cancelled is cut, as at a limit."""
    return "length" if choice.finish_reason == "cancelled" else choice.finish_reason


def heat_body(heat: SelectionHeat) -> dict[str, Any]:
    """What an answer looked at; see `SelectionHeat`."""
    return {
        "videos": [list(shares) for shares in heat.videos],
        "images": list(heat.images),
        "text": heat.text,
        "answer": heat.answer,
    }


def finite(logprob: float) -> float:
    """A log probability that JSON has."""
    return max(logprob, LOWEST_LOGPROB)


def chat_logprobs(values: Sequence[TokenLogprob], token_text: TokenText) -> dict[str, Any]:
    """The `logprobs` of a choice of a chat completion, whole or for the tokens of a chunk."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(token)
        # A token may be a part of a character, whose bytes the text does not tell.
        known = "\ufffd" not in text
        return {
            "token": text,
            "logprob": finite(logprob),
            "bytes": list(text.encode("utf-8", "surrogatepass")) if known else None,
        }

    return {
        "content": [
            {**entry(value.token, value.logprob), "top_logprobs": [entry(token, other) for token, other in value.top]}
            for value in values
        ]
    }
