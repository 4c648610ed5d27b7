"""The routes of a server."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from keye_jax.engine.openai import error_body, failure_kind
from keye_jax.engine.request import RequestError
from keye_jax.errors import UserError
from keye_jax.serve import batches_api, files_api, generate, media_api, profiling, tokens
from keye_jax.serve.answers import CLIENT_GONE, ClientGone
from keye_jax.serve.batches import Batches
from keye_jax.serve.errors import Refusal, error_response, json_response, refusal_response
from keye_jax.serve.gate import Gate
from keye_jax.serve.page import show_page
from keye_jax.serve.service import QUEUE_RETRY_S, Service

_CLIENT_GONE_STATUS = 499


def make_app(service: Service, batches: Batches) -> Starlette:
    """The application: all routes, behind the gate."""
    options = service.options
    middleware = [Middleware(Gate, options, lambda: service.connections(), service.metrics.failed)]
    if options.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # OpenAI's client for browsers sends many of its own
            expose_headers=["x-request-id", "retry-after", generate.IGNORED_HEADER],
        )
        middleware.insert(0, cors)
    handlers: dict[Any, Any] = {
        Refusal: _refused,
        UserError: _failed,
        RequestError: _failed,
        HTTPException: _http,
        ClientGone: _gone,
        ClientDisconnect: _gone,
    }
    routes = [
        Route("/", show_page),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
        Route("/v1/chat/completions", generate.chat_completions, methods=["POST"]),
        Route("/v1/completions", generate.completions, methods=["POST"]),
        Route("/v1/responses", generate.responses, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        *files_api.ROUTES,
        *batches_api.ROUTES,
        *media_api.ROUTES,
    ]
    if options.profile_dir is not None:
        routes.append(Route("/debug/profile", profiling.profile, methods=["POST"]))
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.state.service, app.state.batches = service, batches
    return app


async def health(request: Request) -> Response:
    """Whether the server is alive, also while it loads the model or drains."""
    service: Service = request.app.state.service
    return json_response({"status": "alive" if service.alive else "stalled"}, 200 if service.alive else 503)


async def ready(request: Request) -> Response:
    """Whether requests are taken."""
    service: Service = request.app.state.service
    service.check_ready()
    return json_response({"status": "ready"})


async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    # In no thread of the pool, all of which may be busy with long files.
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_model(request.app.state.service)]})


async def model(request: Request) -> Response:
    service: Service = request.app.state.service
    if (name := request.path_params["model"]) != service.name:
        raise Refusal(404, f"there is no model {name!r}; the model is {service.name!r}", code="model_not_found")
    return json_response(_model(service))


def _model(service: Service) -> dict[str, Any]:
    values: dict[str, Any] = {"id": service.name, "object": "model", "created": service.created, "owned_by": "keye-jax"}
    if service.engine is not None:
        values["max_model_len"] = service.engine.scheduler_config.most_tokens
        # What the page offers only where it is there: paths, and what answers looked at.
        values["media_root"] = service.engine.processor.media.reads_files
        values["selection_heat"] = service.engine.options.selection_heat
    return values


async def embeddings(request: Request) -> Response:
    raise Refusal(400, "this model writes text; it has no embeddings of texts", code="unsupported")


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    request.state.failure = error.kind
    return refusal_response(error)


def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError | RequestError)
    status, body = error_body(error)
    request.state.failure = failure_kind(error)
    request.state.log.setdefault("error", {"message": str(error)})
    transient = isinstance(error, RequestError) and (error.transient or error.kind == "closed")
    return error_response(status, body, QUEUE_RETRY_S if transient else None)


def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads it, but the log tells it from a fault."""
    request.state.failure = CLIENT_GONE
    return Response(status_code=_CLIENT_GONE_STATUS)


def _http(request: Request, error: Exception) -> Response:
    """What starlette refuses itself."""
    assert isinstance(error, HTTPException)
    messages = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not allowed here"}
    response = _refused(request, Refusal(error.status_code, messages.get(error.status_code, error.detail)))
    response.headers.update(error.headers or {})
    return response
