"""The requests that the body of a text completion describes."""

from __future__ import annotations

from typing import Any

from keye_jax.engine.openai.asked import Asked
from keye_jax.engine.openai.fields import (
    SAMPLING_FIELDS,
    limit_names,
    read_fields,
    read_flag,
    read_integer,
    read_logit_bias,
    read_max_tokens,
    read_sampling,
    read_stop,
    read_stream,
    read_text,
    wrong,
)
from keye_jax.engine.openai.grammars import read_grammar
from keye_jax.engine.request import MAX_CHOICES, MAX_TOP_LOGPROBS, Request
from keye_jax.errors import UserError
from keye_jax.runtime.sampling import SamplingParams

MAX_PROMPTS = 128
DEFAULT_TOKENS = 16
"""Most tokens of a text completion that does not say, as OpenAI has it."""

_LIMITS = ("max_tokens", "max_completion_tokens")
_KNOWN = (
    *("prompt", "model", *SAMPLING_FIELDS, *_LIMITS, "n", "best_of", "stop", "logit_bias", "logprobs", "echo"),
    *("suffix", "response_format", "grammar", "stream", "stream_options"),
)
_UNUSED = frozenset(("user", "metadata", "service_tier"))


def read_completion(body: Any, *, sampling: SamplingParams, max_tokens: int | None = None) -> Asked:
    """The requests that the body of a text completion describes: one for each prompt.

    `prompt` is a text, a list of token ids, or a list of texts or of lists of token ids. No text becomes a control
    token. `echo` and `suffix` are refused.

    Args:
      body: the fields of the body, those of `extra_body` among them or in it.
      sampling, max_tokens: what applies where the body says nothing; without `max_tokens` it is `DEFAULT_TOKENS`.

    Raises:
      UserError: the body is not an object, or a field of it has a wrong value.
    """
    fields, ignored = read_fields(body, _KNOWN, _UNUSED, refuse=False)
    stream, include_usage = read_stream(fields)
    if read_flag(fields, "echo"):
        raise wrong("echo", True, "false; the answer does not repeat the prompt here")
    if read_text(fields, "suffix"):
        raise wrong("suffix", fields["suffix"], "left out; the model does not fill in")
    n = read_integer(fields, "n", 1, MAX_CHOICES, 1)
    if (best_of := read_integer(fields, "best_of", 1, MAX_CHOICES, n)) != n:
        raise UserError(f"best_of is {best_of}; it must be n, {n}, or left out", field="best_of")
    count = read_integer(fields, "logprobs", 0, MAX_TOP_LOGPROBS, 0) if "logprobs" in fields else None
    prompts = _prompts(fields.get("prompt"))
    common: dict[str, Any] = {
        "sampling": read_sampling(fields, sampling),
        "max_tokens": read_max_tokens(fields, _LIMITS, max_tokens or DEFAULT_TOKENS),
        "n": n,
        "stop": read_stop(fields.get("stop")),
        "logit_bias": read_logit_bias(fields.get("logit_bias")),
        "top_logprobs": count,
        "grammar": read_grammar(fields),
    }
    requests = tuple(Request(prompt=prompt, **common) for prompt in prompts)
    names = limit_names(fields, _LIMITS)
    return Asked(requests, read_text(fields, "model"), stream, include_usage, ignored, names=names)


def _prompts(value: Any) -> list[str | tuple[int, ...]]:
    """The prompts in the field `prompt`, each a text or token ids."""
    if isinstance(value, str) or _are_ids(value):
        value = [value]
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PROMPTS:
        raise wrong("prompt", value, f"a text, a list of token ids, or a list of at most {MAX_PROMPTS} of either")
    prompts: list[str | tuple[int, ...]] = []
    for index, prompt in enumerate(value):
        if not prompt or not (isinstance(prompt, str) or _are_ids(prompt)):
            raise wrong(f"prompt[{index}]" if len(value) > 1 else "prompt", prompt, "a text or token ids, not empty")
        prompts.append(prompt if isinstance(prompt, str) else tuple(prompt))
    return prompts


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 2**31 for each in value)
    )
