"""The routes of files that clients upload."""

from __future__ import annotations

import asyncio
import contextlib
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from keye_jax.errors import UserError, shorten
from keye_jax.serve.errors import Refusal, json_response
from keye_jax.serve.files import PURPOSES, Room, not_stored
from keye_jax.serve.gate import FORM_BYTES
from keye_jax.serve.service import Service

_MOST_LISTED = 10_000


async def upload(request: Request) -> Response:
    """Takes a file from a multipart form: `file`, and `purpose`."""
    service: Service = request.app.state.service
    try:
        with service.files.room() as room:
            return json_response(await _take(request, service, room))
    except (MultiPartException, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise Refusal(400, f"the form cannot be read ({error})") from error
    except OSError as error:  # the form is on disk before it is in the store
        raise not_stored(error) from error


async def _take(request: Request, service: Service, room: Room) -> dict[str, Any]:
    """Takes a file from a form into the store. What there is no room for is refused before it is read, or meanwhile."""
    length = request.headers.get("content-length", "")
    if length.isdecimal():
        room.hold(max(0, int(length) - FORM_BYTES))
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if not length.isdecimal():
            room.hold(max(0, received - FORM_BYTES))
        return message

    async with Request(request.scope, receive).form(max_files=1, max_fields=16) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise Refusal(400, "the form must have a file in its field 'file'", param="file")
        if purpose not in PURPOSES:
            names = ", ".join(PURPOSES)
            raise Refusal(400, f"purpose is {shorten(purpose)}; it must be one of {names}", param="purpose")
        size = file.size or 0
        if size > service.options.max_file_bytes:
            raise Refusal(413, f"a file must have at most {service.options.max_file_bytes:,} bytes", param="file")
        name = re.sub(r"[\x00-\x1f\x7f/\\]", "_", file.filename or "file")
        return await asyncio.to_thread(service.files.add, file.file, size, name, str(purpose), room)


async def list_files(request: Request) -> Response:
    service: Service = request.app.state.service
    purpose = request.query_params.get("purpose")
    files = [each for each in service.files.list() if purpose in (None, each["purpose"])]
    return json_response(page_of(files, request))


def page_of(values: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    """A part of a list, from the object behind `after` on, at most `limit`."""
    limit, after = request.query_params.get("limit", str(_MOST_LISTED)), request.query_params.get("after")
    if not re.fullmatch(r"[0-9]{1,5}", limit) or not 1 <= int(limit) <= _MOST_LISTED:
        raise Refusal(400, f"limit is {shorten(limit)}; it must be from 1 to {_MOST_LISTED}", param="limit")
    if after is not None:
        place = next((index for index, each in enumerate(values) if each["id"] == after), None)
        if place is None:
            raise Refusal(400, f"after is {shorten(after)}; it must be the id of an object in the list", param="after")
        values = values[place + 1 :]
    shown = values[: int(limit)]
    ids = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **ids, "has_more": len(values) > len(shown)}


async def get_file(request: Request) -> Response:
    service: Service = request.app.state.service
    return json_response(service.files.get(request.path_params["file_id"]))


async def content(request: Request) -> Response:
    service: Service = request.app.state.service
    file_id = request.path_params["file_id"]
    values = service.files.get(file_id)
    # Never shown by a browser as a page of this server, whatever is in it.
    quoted = urllib.parse.quote(values["filename"])
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quoted}", "content-security-policy": "sandbox"}
    using = contextlib.ExitStack()
    path = using.enter_context(service.files.use(file_id))
    return _Content(path, using, headers)


class _Content(FileResponse):
    """A file that stays until it is sent, also if it is deleted meanwhile.

    Args:
      using: what keeps the file.
    """

    def __init__(self, path: Path, using: contextlib.ExitStack, headers: Mapping[str, str]):
        super().__init__(path, media_type="application/octet-stream", headers=headers)
        self._using = using

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._using:
            await super().__call__(scope, receive, send)


async def delete(request: Request) -> Response:
    service: Service = request.app.state.service
    file_id = request.path_params["file_id"]
    await asyncio.to_thread(service.files.delete, file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


ROUTES = (
    Route("/v1/files", upload, methods=["POST"]),
    Route("/v1/files", list_files),
    Route("/v1/files/{file_id}", get_file),
    Route("/v1/files/{file_id}/content", content),
    Route("/v1/files/{file_id}", delete, methods=["DELETE"]),
)
