"""The responses interface: whole bodies, and streams of events."""

from __future__ import annotations

import copy
from typing import Any

from keye_jax.engine.openai.asked import Asked
from keye_jax.engine.openai.errors import error_body
from keye_jax.engine.openai.shared import heat_body
from keye_jax.engine.request import Choice, Event, Piece, RequestError, Result, TextPart, ToolCall, Usage


def response_body(result: Result, asked: Asked, *, created: int, model: str) -> dict[str, Any]:
    """The body of a response. Its `id` follows from the request's.

    Reasoning, messages and function calls are items of `output`, in the order in which the model wrote them.

    Args:
      result: with one choice.
      asked: what was asked for.
      created: seconds since 1970.
      model: the name of the model.

    Returns:
      An object for JSON. Besides OpenAI's fields it has `selection_heat` if that was asked for, and `warnings` about
      media if there are any.
    """
    [choice] = result.choices
    parts = choice.parts
    if parts is None:
        texts = (TextPart(choice.reasoning, True), TextPart(choice.text))
        parts = (*(text for text in texts if text.text), *choice.tool_calls)
    output = [_item(asked, place, part) for place, part in enumerate(parts)]
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


def _item(asked: Asked, place: int, part: TextPart | ToolCall) -> dict[str, Any]:
    """The item of a part, whole. Its id follows from the request and its place in `output`."""
    name = f"{asked.request.id}_{place}"
    if isinstance(part, ToolCall):
        call = {"id": f"fc_{name}", "type": "function_call", "call_id": part.id, "name": part.name}
        return {**call, "arguments": part.arguments, "status": "completed"}
    content = [_content(part)]
    if part.reasoning:
        return {"id": f"rs_{name}", "type": "reasoning", "summary": [], "content": content, "status": "completed"}
    return {"id": f"msg_{name}", "type": "message", "role": "assistant", "content": content, "status": "completed"}


def _content(part: TextPart) -> dict[str, Any]:
    if part.reasoning:
        return {"type": "reasoning_text", "text": part.text}
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}


class ResponseStream:
    """The events of a response as it comes. The last one has the whole body, that of `response_body`.

    Args:
      asked, created, model: as for `response_body`.
    """

    def __init__(self, asked: Asked, *, created: int, model: str):
        self._asked, self._created, self._model = asked, created, model
        self._sent = 0
        # The items so far. The last one is open as long as pieces of it may come.
        self._parts: list[TextPart | ToolCall] = []
        self._output: list[dict[str, Any]] = []
        self._written: list[str] = []
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
            text = event.text
        else:
            part = ToolCall(event.id, event.name or "", "")
            begins, text = event.name is not None, event.arguments
        events = self._begin(part) if begins else []
        return [*events, *self._delta(text)]

    def _begin(self, part: TextPart | ToolCall) -> list[dict[str, Any]]:
        """Closes the item that is open, and opens one."""
        events = self._close("completed")
        self._parts.append(part)
        self._open, self._written = True, []
        item = {**_item(self._asked, self._place, part), "status": "in_progress"}
        if isinstance(part, TextPart):
            item["content"] = []
        self._output.append(item)
        events.append(self._event("response.output_item.added", output_index=self._place, item=dict(item)))
        if isinstance(part, TextPart):
            events.append(self._within("response.content_part.added", content_index=0, part=_content(part)))
        return events

    def _delta(self, text: str) -> list[dict[str, Any]]:
        if not text:
            return []
        self._written.append(text)
        part = self._parts[-1]
        if isinstance(part, ToolCall):
            return [self._within("response.function_call_arguments.delta", delta=text)]
        if part.reasoning:
            return [self._within("response.reasoning_text.delta", content_index=0, delta=text)]
        return [self._within("response.output_text.delta", content_index=0, delta=text, logprobs=[])]

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
            whole = TextPart(text, part.reasoning)
            kind, more = ("reasoning_text", {}) if part.reasoning else ("output_text", {"logprobs": []})
            events = [
                self._within(f"response.{kind}.done", content_index=0, text=text, **more),
                self._within("response.content_part.done", content_index=0, part=_content(whole)),
            ]
        self._output[-1] = {**_item(self._asked, self._place, whole), "status": status}
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
