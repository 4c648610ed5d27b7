"""The request that a body of the responses interface describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keye_jax.engine.openai.asked import Asked
from keye_jax.engine.openai.fields import (
    SAMPLING_FIELDS,
    limit_names,
    read_fields,
    read_flag,
    read_integer,
    read_object,
    read_stream,
    read_text,
    wrong,
)
from keye_jax.engine.openai.grammars import read_format
from keye_jax.engine.openai.read_request import MEDIA_FIELDS, read_request
from keye_jax.engine.request import MAX_TOP_LOGPROBS, Request
from keye_jax.errors import UserError, shorten
from keye_jax.runtime.sampling import SamplingParams

_LIMITS = ("max_output_tokens",)
# Fields of what a server would have to keep or to do besides answering.
_REFUSED = ("previous_response_id", "conversation", "prompt")
_KNOWN = (
    *("input", "instructions", "model", "tools", "tool_choice", "parallel_tool_calls", "text", "reasoning"),
    *(*SAMPLING_FIELDS, *_LIMITS, "stop", "stream", "stream_options", "background", "metadata", "truncation"),
    *("include", "top_logprobs"),
    *("chat_template_kwargs", *MEDIA_FIELDS, "thinking_budget", "selection_heat", *_REFUSED),
)
_UNUSED = frozenset(
    (
        *("user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        "max_tool_calls",  # of tools that the server itself would run
    )
)
_LOGPROBS = "message.output_text.logprobs"
_MESSAGE_ROLES = ("user", "assistant", "system", "developer")
_ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")


def read_responses(body: Any, *, sampling: SamplingParams, max_tokens: int | None = None) -> Asked:
    """The request that a body of the responses interface describes.

    `input` is a text, or a list of messages, function calls, their outputs, and reasoning, which is left out. Nothing
    is kept from one request to the next, so `previous_response_id` is refused, and `store` changes nothing.

    Besides OpenAI's fields a body may have those of `read_chat` that this interface lacks, but for `grammar`. Of what
    `include` may ask for there are the log probabilities of tokens.

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
    form = text.get("format") or {}
    if not isinstance(form, Mapping):
        raise wrong("text.format", form, "an object with type")
    top_logprobs, not_included = _read_include(fields)
    messages, names = _messages(fields.get("input"), read_text(fields, "instructions"))
    request = read_request(
        fields,
        messages,
        limits=_LIMITS,
        effort=effort,
        grammar=read_format(form, "text.format"),
        top_logprobs=top_logprobs,
        sampling=sampling,
        max_tokens=max_tokens,
    )
    unused = {
        "include": not_included,
        "reasoning.effort": effort not in ("", "none"),
        "reasoning.summary": reasoning.get("summary") is not None,
        "text.verbosity": text.get("verbosity") is not None,
        "truncation": read_text(fields, "truncation", "disabled") != "disabled",
    }
    ignored = tuple(sorted((*ignored, *(name for name, is_unused in unused.items() if is_unused))))
    return Asked(
        (request,),
        read_text(fields, "model"),
        stream,
        ignored=ignored,
        echo=_echo(fields, request, form),
        names=names | limit_names(fields, _LIMITS),
    )


def _read_include(fields: Mapping[str, Any]) -> tuple[int | None, bool]:
    """`Request.top_logprobs`, and whether `include` asks for something else, which is not there."""
    wanted = fields.get("include", [])
    if not isinstance(wanted, list) or not all(isinstance(each, str) for each in wanted):
        raise wrong("include", wanted, "a list of strings")
    count = read_integer(fields, "top_logprobs", 0, MAX_TOP_LOGPROBS, 0)
    included = _LOGPROBS in wanted
    if count and not included:
        raise UserError(f"top_logprobs is {count}; include must hold {_LOGPROBS!r} beside it", field="top_logprobs")
    return count if included else None, any(each != _LOGPROBS for each in wanted)


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
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.sampling.top_p,
        "truncation": read_text(fields, "truncation", "disabled"),
    }


def _messages(value: Any, instructions: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The conversation in the shape of chat completions, and `Asked.names` of its messages."""
    messages: list[dict[str, Any]] = []
    names = {"messages": "input"}
    if instructions:
        messages.append({"role": "system", "content": instructions})
        names["messages[0]"] = names["messages[0].content"] = "instructions"
    if isinstance(value, str) and value:
        place = f"messages[{len(messages)}]"
        return [*messages, {"role": "user", "content": value}], names | {place: "input", f"{place}.content": "input"}
    if not isinstance(value, list) or not value:
        raise wrong("input", value, "a text or a list of items, not empty")
    for index, item in enumerate(value):
        field = f"input[{index}]"
        if not isinstance(item, Mapping):
            raise wrong(field, item, "an object")
        kind = item.get("type", "message")
        place = f"messages[{len(messages)}]"
        if kind == "message":
            messages.append(_message(item, field))
        elif kind == "function_call":
            function = {name: _string(item, name, field) for name in ("name", "arguments")}
            call = {"id": _string(item, "call_id", field), "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
                names[place] = field
            calls = messages[-1].setdefault("tool_calls", [])
            place = f"messages[{len(messages) - 1}].tool_calls[{len(calls)}]"
            names |= {f"{place}.function": field, f"{place}.id": f"{field}.call_id"}
            calls.append(call)
        elif kind == "function_call_output":
            output = item.get("output")
            if not isinstance(output, str | list):
                raise wrong(f"{field}.output", output, "a text or a list of parts")
            messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", field), "content": output})
            names |= {f"{place}.content": f"{field}.output", f"{place}.tool_call_id": f"{field}.call_id"}
        elif kind == "reasoning":
            continue
        else:
            raise wrong(f"{field}.type", kind, f"one of {', '.join(_ITEM_TYPES)}")
        names.setdefault(place, field)
    if not messages:
        raise UserError(f"input is {shorten(value)}; it must hold a message", field="input")
    return messages, names


def _message(item: Mapping[str, Any], field: str) -> dict[str, Any]:
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or role not in _MESSAGE_ROLES:
        raise wrong(f"{field}.role", role, f"one of {', '.join(_MESSAGE_ROLES)}")
    if not isinstance(content, str | list):
        raise wrong(f"{field}.content", content, "a text or a list of parts")
    return {"role": role, "content": content}


def _string(item: Mapping[str, Any], name: str, field: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise wrong(f"{field}.{name}", value, "a string")
    return value
