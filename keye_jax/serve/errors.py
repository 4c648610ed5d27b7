"""Errors as clients get them: a status, headers, and an object in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from keye_jax.jobs.lines import encode

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# Kinds of failures in the metrics, for refusals that have no code.
_KINDS = {400: "invalid", 403: "forbidden", 404: "not_found", 405: "not_allowed"}


class Refusal(Exception):
    """A request that the server does not take to the engine.

    Attributes:
      status: of HTTP.
      param: the field that is wrong, if it is one.
      code: a word for programs.
      retry_after: seconds after which the same request may pass; None if it never will.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def kind(self) -> str:
        """A word for the metrics, of which there are few."""
        return self.code or _KINDS.get(self.status, "other")

    def body(self) -> dict[str, Any]:
        """The object that tells the client."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`value` as JSON, whatever texts are in it."""
    return Response(encode(value), status, headers, "application/json")


def refusal_response(refusal: Refusal) -> Response:
    """What a client gets that was refused. Clients in OpenAI's shape try again only where that can help."""
    return error_response(refusal.status, refusal.body(), refusal.retry_after)


def error_response(status: int, body: Mapping[str, Any], retry_after: float | None = None) -> Response:
    """An error as a response."""
    headers = {} if retry_after is None else {"retry-after": str(max(1, round(retry_after)))}
    headers["x-should-retry"] = "false" if retry_after is None else "true"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(body, status, headers)
