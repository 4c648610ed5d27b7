"""The request of a conversation, from the fields that chat completions and the responses interface share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from keye_jax.engine.openai.fields import (
    read_flag,
    read_integer,
    read_logit_bias,
    read_max_tokens,
    read_sampling,
    read_stop,
    read_thinking,
)
from keye_jax.engine.openai.tools import read_tool_use
from keye_jax.engine.request import MAX_CHOICES, Request
from keye_jax.runtime.sampling import SamplingParams

MEDIA_FIELDS = ("media_io_kwargs", "mm_processor_kwargs")


def read_request(
    fields: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    *,
    limits: Collection[str],
    effort: str,
    grammar: str | None,
    top_logprobs: int | None,
    sampling: SamplingParams,
    max_tokens: int | None,
) -> Request:
    """The request of a conversation.

    Args:
      fields: those of the body that are known to its interface and set.
      messages: the conversation in the shape of chat completions.
      limits: the names that the limit on an answer's tokens has.
      effort: of reasoning.
      grammar: of the answer's text; None for any text.
      top_logprobs: as in `Request`.
      sampling, max_tokens: what applies where the body says nothing.

    Raises:
      UserError: a field has a wrong value.
    """
    variables, budget = read_thinking(fields, effort)
    use = read_tool_use(fields, grammar)
    options = {name: fields[name] for name in MEDIA_FIELDS if name in fields}
    if variables:
        options["chat_template_kwargs"] = variables
    if use.tools:
        options["tools"] = list(use.tools)
    return Request(
        messages=messages,
        options=options,
        sampling=read_sampling(fields, sampling),
        max_tokens=read_max_tokens(fields, limits, max_tokens),
        n=read_integer(fields, "n", 1, MAX_CHOICES, 1),
        stop=read_stop(fields.get("stop")),
        logit_bias=read_logit_bias(fields.get("logit_bias")),
        top_logprobs=top_logprobs,
        grammar=use.grammar,
        thinking_budget=budget,
        selection_heat=read_flag(fields, "selection_heat"),
        tool_names=use.names,
        max_tool_calls=use.most,
    )
