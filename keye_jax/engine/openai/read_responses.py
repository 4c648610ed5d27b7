"""The request that a body of the responses interface describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keye_jax.engine.openai.asked import Asked
from keye_jax.engine.openai.fields import (
    SAMPLING_FIELDS,
    read_fields,
    read_flag,
    read_max_tokens,
    read_object,
    read_sampling,
    read_stop,
    read_stream,
    read_text,
    read_thinking,
    wrong,
)
from keye_jax.engine.openai.grammars import read_format
from keye_jax.engine.openai.tools import read_tool_use
from keye_jax.engine.request import Request
from keye_jax.errors import UserError, shorten
from keye_jax.runtime.sampling import SamplingParams

_MEDIA_FIELDS = ("media_io_kwargs", "mm_processor_kwargs")
_LIMITS = ("max_output_tokens",)
# Fields of what a server would have to keep or to do besides answering.
_REFUSED = ("previous_response_id", "conversation", "prompt")
_KNOWN = (
    *("input", "instructions", "model", "tools", "tool_choice", "parallel_tool_calls", "text", "reasoning"),
    *(*SAMPLING_FIELDS, *_LIMITS, "stop", "stream", "stream_options", "background", "metadata", "truncation"),
    *("chat_template_kwargs", *_MEDIA_FIELDS, "thinking_budget", "selection_heat", *_REFUSED),
)
_UNUSED = frozenset(
    (
        *("user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("include", "max_tool_calls"),
    )
)
_MESSAGE_ROLES = ("user", "assistant", "system", "developer")
_ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")


def read_responses(body: Any, *, sampling: SamplingParams, max_tokens: int | None = None) -> Asked:
    """The request that a body of the responses interface describes.

    `input` is a text, or a list of messages, function calls, their outputs, and reasoning, which is left out. Nothing
    is kept from one request to the next, so `previous_response_id` is refused, and `store` changes nothing.

    Besides OpenAI's fields a body may have those of `read_chat` that this interface lacks, but for `grammar`.

    Args:
      body: the fields of the body, those of `extra_body` among them or in it.
      sampling, max_tokens: what applies where the body says nothing.

    Raises:
      UserError: the body is not an object, or a field of it has a wrong value.
    """
    fields, ignored = read_fields(body, _KNOWN, _UNUSED, refuse=False)
    for name in _REFUSED:
        if name in fields:
            raise wrong(name, fields[name], "left out; this server keeps no responses, so input must have all of them")
    if read_flag(fields, "background"):
        raise wrong("background", True, "false")
    stream, _ = read_stream(fields)
    text, reasoning = read_object(fields, "text"), read_object(fields, "reasoning")
    effort = read_text(reasoning, "effort", path="reasoning.effort")
    variables, budget = read_thinking(fields, effort)
    form = text.get("format") or {}
    if not isinstance(form, Mapping):
        raise wrong("text.format", form, "an object with type")
    use = read_tool_use(fields, read_format(form, "text.format"))
    options = {name: fields[name] for name in _MEDIA_FIELDS if name in fields}
    if variables:
        options["chat_template_kwargs"] = variables
    if use.tools:
        options["tools"] = list(use.tools)
    request = Request(
        messages=_messages(fields.get("input"), read_text(fields, "instructions")),
        options=options,
        sampling=read_sampling(fields, sampling),
        max_tokens=read_max_tokens(fields, _LIMITS, max_tokens),
        stop=read_stop(fields.get("stop")),
        grammar=use.grammar,
        thinking_budget=budget,
        selection_heat=read_flag(fields, "selection_heat"),
        tool_names=use.names,
        max_tool_calls=use.most,
    )
    if effort not in ("", "none"):
        ignored = tuple(sorted((*ignored, "reasoning.effort")))
    return Asked((request,), read_text(fields, "model"), stream, ignored=ignored, echo=_echo(fields, request, form))


def _echo(fields: Mapping[str, Any], request: Request, form: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the body that the answer repeats, with what applies where the body says nothing."""
    assert request.sampling is not None, "it was read"
    tools = [
        {"type": "function", "strict": None, **tool.get("function", {}), **tool} for tool in fields.get("tools", ())
    ]
    choice = fields.get("tool_choice", "auto")
    return {
        "instructions": fields.get("instructions"),
        "metadata": dict(read_object(fields, "metadata")),
        "max_output_tokens": request.max_tokens,
        "parallel_tool_calls": read_flag(fields, "parallel_tool_calls", True),
        "reasoning": {"effort": None, "summary": None, **read_object(fields, "reasoning")},
        "temperature": request.sampling.temperature,
        "text": {"format": {"type": "text"}, **read_object(fields, "text"), **({"format": form} if form else {})},
        "tool_choice": choice,
        "tools": [{name: item for name, item in tool.items() if name != "function"} for tool in tools],
        "top_p": request.sampling.top_p,
        "truncation": read_text(fields, "truncation", "disabled"),
    }


def _messages(value: Any, instructions: str) -> list[dict[str, Any]]:
    """The conversation in the shape of chat completions."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(value, str) and value:
        return [*messages, {"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise wrong("input", value, "a text or a list of items, not empty")
    for index, item in enumerate(value):
        field = f"input[{index}]"
        if not isinstance(item, Mapping):
            raise wrong(field, item, "an object")
        kind = item.get("type", "message")
        if kind == "message":
            messages.append(_message(item, field))
        elif kind == "function_call":
            call = {"id": _string(item, "call_id", field), "type": "function"}
            function = {name: _string(item, name, field) for name in ("name", "arguments")}
            _assistant(messages).setdefault("tool_calls", []).append({**call, "function": function})
        elif kind == "function_call_output":
            output = item.get("output")
            if not isinstance(output, str | list):
                raise wrong(f"{field}.output", output, "a text or a list of parts")
            messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", field), "content": output})
        elif kind != "reasoning":
            raise wrong(f"{field}.type", kind, f"one of {', '.join(_ITEM_TYPES)}")
    if not messages:
        raise UserError(f"input is {shorten(value)}; it must hold a message", field="input")
    return messages


def _message(item: Mapping[str, Any], field: str) -> dict[str, Any]:
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or role not in _MESSAGE_ROLES:
        raise wrong(f"{field}.role", role, f"one of {', '.join(_MESSAGE_ROLES)}")
    if not isinstance(content, str | list):
        raise wrong(f"{field}.content", content, "a text or a list of parts")
    return {"role": role, "content": content}


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message at the end, to which calls belong; it is added if there is none."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _string(item: Mapping[str, Any], name: str, field: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise wrong(f"{field}.{name}", value, "a string")
    return value
