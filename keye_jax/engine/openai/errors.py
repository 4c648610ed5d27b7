"""What a failure is to a client: a status of HTTP, and a body.

| failure | status | type | code |
|---|---|---|---|
| `UserError`, or kind "invalid" | 400 | invalid_request_error | invalid_value |
| kind "media": an image or a video is wrong or broken | 400 | invalid_request_error | invalid_media |
| kind "unreachable": a medium cannot be fetched for now | 400 | invalid_request_error | unreachable_media |
| kind "too_large": the request can never run here | 400 | invalid_request_error | context_length_exceeded |
| kind "cancelled": the server ended it | 503 | server_error | cancelled |
| kind "closed": the server ends | 503 | server_error | unavailable |
| kind "timeout": reading the media took too long | 504 | server_error | timeout |
| kind "internal", or anything else: a defect | 500 | server_error | internal_error |

OpenAI's client tries again after 408, 409, 429 and 5xx, so a fault of the request is none of these. Whether the same
request may pass later is `RequestError.transient`.
"""

from __future__ import annotations

import re
from typing import Any

from keye_jax.engine.request import RequestError
from keye_jax.errors import MediaError, UnreachableError, UserError

_INVALID, _SERVER = "invalid_request_error", "server_error"
_KINDS = {
    "invalid": (400, _INVALID, "invalid_value"),
    "media": (400, _INVALID, "invalid_media"),
    "unreachable": (400, _INVALID, "unreachable_media"),
    "too_large": (400, _INVALID, "context_length_exceeded"),
    "cancelled": (503, _SERVER, "cancelled"),
    "closed": (503, _SERVER, "unavailable"),
    "timeout": (504, _SERVER, "timeout"),
    "internal": (500, _SERVER, "internal_error"),
}
# What is checked when a prompt is planned. Messages of its errors begin with the field.
_PLANNED = re.compile(
    r"(?:messages|input|instructions|tools|chat_template_kwargs|media_io_kwargs|mm_processor_kwargs)\b[\w.\[\]]*"
)


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body for a failure; see the table above.

    Args:
      error: a UserError, a RequestError, or any other exception, whose text is not shown.
    """
    kind, message, field = failure_kind(error), str(error), getattr(error, "field", None)
    if not isinstance(error, UserError | RequestError):
        message = "the server failed to answer this request"
    status, type_, code = _KINDS.get(kind, _KINDS["internal"])
    if field is None and status == 400 and (found := _PLANNED.match(message)):
        field = found[0].rstrip(".")
    return status, {"error": {"message": message, "type": type_, "param": field, "code": code}}


def failure_kind(error: Exception) -> str:
    """The kind of a failure, as in the table above."""
    if isinstance(error, RequestError):
        return error.kind
    if isinstance(error, UnreachableError):
        return "unreachable"
    if isinstance(error, MediaError):
        return "media"
    return "invalid" if isinstance(error, UserError) else "internal"
