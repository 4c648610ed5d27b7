"""Bodies of requests: JSON that is read away from the event loop if it is long."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from keye_jax.errors import UserError, shorten
from keye_jax.processor.messages import read_json

_LONG = 1 << 18
_SHOWN_TEXT = 2000


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in the body of a request.

    Raises:
      UserError: it is not JSON, or not an object.
    """
    content = await request.body()
    shown = "the body of the request"
    value = await asyncio.to_thread(read_json, content, shown) if len(content) > _LONG else read_json(content, shown)
    if not isinstance(value, dict):
        raise UserError(f"body is {shorten(value)}; it must be an object")
    return value


def for_log(value: Any) -> Any:
    """A body for the log, with long texts, such as media, cut off."""
    if isinstance(value, Mapping):
        return {key: for_log(each) for key, each in value.items()}
    if isinstance(value, list):
        return [for_log(each) for each in value]
    if isinstance(value, str) and len(value) > _SHOWN_TEXT:
        return f"{value[:_SHOWN_TEXT]}... ({len(value):,} characters)"
    return value
