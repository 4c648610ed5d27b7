"""A trace of some steps of the engine, for TensorBoard or XProf."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request
from starlette.responses import Response

from keye_jax.errors import UserError, shorten
from keye_jax.serve.bodies import read_object
from keye_jax.serve.errors import Refusal, json_response
from keye_jax.serve.service import Service

_STEPS, _MOST_STEPS, _LONGEST_S = 20, 1000, 120.0
_lock = asyncio.Lock()


async def profile(request: Request) -> Response:
    """Writes a JAX trace of the next `steps` steps into the folder of `--profile`, and says where it is.

    It ends early if the engine has no work for a while.
    """
    service: Service = request.app.state.service
    service.check_ready()
    body = await read_object(request) if await request.body() else {}
    steps = body.get("steps", _STEPS)
    if type(steps) is not int or not 1 <= steps <= _MOST_STEPS:
        message = f"steps is {shorten(steps)}; it must be an integer from 1 to {_MOST_STEPS}"
        raise UserError(message, field="steps")
    if _lock.locked():
        raise Refusal(409, "a trace is being written; there is one at a time", code="busy")
    import jax

    async with _lock:
        folder = service.options.profile_dir
        assert folder is not None, "there is no route without it"
        first, due = service.engine.stats().steps, time.monotonic() + _LONGEST_S
        await asyncio.to_thread(jax.profiler.start_trace, str(folder))
        try:
            while service.engine.stats().steps < first + steps and time.monotonic() < due:
                await asyncio.sleep(0.01)
        finally:
            await asyncio.to_thread(jax.profiler.stop_trace)
    return json_response({"folder": str(folder), "steps": service.engine.stats().steps - first})
