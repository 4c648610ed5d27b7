"""The responses interface: whole bodies, and streams of events."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from keye_jax.engine.openai.asked import Asked
from keye_jax.engine.openai.errors import error_body
from keye_jax.engine.openai.shared import TokenText, chat_logprobs, heat_body
from keye_jax.engine.request import (
    Choice,
    Event,
    Piece,
    RequestError,
    Result,
    TextPart,
    TokenLogprob,
    ToolCall,
    Usage,
)


def response_body(result: Result, asked: Asked, *, created: int, model: str, token_text: TokenText) -> dict[str, Any]:
    """The body of a response. Its `id` follows from the request's.

    Reasoning, messages and function calls are items of `output`, in the order in which the model wrote them.

    Args:
      result: with one choice.
      asked: what was asked for.
      created: seconds since 1970.
      model: the name of the model.
      token_text: the text of one token, for log probabilities.

    Returns:
      An object for JSON. Besides OpenAI's fields it has `selection_heat` if that was asked for, and `warnings` about
      media if there are any.
    """
    [choice] = result.choices
    parts = choice.parts
    if parts is None:
        texts = (TextPart(choice.reasoning, True), TextPart(choice.text))
        parts = (*(text for text in texts if text.text), *choice.tool_calls)
    output = [_item(asked, place, part, token_text) for place, part in enumerate(parts)]
    if output and _is_cut(choice):
        output[-1]["status"] = "incomplete"
    return _body(asked, created, model, "in_progress") | _end(choice, result) | {"output": output}


def _body(asked: Asked, created: int, model: str, status: str) -> dict[str, Any]:
    return {
        "id": f"resp_{asked.request.id}",
        "object": "response",
        "created_at": created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "previous_response_id": None,
        "store": False,
        "usage": None,
        **asked.echo,
    }


def _is_cut(choice: Choice) -> bool:
    return choice.finish_reason in ("length", "cancelled")


def _end(choice: Choice, result: Result) -> dict[str, Any]:
    """The fields of a body that only its end knows."""
    cut = _is_cut(choice)
    body: dict[str, Any] = {
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "usage": _usage(result.usage),
    }
    if choice.selection_heat is not None:
        body["selection_heat"] = heat_body(choice.selection_heat)
    if result.warnings:
        body["warnings"] = list(result.warnings)
    return body


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {
            "cached_tokens": usage.cached,
            "cache_write_tokens": 0,
            "image_tokens": usage.image,
            "video_tokens": usage.video,
            "text_tokens": usage.prompt - usage.image - usage.video,
        },
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def _item(asked: Asked, place: int, part: TextPart | ToolCall, token_text: TokenText) -> dict[str, Any]:
    """The item of a part, whole. Its id follows from the request and its place in `output`."""
    name = f"{asked.request.id}_{place}"
    if isinstance(part, ToolCall):
        call = {"id": f"fc_{name}", "type": "function_call", "call_id": part.id, "name": part.name}
        return {**call, "arguments": part.arguments, "status": "completed"}
    content = [_content(part, token_text)]
    if part.reasoning:
        return {"id": f"rs_{name}", "type": "reasoning", "summary": [], "content": content, "status": "completed"}
    return {"id": f"msg_{name}", "type": "message", "role": "assistant", "content": content, "status": "completed"}


def _content(part: TextPart, token_text: TokenText) -> dict[str, Any]:
    if part.reasoning:
        return {"type": "reasoning_text", "text": part.text}
    logprobs = _logprobs(part.logprobs, token_text)
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": logprobs}


def _logprobs(values: Iterable[TokenLogprob], token_text: TokenText) -> list[dict[str, Any]]:
    """Those of tokens that are in the text. Bytes that are not known are none: this interface has no null for them."""
    entries = chat_logprobs([value for value in values if value.in_text], token_text)["content"]
    return [
        {
            **entry,
            "bytes": entry["bytes"] or [],
            "top_logprobs": [{**other, "bytes": other["bytes"] or []} for other in entry["top_logprobs"]],
        }
        for entry in entries
    ]


class ResponseStream:
    """The events of a response as it comes. The last one has the whole body, that of `response_body`.

    Args:
      asked, created, model, token_text: as for `response_body`.
    """

    def __init__(self, asked: Asked, *, created: int, model: str, token_text: TokenText):
        self._asked, self._created, self._model, self._token_text = asked, created, model, token_text
        self._sent = 0
        # The items so far. The last one is open as long as pieces of it may come.
        self._parts: list[TextPart | ToolCall] = []
        self._output: list[dict[str, Any]] = []
        self._written: list[str] = []
        self._logprobs: list[TokenLogprob] = []  # of the text that is open
        self._open = False

    def start(self) -> list[dict[str, Any]]:
        """The events before the first piece."""
        body = _body(self._asked, self._created, self._model, "in_progress")
        return [self._event(f"response.{name}", response=copy.deepcopy(body)) for name in ("created", "in_progress")]

    def take(self, event: Event) -> list[dict[str, Any]]:
        """The events to send for an event of the engine. A result or an error ends the stream."""
        if isinstance(event, RequestError):
            error = error_body(event)[1]["error"]
            status = {"status": "failed", "error": {"code": "server_error", "message": error["message"]}}
            body = _body(self._asked, self._created, self._model, "failed") | status | {"output": self._output}
            return [self._event("response.failed", response=body)]
        if isinstance(event, Result):
            [choice] = event.choices
            events = self._close("incomplete" if _is_cut(choice) else "completed")
            body = _body(self._asked, self._created, self._model, "in_progress") | _end(choice, event)
            name = "incomplete" if _is_cut(choice) else "completed"
            return [*events, self._event(f"response.{name}", response={**body, "output": self._output})]
        if isinstance(event, Piece):
            part: TextPart | ToolCall = TextPart("", event.reasoning)
            begins = not self._open or self._parts[-1] != part
            text, logprobs = event.text, [each for each in event.logprobs if each.in_text]
        else:
            part = ToolCall(event.id, event.name or "", "")
            begins, text, logprobs = event.name is not None, event.arguments, []
        events = self._begin(part) if begins else []
        return [*events, *self._delta(text, logprobs)]

    def _begin(self, part: TextPart | ToolCall) -> list[dict[str, Any]]:
        """Closes the item that is open, and opens one."""
        events = self._close("completed")
        self._parts.append(part)
        self._open, self._written, self._logprobs = True, [], []
        item = {**_item(self._asked, self._place, part, self._token_text), "status": "in_progress"}
        if isinstance(part, TextPart):
            item["content"] = []
        self._output.append(item)
        events.append(self._event("response.output_item.added", output_index=self._place, item=dict(item)))
        if isinstance(part, TextPart):
            shown = _content(part, self._token_text)
            events.append(self._within("response.content_part.added", content_index=0, part=shown))
        return events

    def _delta(self, text: str, logprobs: list[TokenLogprob]) -> list[dict[str, Any]]:
        if not text:
            return []
        self._written.append(text)
        self._logprobs += logprobs
        part = self._parts[-1]
        if isinstance(part, ToolCall):
            return [self._within("response.function_call_arguments.delta", delta=text)]
        if part.reasoning:
            return [self._within("response.reasoning_text.delta", content_index=0, delta=text)]
        shown = _logprobs(logprobs, self._token_text)
        return [self._within("response.output_text.delta", content_index=0, delta=text, logprobs=shown)]

    def _close(self, status: str) -> list[dict[str, Any]]:
        """Closes the item that is open, if there is one."""
        if not self._open:
            return []
        self._open = False
        part, text = self._parts[-1], "".join(self._written)
        if isinstance(part, ToolCall):
            whole: TextPart | ToolCall = ToolCall(part.id, part.name, text)
            done = {"name": part.name, "arguments": text}
            events = [self._within("response.function_call_arguments.done", **done)]
        else:
            whole = TextPart(text, part.reasoning, tuple(self._logprobs))
            shown = _content(whole, self._token_text)
            kind, more = "reasoning_text", {}
            if not part.reasoning:
                kind, more = "output_text", {"logprobs": shown["logprobs"]}
            events = [
                self._within(f"response.{kind}.done", content_index=0, text=text, **more),
                self._within("response.content_part.done", content_index=0, part=shown),
            ]
        self._output[-1] = {**_item(self._asked, self._place, whole, self._token_text), "status": status}
        done = self._event("response.output_item.done", output_index=self._place, item=self._output[-1])
        return [*events, done]

    @property
    def _place(self) -> int:
        return len(self._parts) - 1

    def _within(self, kind: str, **fields: Any) -> dict[str, Any]:
        """An event of the item that is open."""
        return self._event(kind, item_id=self._output[-1]["id"], output_index=self._place, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._sent = self._sent, self._sent + 1
        return {"type": kind, "sequence_number": number, **fields}
