"""The OpenAI chat interface: a request from the body of a chat completion, and a body from a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from keye_jax.engine.request import MAX_CHOICES, MAX_STOPS, MAX_TOP_LOGPROBS, Choice, Request, Result, TokenLogprob
from keye_jax.errors import UserError, shorten, shorten_name
from keye_jax.runtime.sampling import SamplingParams

MAX_BIAS = 100.0
# Stands for minus infinity, which JSON does not have.
LOWEST_LOGPROB = -9999.0
_MAX_COUNT = 10**9
_MAX_SEED = 2**64

_PLAN_FIELDS = ("tools", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs")
_SAMPLING_FIELDS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_KNOWN = (
    *("messages", "model", *_PLAN_FIELDS, "tool_choice", *_SAMPLING_FIELDS, "top_k", "seed", "max_tokens"),
    *("max_completion_tokens", "n", "stop", "logit_bias", "logprobs", "top_logprobs", "response_format", "modalities"),
    *("stream", "extra_body"),
)
# Fields that clients send and that change no answer.
_IGNORED = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "prediction", "parallel_tool_calls", "stream_options"),
    )
)


def read_body(body: Any, *, sampling: SamplingParams, max_tokens: int | None = None) -> Request:
    """The request that the body of a chat completion describes.

    Messages, tools and options of media are checked when the prompt is planned. A field that is null is not set.
    `stream` is accepted if it is false; a caller that streams takes it out before.

    Args:
      body: the fields of the body, those of `extra_body` among them or in it.
      sampling, max_tokens: what applies where the body says nothing.

    Raises:
      UserError: the body is not an object, or a field of it is unknown or has a wrong value.
    """
    if not isinstance(body, Mapping):
        raise UserError(f"body is {shorten(body)}; it must be an object")
    extra = body.get("extra_body")
    if extra is not None and not isinstance(extra, Mapping):
        raise UserError(f"extra_body is {shorten(extra)}; it must be an object")
    fields = {name: value for name, value in {**body, **(extra or {})}.items() if value is not None}
    for name in fields:
        if name not in _KNOWN and name not in _IGNORED:
            raise UserError(f"{shorten_name(name)} is not known; a field must be one of {', '.join(_KNOWN)}")
    _check_fixed(fields)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages is {shorten(messages)}; it must be a list of at least one message")
    options = {name: fields[name] for name in _PLAN_FIELDS if name in fields}
    if fields.get("tool_choice") == "none":
        options.pop("tools", None)
    return Request(
        messages=messages,
        options=options,
        sampling=_sampling(fields, sampling),
        max_tokens=_max_tokens(fields, max_tokens),
        n=_integer(fields, "n", 1, MAX_CHOICES, 1),
        stop=_stop(fields.get("stop")),
        logit_bias=_logit_bias(fields.get("logit_bias")),
        top_logprobs=_top_logprobs(fields),
    )


def _check_fixed(fields: Mapping[str, Any]) -> None:
    """Refuses values of fields that have only one or two here."""
    model = fields.get("model", "")
    if not isinstance(model, str):
        raise UserError(f"model is {shorten(model)}; it must be a string")
    if fields.get("stream", False) is not False:
        raise UserError(f"stream is {shorten(fields['stream'])}; it must be false here")
    choice = fields.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise UserError(f"tool_choice is {shorten(choice)}; it must be 'auto' or 'none'")
    form = fields.get("response_format", {"type": "text"})
    if form != {"type": "text"}:
        raise UserError(f"response_format is {shorten(form)}; it must be an object with the type 'text'")
    modalities = fields.get("modalities", ["text"])
    if modalities != ["text"]:
        raise UserError(f"modalities is {shorten(modalities)}; it must be ['text']")


def _sampling(fields: Mapping[str, Any], sampling: SamplingParams) -> SamplingParams:
    chosen: dict[str, Any] = {name: _number(fields[name], name) for name in _SAMPLING_FIELDS if name in fields}
    if "top_k" in fields:
        # Other engines write -1 for all tokens.
        chosen["top_k"] = max(0, _integer(fields, "top_k", -1, _MAX_COUNT, 0))
    if "seed" in fields:
        chosen["seed"] = _integer(fields, "seed", -_MAX_SEED, _MAX_SEED, 0)
    return dataclasses.replace(sampling, **chosen)


def _max_tokens(fields: Mapping[str, Any], default: int | None) -> int | None:
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in fields]
    values = [_integer(fields, name, 1, _MAX_COUNT, 1) for name in names]
    if len(set(values)) > 1:
        raise UserError(f"max_completion_tokens is {values[1]}; it must be max_tokens, {values[0]}, if both are given")
    return values[0] if values else default


def _stop(value: Any) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MAX_STOPS or not all(isinstance(x, str) and x for x in texts):
        raise UserError(
            f"stop is {shorten(value)}; it must be a string, or at most {MAX_STOPS}, and none of them empty"
        )
    return tuple(texts)


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"logit_bias is {shorten(value)}; it must be an object with token ids as keys")
    biases = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise UserError(f"logit_bias has the key {shorten(token)}; a key must be a token id")
        name = f"logit_bias.{token}"
        number = _number(bias, name)
        if not -MAX_BIAS <= number <= MAX_BIAS:
            raise UserError(f"{name} is {shorten(bias)}; it must be from {-MAX_BIAS:g} to {MAX_BIAS:g}")
        biases[int(token)] = number
    return biases


def _top_logprobs(fields: Mapping[str, Any]) -> int | None:
    wanted = fields.get("logprobs", False)
    if not isinstance(wanted, bool):
        raise UserError(f"logprobs is {shorten(wanted)}; it must be true or false")
    count = _integer(fields, "top_logprobs", 0, MAX_TOP_LOGPROBS, 0)
    if count and not wanted:
        raise UserError(f"top_logprobs is {count}; logprobs must be true beside it")
    return count if wanted else None


def _number(value: Any, name: str) -> float:
    # An integer of any length is compared without harm, and an undefined number fails the comparison.
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e30 <= value <= 1e30:
        raise UserError(f"{name} is {shorten(value)}; it must be a number")
    return float(value)


def _integer(fields: Mapping[str, Any], name: str, low: int, high: int, default: int) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high or value != int(value):
        raise UserError(f"{name} is {shorten(value)}; it must be an integer from {low} to {high}")
    return int(value)


def completion_body(
    result: Result, *, completion_id: str, created: int, model: str, token_text: Callable[[int], str]
) -> dict[str, Any]:
    """The body of a chat completion.

    Args:
      completion_id: its `id`.
      created: seconds since 1970.
      model: the name of the model.
      token_text: the text of one token, for log probabilities.

    Returns:
      An object for JSON. Besides OpenAI's fields a message has its reasoning, under both names that clients look for,
      and the body has `warnings` about media if there are any.
    """
    usage = result.usage
    body: dict[str, Any] = {
        "id": completion_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [_choice(index, choice, token_text) for index, choice in enumerate(result.choices)],
        "usage": {
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
        },
    }
    if result.warnings:
        body["warnings"] = list(result.warnings)
    return body


def _choice(index: int, choice: Choice, token_text: Callable[[int], str]) -> dict[str, Any]:
    reasoning = choice.reasoning or None
    logprobs = choice.logprobs
    return {
        "index": index,
        "message": {
            "role": "assistant",
            "content": choice.text,
            "reasoning_content": reasoning,
            "reasoning": reasoning,
        },
        "logprobs": None if logprobs is None else {"content": [_logprob(each, token_text) for each in logprobs]},
        "finish_reason": choice.finish_reason,
    }


def _logprob(value: TokenLogprob, token_text: Callable[[int], str]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(token)
        # A token may be a part of a character, whose bytes the text does not tell.
        known = "\ufffd" not in text
        return {
            "token": text,
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": list(text.encode("utf-8", "surrogatepass")) if known else None,
        }

    top = [entry(token, logprob) for token, logprob in value.top]
    return {**entry(value.token, value.logprob), "top_logprobs": top}
