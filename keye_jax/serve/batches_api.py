"""The routes of batches."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from keye_jax.serve.batches import Batches
from keye_jax.serve.bodies import read_object
from keye_jax.serve.errors import json_response
from keye_jax.serve.files_api import page_of


async def create(request: Request) -> Response:
    request.app.state.service.check_ready()
    return json_response(_batches(request).create(await read_object(request)))


async def list_batches(request: Request) -> Response:
    return json_response(page_of(_batches(request).list(), request))


async def get(request: Request) -> Response:
    return json_response(_batches(request).get(request.path_params["batch_id"]))


async def cancel(request: Request) -> Response:
    return json_response(_batches(request).cancel(request.path_params["batch_id"]))


def _batches(request: Request) -> Batches:
    return request.app.state.batches


ROUTES = (
    Route("/v1/batches", create, methods=["POST"]),
    Route("/v1/batches", list_batches),
    Route("/v1/batches/{batch_id}", get),
    Route("/v1/batches/{batch_id}/cancel", cancel, methods=["POST"]),
)
