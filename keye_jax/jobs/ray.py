"""Jobs on a Ray cluster: one engine a worker, and a lost worker costs only time. Needs the extra `ray`."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from keye_jax.engine.request import Request, RequestError, Result
from keye_jax.errors import UserError, shorten
from keye_jax.jobs.batch import Answerer, Engine, open_engine, token_text
from keye_jax.jobs.journal import JobStoppedError
from keye_jax.processor.messages import read_json
from keye_jax.runtime.sampling import SamplingParams


class Worker:
    """Answers rows of a Ray dataset: `dataset.map_batches(Worker, fn_constructor_kwargs={"checkpoint": ...}, ...)`.

    A row has `custom_id`, a string, and `body`, the body of a chat completion as JSON. Its result has `custom_id`,
    `response` (the body of the answer as JSON, or None) and `error` (a code and a message as JSON, or None).

    The rows of a batch are answered together, and their results come in the order of the rows. Ray counts on that
    order when it runs a batch again whose worker was lost.

    Args:
      checkpoint: directory of a checkpoint, on each machine.
      sampling: what applies where a body says nothing; the checkpoint's if left out.
      max_tokens, retries: as of `Answerer`.
      opener: opens the engine with `checkpoint` and `options`.
      options: of the engine.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        retries: int = 2,
        opener: Callable[..., Engine] = open_engine,
        **options: Any,
    ):
        from convert import buckets
        from keye_jax.engine.generation_config import GenerationDefaults

        directory = buckets.local(checkpoint)
        self._answerer = Answerer(
            opener(checkpoint, **options),
            Path(checkpoint).resolve().name,
            token_text(directory),
            sampling or GenerationDefaults.from_checkpoint(directory).sampling,
            max_tokens,
            retries,
        )

    async def __call__(self, batch: Mapping[str, np.ndarray]) -> AsyncIterator[dict[str, list[str | None]]]:
        """Yields one result after the other."""
        rows = zip(batch["custom_id"].tolist(), batch["body"].tolist(), strict=True)
        for answer in [asyncio.ensure_future(self._answer(*row)) for row in rows]:
            yield await answer

    async def _answer(self, custom_id: str, body: Any) -> dict[str, list[str | None]]:
        try:
            content = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else b"null"
            values = read_json(content, f"body is {shorten(body)}")
        except UserError as error:
            return _row(custom_id, None, {"code": "invalid", "message": str(error)})
        try:
            record = (await self._answerer.answer(custom_id, values)).record
        except JobStoppedError as error:
            _end_process(error)
        return _row(custom_id, record["response"] and record["response"]["body"], record["error"])


def _row(custom_id: str, response: Any, error: Any) -> dict[str, list[str | None]]:
    texts = [None if value is None else json.dumps(value) for value in (response, error)]
    return {"custom_id": [custom_id], "response": [texts[0]], "error": [texts[1]]}


def _end_process(error: Exception) -> NoReturn:
    """Ends a worker whose engine has ended, so that Ray starts another in its place."""
    print(f"the worker ends: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def start() -> None:
    """Joins the cluster that RAY_ADDRESS names or that runs on this machine; without one, starts Ray on this machine.

    Raises:
      UserError: Ray is not installed.
    """
    try:
        _ray().init(log_to_driver=False)
    except ModuleNotFoundError as error:
        raise UserError("Ray is not installed; --ray needs it: pip install 'keye-jax[ray]'") from error


def stop() -> None:
    """Leaves the cluster; the workers end."""
    _ray().shutdown()


def _ray() -> Any:
    return importlib.import_module("ray")


class _Remote:
    """A worker process with an engine."""

    def __init__(self, opener: Callable[[], Engine]):
        self._failure = ""
        try:
            self._engine = opener()
        except Exception as error:
            self._failure = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"

    async def ready(self) -> str:
        """Why the engine could not be opened; empty if it is there."""
        return self._failure

    async def answer(self, request: Request) -> Result | RequestError:
        """The answer, or why there is none. Ray would wrap an exception in one of its own."""
        try:
            handle = self._engine.submit(request)
            try:
                return await handle
            except asyncio.CancelledError:
                handle.cancel()
                raise
        except RequestError as error:
            if error.kind == "closed":
                _end_process(error)
            return error
        except UserError as error:
            return RequestError("invalid", str(error))
        except Exception as error:
            return RequestError("internal", f"{type(error).__name__}: {error}")


class _RemoteHandle:
    def __init__(self, engines: RayEngines, request: Request):
        self._engines, self._request = engines, request
        self._reference: Any = None

    def __await__(self) -> Generator[Any, None, Result]:
        return self._wait().__await__()

    async def _wait(self) -> Result:
        worker = await self._engines.choose()
        worker.running += 1
        try:
            self._reference = worker.actor.answer.remote(self._request)
            answer = await self._reference
        except _ray().exceptions.RayError as error:
            self._engines.lost(worker)
            raise RequestError("internal", f"its worker was lost ({_first_line(error)})") from error
        finally:
            worker.running -= 1
        if isinstance(answer, RequestError):
            raise answer
        return answer

    def cancel(self) -> None:
        """Ends the request on its worker."""
        if self._reference is not None:
            _ray().cancel(self._reference)


@dataclasses.dataclass(eq=False)
class _Worker:
    """A worker process as the driver knows it.

    Attributes:
      actor: Ray's handle of it.
      running: how many requests it has.
      there: whether its engine is there, as far as is known.
    """

    actor: Any
    running: int = 0
    there: bool = False


class RayEngines:
    """Engines in worker processes of a Ray cluster, used as one within one event loop.

    Ray starts a lost worker again. Its requests fail with a transient RequestError, and it gets new ones when its
    engine is there.

    Args:
      opener: opens the engine of a worker, in the worker.
      workers: how many there are.
      gpus: of each worker.
      concurrency: how many requests a worker takes at once, at most.
    """

    def __init__(self, opener: Callable[[], Engine], *, workers: int, gpus: float, concurrency: int):
        # One of the calls may be the question whether the worker is ready.
        options = {"num_gpus": gpus, "max_restarts": -1, "max_concurrency": concurrency + 1}
        remote = _ray().remote(_Remote).options(**options)
        self._workers = [_Worker(remote.remote(opener)) for _ in range(workers)]
        self._watches: dict[_Worker, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._reason = ""

    def submit(self, request: Request) -> _RemoteHandle:
        """Takes a request. A worker gets it when the handle is awaited."""
        return _RemoteHandle(self, request)

    async def choose(self) -> _Worker:
        """The worker with the fewest requests of those that are there; waits for one.

        Raises:
          RequestError: all workers have ended for good.
        """
        for worker in self._workers:
            if not worker.there and worker not in self._watches:
                self.lost(worker)
        while not (there := [worker for worker in self._workers if worker.there]):
            if all(watch.done() for watch in self._watches.values()):
                raise RequestError("closed", f"no worker is left; {self._reason}")
            self._changed.clear()
            await self._changed.wait()
        return min(there, key=lambda worker: worker.running)

    def lost(self, worker: _Worker) -> None:
        """Gives a worker no requests until its engine is there again."""
        if worker.there or worker not in self._watches:
            worker.there = False
            self._watches[worker] = asyncio.create_task(self._watch(worker))

    async def _watch(self, worker: _Worker) -> None:
        """Waits until a worker is there, or has ended for good."""
        while True:
            try:
                failure = await worker.actor.ready.remote()
                worker.there, self._reason = not failure, failure or self._reason
            except _ray().exceptions.ActorDiedError as error:
                self._reason = _first_line(error)
            except _ray().exceptions.RayError:
                await asyncio.sleep(1)
                continue
            self._changed.set()
            return


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
