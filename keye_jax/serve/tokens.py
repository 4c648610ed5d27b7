"""Token ids of a text or of a conversation, and back, in vLLM's shape."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from keye_jax.errors import UserError, shorten
from keye_jax.processor.messages import check_messages
from keye_jax.serve.bodies import read_object
from keye_jax.serve.errors import json_response
from keye_jax.serve.service import Service

_PLAN_FIELDS = ("tools", "chat_template_kwargs")


async def tokenize(request: Request) -> Response:
    """The ids of `prompt`, a text that never becomes a control token, or of `messages`, without media."""
    service: Service = request.app.state.service
    service.check_ready()
    body = await read_object(request)
    ids, strings = await asyncio.to_thread(_tokens, service, body)
    length = service.engine.scheduler_config.most_tokens
    return json_response({"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": strings})


def _tokens(service: Service, body: dict[str, Any]) -> tuple[list[int], list[str] | None]:
    """The ids, and their texts if these are asked for."""
    ids = _ids(service, body)
    return ids, [service.token_text(token) for token in ids] if body.get("return_token_strs") is True else None


def _ids(service: Service, body: dict[str, Any]) -> list[int]:
    processor = service.engine.processor
    if (body.get("prompt") is None) == (body.get("messages") is None):
        raise UserError("prompt or messages must be given, and not both")
    if body.get("messages") is None:
        prompt = body["prompt"]
        if not isinstance(prompt, str):
            raise UserError(f"prompt is {shorten(prompt)}; it must be a string", field="prompt")
        return list(processor.plan_raw(prompt).prompt_ids)
    if check_messages(body["messages"])[1]:
        raise UserError("messages have images or videos; only texts are counted here", field="messages")
    options = {name: body[name] for name in _PLAN_FIELDS if body.get(name) is not None}
    with processor.plan(body["messages"], **options) as plan:
        return list(plan.prompt_ids)


async def detokenize(request: Request) -> Response:
    """The text of `tokens`, control tokens too."""
    service: Service = request.app.state.service
    service.check_ready()
    body = await read_object(request)
    ids, vocabulary = body.get("tokens"), service.engine.runtime.config.vocab_size
    if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < vocabulary for each in ids):
        message = f"tokens is {shorten(ids)}; it must be a list of integers from 0 to {vocabulary - 1}"
        raise UserError(message, field="tokens")
    text = await asyncio.to_thread(service.engine.processor.detokenize, ids, skip_special_tokens=False)
    return json_response({"prompt": text})
