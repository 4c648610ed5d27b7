"""The routes that show what the model sees of a picture or a video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from keye_jax.errors import UserError, shorten
from keye_jax.serve.bodies import read_object
from keye_jax.serve.errors import json_response
from keye_jax.serve.frames import FrameReader
from keye_jax.serve.service import Service

_WIDTH, _MOST_WIDTH = 160, 1920


async def frames(request: Request) -> Response:
    """Times and sizes of the frames that the model sees of `media`, with `options` as a part of a message has them."""
    reader, source, options, _ = await _asked(request)
    return json_response(await reader.describe(source, options))


async def picture(request: Request) -> Response:
    """One of these frames as a JPEG: `frame`, its number from 0, and `width` in pixels."""
    reader, source, options, body = await _asked(request)
    numbers = {"frame": (0, 10**6), "width": (1, _MOST_WIDTH)}
    values = {"frame": body.get("frame", 0), "width": body.get("width", _WIDTH)}
    for name, (low, high) in numbers.items():
        if type(values[name]) is not int or not low <= values[name] <= high:
            message = f"{name} is {shorten(values[name])}; it must be an integer from {low} to {high}"
            raise UserError(message, field=name)
    content = await reader.picture(source, options, values["frame"], values["width"])
    return Response(content, media_type="image/jpeg", headers={"cache-control": "no-store"})


async def _asked(request: Request) -> tuple[FrameReader, str | Path, dict[str, Any], dict[str, Any]]:
    service: Service = request.app.state.service
    service.check_ready()
    assert service.frames is not None, "it is there with the engine"
    body = await read_object(request)
    source, options = body.get("media"), body.get("options") or {}
    if not isinstance(source, str):
        raise UserError(f"media is {shorten(source)}; it must be a URL or the name of a file", field="media")
    if not isinstance(options, dict):
        raise UserError(f"options is {shorten(options)}; it must be an object", field="options")
    return service.frames, service.files.resolve({"url": source})["url"], options, body


ROUTES = (
    Route("/v1/frames", frames, methods=["POST"]),
    Route("/v1/frames/picture", picture, methods=["POST"]),
)
