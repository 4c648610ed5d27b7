"""Fields that the bodies of several interfaces have: how they are checked, and what they mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from keye_jax.engine.request import MAX_STOPS, MAX_TOP_LOGPROBS
from keye_jax.errors import UserError, shorten, shorten_name
from keye_jax.runtime.sampling import SamplingParams

MAX_BIAS = 100.0
MAX_COUNT = 10**9
_MAX_SEED = 2**64
SAMPLING_FIELDS = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("top_k", "seed"),
)


def wrong(field: str, value: Any, allowed: str) -> UserError:
    """The error for a wrong value: one sentence with the field, the value and what is allowed."""
    return UserError(f"{field} is {shorten(value)}; it must be {allowed}", field=field)


def read_fields(
    body: Any, known: Collection[str], unused: Collection[str], *, refuse: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of a body that are set, those of `extra_body` among them, and the names of those that are not known.

    A field that is null is not set.

    Args:
      known: fields that mean something.
      unused: fields that clients send and that change no answer; they are left out.
      refuse: whether a field that is neither is refused.

    Raises:
      UserError: the body is not an object, or a field is refused.
    """
    if not isinstance(body, Mapping):
        raise UserError(f"body is {shorten(body)}; it must be an object")
    extra = body.get("extra_body")
    if extra is not None and not isinstance(extra, Mapping):
        raise wrong("extra_body", extra, "an object")
    given = {name: value for name, value in {**body, **(extra or {})}.items() if value is not None}
    given.pop("extra_body", None)
    unknown = sorted(shorten_name(name) for name in given if name not in known and name not in unused)
    if unknown and refuse:
        allowed = ", ".join(sorted(known))
        raise UserError(f"{unknown[0]} is not known; a field must be one of {allowed}", field=unknown[0])
    return {name: value for name, value in given.items() if name in known}, tuple(unknown)


def read_sampling(fields: Mapping[str, Any], sampling: SamplingParams) -> SamplingParams:
    """How tokens are drawn; what the body does not say is as in `sampling`."""
    chosen: dict[str, Any] = {name: read_number(fields[name], name) for name in SAMPLING_FIELDS[:-2] if name in fields}
    if "top_k" in fields:
        # Other engines write -1 for all tokens.
        chosen["top_k"] = max(0, read_integer(fields, "top_k", -1, MAX_COUNT, 0))
    if "seed" in fields:
        chosen["seed"] = read_integer(fields, "seed", -_MAX_SEED, _MAX_SEED, 0)
    try:
        return dataclasses.replace(sampling, **chosen)
    except UserError as error:
        raise UserError(str(error), field=str(error).partition(" ")[0]) from error


def read_max_tokens(fields: Mapping[str, Any], names: Collection[str], default: int | None) -> int | None:
    """The limit on an answer's tokens, which has several names; all that are given must agree."""
    values = {name: read_integer(fields, name, 1, MAX_COUNT, 1) for name in names if name in fields}
    if len(set(values.values())) > 1:
        (first, one), (second, other) = list(values.items())[:2]
        raise UserError(f"{second} is {other}; it must be {first}, {one}, if both are given", field=second)
    return next(iter(values.values()), default)


def limit_names(fields: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """What the body calls `Request.max_tokens`, as `Asked.names` has it; the first of `names` if it says nothing."""
    return {"max_tokens": next((name for name in names if name in fields), next(iter(names)))}


def read_stop(value: Any) -> tuple[str, ...]:
    """Texts that end an answer: one, or a list."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MAX_STOPS or not all(isinstance(x, str) and x for x in texts):
        raise wrong("stop", value, f"a string, or at most {MAX_STOPS}, and none of them empty")
    return tuple(texts)


def read_logit_bias(value: Any) -> dict[int, float]:
    """What is added to the logits of tokens; keys are token ids as text, as JSON has them."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise wrong("logit_bias", value, "an object with token ids as keys")
    biases = {}
    for token, bias in value.items():
        if not (isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < 10):
            raise UserError(f"logit_bias has the key {shorten(token)}; a key must be a token id", field="logit_bias")
        name = f"logit_bias.{token}"
        number = read_number(bias, name)
        if not -MAX_BIAS <= number <= MAX_BIAS:
            raise wrong(name, bias, f"from {-MAX_BIAS:g} to {MAX_BIAS:g}")
        biases[int(token)] = number
    return biases


def read_top_logprobs(fields: Mapping[str, Any]) -> int | None:
    """How many log probabilities each token is to have besides its own; None for none at all."""
    wanted = read_flag(fields, "logprobs")
    count = read_integer(fields, "top_logprobs", 0, MAX_TOP_LOGPROBS, 0)
    if count and not wanted:
        raise UserError(f"top_logprobs is {count}; logprobs must be true beside it", field="top_logprobs")
    return count if wanted else None


def read_stream(fields: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a stream is wanted, and whether it ends with usage."""
    options = read_object(fields, "stream_options")
    return read_flag(fields, "stream"), read_flag(options, "include_usage", path="stream_options.include_usage")


def read_thinking(fields: Mapping[str, Any], effort: str) -> tuple[dict[str, Any], int | None]:
    """Variables of the chat template, and the most tokens of the thoughts.

    Args:
      effort: of reasoning; "none" switches thoughts off, unless `chat_template_kwargs` says otherwise.
    """
    variables = dict(read_object(fields, "chat_template_kwargs"))
    if effort == "none":
        variables.setdefault("enable_thinking", False)
    budget = read_integer(fields, "thinking_budget", 0, MAX_COUNT, 0) if "thinking_budget" in fields else None
    return variables, budget


def read_number(value: Any, name: str) -> float:
    """A number."""
    # An integer of any length is compared without harm, and an undefined number fails the comparison.
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e30 <= value <= 1e30:
        raise wrong(name, value, "a number")
    return float(value)


def read_integer(fields: Mapping[str, Any], name: str, low: int, high: int, default: int) -> int:
    """An integer from `low` to `high`."""
    value = fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high or value != int(value):
        raise wrong(name, value, f"an integer from {low} to {high}")
    return int(value)


def read_flag(fields: Mapping[str, Any], name: str, default: bool = False, *, path: str | None = None) -> bool:
    """True or false; `path` is the name in error messages, if the field lies deeper."""
    value = fields.get(name)
    if not isinstance(value, bool | None):
        raise wrong(path or name, value, "true or false")
    return default if value is None else value


def read_text(fields: Mapping[str, Any], name: str, default: str = "", *, path: str | None = None) -> str:
    """A string; `path` is as for `read_flag`."""
    value = fields.get(name)
    if not isinstance(value, str | None):
        raise wrong(path or name, value, "a string")
    return default if value is None else value


def read_object(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object; empty if it is not set."""
    value = fields.get(name)
    if not isinstance(value, Mapping | None):
        raise wrong(name, value, "an object")
    return value or {}
