"""The routes that ask the model: chat completions, text completions and responses."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import Response

from keye_jax.engine.openai import (
    Asked,
    ChatStream,
    CompletionStream,
    ResponseStream,
    completion_body,
    read_chat,
    read_completion,
    read_responses,
    response_body,
    text_completion_body,
)
from keye_jax.engine.request import RequestError, Result
from keye_jax.errors import UserError
from keye_jax.serve.answers import CLIENT_GONE, DONE, EventStream, event, unless_gone
from keye_jax.serve.bodies import for_log, read_object
from keye_jax.serve.errors import json_response
from keye_jax.serve.gate import log
from keye_jax.serve.service import Service

IGNORED_HEADER = "x-keye-jax-ignored-fields"
_MOST_HEADER = 1000


@dataclasses.dataclass(frozen=True)
class Interface:
    """One of OpenAI's ways to ask.

    Attributes:
      read: what a body asks for.
      whole: the body of an answer, from (results, what was asked, the service).
      stream: what turns events into objects, and those to begin with, from (what was asked, the service).
      named: whether events have names; otherwise there is a last one without an object.
    """

    read: Callable[..., Asked]
    whole: Callable[[Sequence[Result], Asked, Service], dict[str, Any]]
    stream: Callable[[Asked, Service], tuple[Callable[[Any, int], list[dict[str, Any]]], list[dict[str, Any]]]]
    named: bool = False


def _naming(asked: Asked, service: Service, prefix: str) -> dict[str, Any]:
    completion_id = f"{prefix}{asked.request.id}"
    names = {"completion_id": completion_id, "created": int(time.time()), "model": service.name}
    return {**names, "token_text": service.token_text}


def _chat_stream(asked: Asked, service: Service) -> Any:
    stream = ChatStream(**_naming(asked, service, "chatcmpl-"), include_usage=asked.include_usage)
    return lambda event, prompt: stream.take(event), []


def _completion_stream(asked: Asked, service: Service) -> Any:
    prompts = len(asked.requests)
    naming = _naming(asked, service, "cmpl-")
    return CompletionStream(prompts=prompts, n=asked.request.n, **naming, include_usage=asked.include_usage).take, []


def _response_stream(asked: Asked, service: Service) -> Any:
    stream = ResponseStream(asked, created=int(time.time()), model=service.name, token_text=service.token_text)
    return lambda event, prompt: stream.take(event), stream.start()


CHAT = Interface(
    read_chat,
    lambda results, asked, service: completion_body(results[0], **_naming(asked, service, "chatcmpl-")),
    _chat_stream,
)
COMPLETIONS = Interface(
    read_completion,
    lambda results, asked, service: text_completion_body(results, **_naming(asked, service, "cmpl-")),
    _completion_stream,
)
RESPONSES = Interface(
    read_responses,
    lambda results, asked, service: response_body(
        results[0], asked, created=int(time.time()), model=service.name, token_text=service.token_text
    ),
    _response_stream,
    named=True,
)


async def chat_completions(request: Request) -> Response:
    return await _generate(request, CHAT)


async def completions(request: Request) -> Response:
    return await _generate(request, COMPLETIONS)


async def responses(request: Request) -> Response:
    return await _generate(request, RESPONSES)


async def _generate(request: Request, interface: Interface) -> Response:
    """Reads a body, has its requests answered, and cancels them if the client goes away."""
    service: Service = request.app.state.service
    service.check_ready()
    body = await read_object(request)
    if service.options.log_prompts:
        request.state.log["body"] = for_log(body)
    sampling = service.engine.defaults.sampling
    # A schema takes a while to compile.
    asked = await asyncio.to_thread(interface.read, body, sampling=sampling, max_tokens=service.options.max_tokens)
    try:
        for each in asked.requests:
            service.check_length(each)
        exchange = Exchange(service, asked, request.state)
    except UserError as error:
        raise asked.in_its_words(error) from error
    headers = {} if not asked.ignored else {IGNORED_HEADER: _header(asked.ignored)}
    try:
        if not asked.stream:
            results = await unless_gone(request.receive, exchange.results())
            exchange.close()
            return json_response(interface.whole(results, asked, service), headers=headers)
        # What is wrong with a request is mostly known soon, and told by a status rather than within a stream.
        await unless_gone(request.receive, exchange.begun(service.options.heartbeat_s))
        return EventStream(exchange.events(interface), service.options.heartbeat_s, exchange.close, headers)
    except BaseException:
        exchange.close()
        raise


def _header(names: Sequence[str]) -> str:
    """Names of fields in a header, where not all characters may stand."""
    return ", ".join(urllib.parse.quote(name[:100], safe="_.-[]") for name in names)[:_MOST_HEADER]


class Exchange:
    """The requests to the engine that one body makes.

    Args:
      service: has them answered.
      asked: what the body asks for.
      state: of the request; its `log`, and its `failure` if there is one, are kept up to date.

    Raises:
      Refusal: there are too many already.
      UserError: a file that is named is not there.
      RequestError: the engine takes no requests.
    """

    def __init__(self, service: Service, asked: Asked, state: State):
        self._service, self._asked, self._state = service, asked, state
        self._log: dict[str, Any] = state.log
        self._admission = service.admit(sum(each.n for each in asked.requests))
        self._handles: list[Any] = []
        self._first: asyncio.Future[Any] | None = None  # the first piece of a stream
        try:
            for each in asked.requests:
                self._handles.append(service.submit(each))
        except BaseException:
            self.close()
            raise
        self._pieces = aiter(self._handles[0])

    def close(self) -> None:
        """Cancels what is not done. Does nothing the second time."""
        for handle in self._handles:
            if not handle.done:
                handle.cancel()
                if "error" not in self._log:
                    self._state.failure = CLIENT_GONE
        self._admission.close()
        if self._first is not None:
            self._first.cancel()

    async def begun(self, wait_s: float) -> None:
        """Waits a while for the first piece. Raises RequestError if there comes none because the request failed."""
        self._first = asyncio.ensure_future(anext(self._pieces, None))
        await asyncio.wait({self._first}, timeout=wait_s)
        if self._first.done() and isinstance(error := self._first.exception(), RequestError):
            raise self._noted(error)

    async def results(self) -> list[Result]:
        """What became of all requests. Raises RequestError if one failed."""
        return [await self._result(handle) for handle in self._handles]

    async def events(self, interface: Interface) -> AsyncIterator[bytes]:
        """Server-sent events with the answers, after `begun`."""
        take, start = interface.stream(self._asked, self._service)

        def written(values: list[dict[str, Any]]) -> bytes:
            return b"".join(event(value, value["type"] if interface.named else None) for value in values)

        if start:
            yield written(start)
        for prompt, handle in enumerate(self._handles):
            try:
                pieces = self._pieces if not prompt else aiter(handle)
                piece = await (self._first if self._first and not prompt else anext(pieces, None))
                while piece is not None:
                    yield written(take(piece, prompt))
                    piece = await anext(pieces, None)
                last: Result | RequestError = await self._result(handle)
            except Exception as error:
                if not isinstance(error, RequestError):
                    log.exception("an answer failed")
                    error = RequestError("internal", f"the server failed: {type(error).__name__}")
                last = self._noted(error)
            yield written(take(last, prompt))
            if isinstance(last, RequestError):
                break
        if not interface.named:
            yield DONE

    async def _result(self, handle: Any) -> Result:
        try:
            result = await handle
        except RequestError as error:
            raise self._noted(error) from None
        self._service.metrics.answered(result)
        usage = result.usage
        for name in ("prompt", "cached", "completion", "reasoning"):
            self._log[f"{name}_tokens"] = self._log.get(f"{name}_tokens", 0) + getattr(usage, name)
        self._log["first_token"] = round(result.timings.first_token, 4)
        self._log["finish_reasons"] = [choice.finish_reason for choice in result.choices]
        return result

    def _noted(self, error: RequestError) -> RequestError:
        """Notes a failure, and gives it in the words of the body."""
        error = self._asked.in_its_words(error)
        if "error" not in self._log:
            self._state.failure = error.kind
            self._log["error"] = {"kind": error.kind, "message": str(error)}
        return error
