"""Batches that clients create: jobs of `keye_jax.jobs`, one after the other, on the engine that also serves."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from keye_jax.engine.request import Request, RequestError, Result
from keye_jax.errors import UserError, shorten
from keye_jax.jobs.batch import Answerer, Batch
from keye_jax.jobs.journal import JobStoppedError, Journal, write_whole
from keye_jax.jobs.lines import ENDPOINT, Shard, count_lines, read_lines
from keye_jax.jobs.report import Progress, Tally
from keye_jax.serve.errors import Refusal
from keye_jax.serve.files import OUTPUT_PURPOSE, FileStore
from keye_jax.serve.gate import log
from keye_jax.serve.service import Admission, Service

_OPEN = ("validating", "in_progress", "finalizing", "cancelling")
_WINDOW = "24h"
_MOST_METADATA = 16


class Batches:
    """The batches of a server. What they are is in a folder, so that they go on after a restart.

    At most half of the engine's rows answer lines of batches: others find free ones.

    Args:
      service: the server.
      folder: where they stay between runs; None for a folder that goes with the server.
      checkpoint: gives the hash of the checkpoint, on which results depend.
    """

    def __init__(self, service: Service, folder: Path | None, checkpoint: Callable[[], str]):
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="keye-jax-batches-")
        self._folder = folder or Path(self._temporary.name)  # pyright: ignore[reportOptionalMemberAccess]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._service, self._checkpoint = service, checkpoint
        self._batches: dict[str, dict[str, Any]] = {}
        for path in self._folder.glob("batch_*.json"):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a job's own file beside it has another shape
                values = json.loads(path.read_bytes())
                self._batches[values["id"]] = values
        self._job: tuple[str, Batch] | None = None
        self._ending = False
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Removes batches that do not stay."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        """A new batch; returns the object that clients see.

        Raises:
          UserError: a field has a wrong value.
          Refusal: the file is not there.
        """
        endpoint, window, metadata = body.get("endpoint"), body.get("completion_window"), body.get("metadata")
        if endpoint != ENDPOINT:
            raise UserError(f"endpoint is {shorten(endpoint)}; it must be {ENDPOINT!r}", field="endpoint")
        if window != _WINDOW:
            message = f"completion_window is {shorten(window)}; it must be {_WINDOW!r}"
            raise UserError(message, field="completion_window")
        if metadata is not None and not (
            isinstance(metadata, dict)
            and len(metadata) <= _MOST_METADATA
            and all(isinstance(value, str) and len(key) <= 64 and len(value) <= 512 for key, value in metadata.items())
        ):
            message = f"metadata is {shorten(metadata)}; it must be an object of at most {_MOST_METADATA} short strings"
            raise UserError(message, field="metadata")
        source = self._service.files.get(body.get("input_file_id"))
        if source["purpose"] != "batch":
            message = f"input_file_id is {shorten(source['id'])}; its purpose must be 'batch'"
            raise UserError(message, field="input_file_id")
        now = int(time.time())
        values: dict[str, Any] = {
            "id": f"batch_{uuid.uuid4().hex[:24]}",
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": source["id"],
            "completion_window": window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + 24 * 3600,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
        }
        self._save(values)
        self._batches[values["id"]] = values
        self._changed.set()
        return values

    def list(self) -> list[dict[str, Any]]:
        """The objects of all batches, the newest first."""
        return sorted(self._batches.values(), key=lambda each: (each["created_at"], each["id"]), reverse=True)

    def get(self, batch_id: str) -> dict[str, Any]:
        """The object of a batch. Raises Refusal if it is not there."""
        if batch_id not in self._batches:
            raise Refusal(404, f"there is no batch {shorten(batch_id)}", code="batch_not_found")
        return self._batches[batch_id]

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """Ends a batch soon; results that are there stay. Raises Refusal if it is not there, or has ended."""
        values = self.get(batch_id)
        if values["status"] not in _OPEN:
            raise Refusal(409, f"the batch is {values['status']}; only one that runs can be cancelled", code="ended")
        self._set(values, "cancelling")
        if self._job is not None and self._job[0] == batch_id:
            self._job[1].stop(now=True)
        self._changed.set()
        return values

    def stop(self) -> None:
        """Gives no more lines to the engine; batches go on after a restart."""
        self._ending = True
        self._changed.set()
        if self._job is not None:
            self._job[1].stop()

    async def run(self) -> None:
        """Works on the batches that are open, until `stop`."""
        while not self._ending:
            self._changed.clear()
            waiting = [each for each in reversed(self.list()) if each["status"] in _OPEN]
            if not waiting:
                await self._changed.wait()
                continue
            values = waiting[0]
            try:
                await self._work(values)
            except (UserError, Refusal) as error:
                self._fail(values, str(error))
            except JobStoppedError as error:
                if self._service.draining or not self._service.alive:
                    return
                self._fail(values, str(error))
            except Exception:
                log.exception("a batch failed", extra={"fields": {"batch": values["id"]}})
                self._fail(values, "the server failed")

    async def _work(self, values: dict[str, Any]) -> None:
        with self._service.files.use(values["input_file_id"]) as source:
            await self._work_on(source, values)

    async def _work_on(self, source: Path, values: dict[str, Any]) -> None:
        digest, lines = await asyncio.to_thread(count_lines, source)
        if not lines:
            raise UserError("the file has no lines; it must have at least one request")
        checkpoint = await asyncio.to_thread(self._checkpoint)
        options = {"max_tokens": self._service.options.max_tokens}
        results = self._folder / f"{values['id']}.jsonl"
        journal = await asyncio.to_thread(
            Journal, results, {"input": digest, "checkpoint": checkpoint, "options": options}
        )
        with journal, source.open("rb") as file:
            tally = Tally(lines, journal.succeeded, journal.failures)
            if values["status"] in ("validating", "in_progress"):
                self._set(values, "in_progress")
                await self._answer(values, journal, read_lines(file, Shard()), tally)
                if self._ending and tally.done < tally.total:
                    return
        cancelled = values["status"] == "cancelling"
        if not cancelled:
            self._set(values, "finalizing")
        await asyncio.to_thread(_split, results, values, self._service.files)
        self._set(values, "cancelled" if cancelled else "completed")

    async def _answer(self, values: dict[str, Any], journal: Journal, lines: Iterator[Any], tally: Tally) -> None:
        service, engine = self._service, self._service.engine
        answerer = Answerer(
            _Lines(service),
            service.name,
            service.token_text,
            engine.defaults.sampling,
            service.options.max_tokens,
        )
        job = Batch(
            *(answerer, journal, lines, tally, _Counts(values["request_counts"])),
            concurrency=max(1, engine.options.rows // 2),
            grace_s=service.options.grace_s,
        )
        self._job = values["id"], job
        if self._ending:
            job.stop()
        try:
            await job.run(signals=())
        finally:
            self._job = None

    def _set(self, values: dict[str, Any], status: str, **others: Any) -> None:
        """Changes the status, and other fields, once the change is stored. Raises Refusal if it cannot be."""
        changed = values | others
        if values["status"] != status:
            changed["status"] = status
            changed.setdefault(f"{status}_at", int(time.time()))
        self._save(changed)
        values |= changed

    def _fail(self, values: dict[str, Any], message: str) -> None:
        error = {"code": "invalid", "message": message, "param": None, "line": None}
        failed = {"errors": {"object": "list", "data": [error]}, "failed_at": int(time.time())}
        try:
            self._set(values, "failed", **failed)
        except Refusal as refusal:
            # Clients learn of it all the same; after a restart the batch begins again.
            log.error("a failed batch is not stored", extra={"fields": {"batch": values["id"], "error": str(refusal)}})
            values |= {**failed, "status": "failed"}

    def _save(self, values: dict[str, Any]) -> None:
        try:
            write_whole(self._folder / f"{values['id']}.json", [json.dumps(values).encode()])
        except OSError as error:
            raise Refusal(507, f"the batch cannot be stored ({error.strerror or error})") from error


class _Counts(Progress):
    """Keeps the counts of a batch's object up to date."""

    def __init__(self, counts: dict[str, int]):
        self._counts, self.interval_s = counts, 1.0

    def show(self, tally: Tally) -> None:
        self._counts |= {"total": tally.total, "completed": tally.succeeded, "failed": tally.failed}

    def close(self, tally: Tally) -> None:
        self.show(tally)


class _Lines:
    """The engine as a batch sees it: its answers are counted, and it may name uploaded files."""

    def __init__(self, service: Service):
        self._service = service

    def submit(self, request: Request) -> _Line:
        self._service.check_length(request)
        return _Line(self._service, request)


class _Line:
    def __init__(self, service: Service, request: Request):
        self._service = service
        self._handle, self._admission = service.submit(request), Admission(service, request.n)

    def __await__(self) -> Generator[Any, None, Result]:
        metrics = self._service.metrics
        try:
            result = yield from self._handle.__await__()
            metrics.answered(result)
            return result
        except RequestError as error:
            metrics.failed(error.kind)
            raise
        finally:
            self._admission.close()

    def cancel(self) -> None:
        self._handle.cancel()
        self._admission.close()


def _split(results: Path, values: dict[str, Any], files: FileStore) -> None:
    """Makes a file of the answers and one of the errors. The same batch always makes files of the same names."""
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(results.open("rb"))
        parts = {name: stack.enter_context(tempfile.TemporaryFile()) for name in ("output", "error")}
        for line in lines:
            parts["output" if json.loads(line)["error"] is None else "error"].write(line)
        for name, part in parts.items():
            if size := part.tell():
                part.seek(0)
                file_id = "file-" + hashlib.sha256(f"{values['id']} {name}".encode()).hexdigest()[:24]
                filename = f"{values['id']}_{name}.jsonl"
                with files.room() as room:
                    made = files.add(part, size, filename, OUTPUT_PURPOSE, room, file_id)
                values[f"{name}_file_id"] = made["id"]
