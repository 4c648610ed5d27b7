"""The request that the body of a chat completion describes."""

from __future__ import annotations

from typing import Any

from keye_jax.engine.openai.asked import Asked
from keye_jax.engine.openai.fields import (
    SAMPLING_FIELDS,
    limit_names,
    read_fields,
    read_stream,
    read_text,
    read_top_logprobs,
    wrong,
)
from keye_jax.engine.openai.grammars import read_grammar
from keye_jax.engine.openai.read_request import MEDIA_FIELDS, read_request
from keye_jax.runtime.sampling import SamplingParams

_LIMITS = ("max_tokens", "max_completion_tokens")
_KNOWN = (
    *("messages", "model", "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", *MEDIA_FIELDS),
    *(*SAMPLING_FIELDS, *_LIMITS, "n", "stop", "logit_bias", "logprobs", "top_logprobs", "response_format", "grammar"),
    *("thinking_budget", "reasoning_effort", "selection_heat", "modalities", "stream", "stream_options"),
)
# Fields that clients send and that change no answer.
_UNUSED = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "prediction", "verbosity"),
    )
)


def read_chat(body: Any, *, sampling: SamplingParams, max_tokens: int | None = None, batch: bool = False) -> Asked:
    """The request that the body of a chat completion describes.

    Messages and options of media are checked when the prompt is planned. A field that is null is not set.

    Besides OpenAI's fields a body may have `top_k`, `min_p`, `repetition_penalty`, `chat_template_kwargs`,
    `media_io_kwargs`, `mm_processor_kwargs`, `grammar` (see `read_grammar`), `thinking_budget` (most tokens of the
    thoughts) and `selection_heat` (whether the answer says what it looked at). `reasoning_effort` "none" switches
    thoughts off; its other values change nothing.

    Args:
      body: the fields of the body, those of `extra_body` among them or in it.
      sampling, max_tokens: what applies where the body says nothing.
      batch: whether it is a line of a batch, which nobody watches: unknown fields and a stream are refused.

    Raises:
      UserError: the body is not an object, or a field of it has a wrong value.
    """
    fields, ignored = read_fields(body, _KNOWN, _UNUSED, refuse=batch)
    stream, include_usage = read_stream(fields)
    if batch and stream:
        raise wrong("stream", True, "false here")
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", messages, "a list of at least one message")
    if fields.get("modalities", ["text"]) != ["text"]:
        raise wrong("modalities", fields["modalities"], "['text']")
    effort = read_text(fields, "reasoning_effort")
    request = read_request(
        fields,
        messages,
        limits=_LIMITS,
        effort=effort,
        grammar=read_grammar(fields),
        top_logprobs=read_top_logprobs(fields),
        sampling=sampling,
        max_tokens=max_tokens,
    )
    if effort not in ("", "none"):
        ignored = tuple(sorted((*ignored, "reasoning_effort")))
    names = limit_names(fields, _LIMITS)
    return Asked((request,), read_text(fields, "model"), stream, include_usage, ignored, names=names)
