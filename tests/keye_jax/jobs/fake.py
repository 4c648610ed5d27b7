"""An engine without a model: its answer follows from the request, and the request says how it fails."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from keye_jax.engine.request import Choice, Request, RequestError, Result, Timings, TokenLogprob, Usage
from keye_jax.errors import UserError
from keye_jax.jobs.batch import Answerer
from keye_jax.processor.messages import check_messages
from keye_jax.runtime.sampling import SamplingParams


class FakeHandle:
    def __init__(self, future: Future[Result], cancelled: threading.Event):
        self._future, self._cancelled = future, cancelled

    def __await__(self):
        return asyncio.wrap_future(self._future).__await__()

    def cancel(self):
        self._cancelled.set()


class FakeEngine:
    """Answers after `delay_s`. The last message may be "KIND" or "KIND N": it fails so, always or its first N times.

    "hang" is a kind that ends only when it is cancelled, and "defect" one that raises what no engine should.

    Args:
      after: what is called once so many requests were submitted.

    Attributes:
      cache_tokens: as of an engine.
      most: how many requests were outstanding at once, at most.
      cancelled: how many were cancelled while they ran.
      requests: all that were submitted.
    """

    cache_tokens = 65536

    def __init__(self, delay_s: float = 0.0, threads: int = 8, after: Mapping[int, Callable[[], None]] | None = None):
        self.most = self.cancelled = 0
        self.requests: list[Request] = []
        self._delay_s, self._pool = delay_s, ThreadPoolExecutor(threads)
        self._after = dict(after or {})
        self._tries, self._running, self._lock = Counter[str](), 0, threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_: object, wait: bool = False):
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def submit(self, request: Request) -> FakeHandle:
        with self._lock:
            self.requests.append(request)
            self._running += 1
            self.most = max(self.most, self._running)
            count = len(self.requests)
        self._after.get(count, lambda: None)()
        event = threading.Event()
        return FakeHandle(self._pool.submit(self._answer, request, event), event)

    def _answer(self, request: Request, cancelled: threading.Event) -> Result:
        try:
            try:
                messages, _ = check_messages(request.messages)
            except UserError as error:
                raise RequestError("invalid", str(error)) from error
            text = str(messages[-1]["content"])
            kind, _, times = text.partition(" ")
            with self._lock:
                self._tries[text] += 1
                failing = self._tries[text] <= (int(times) if times.isdecimal() else 10**9)
            if kind == "hang":
                cancelled.wait()
                with self._lock:
                    self.cancelled += 1
            elif kind == "defect":
                raise ZeroDivisionError("a defect")
            elif kind in ("invalid", "media", "unreachable", "too_large", "timeout", "internal", "closed") and failing:
                raise RequestError(kind, f"it is {kind}")
            time.sleep(self._delay_s)
            return answer_to(request)
        finally:
            with self._lock:
                self._running -= 1


def answer_to(request: Request) -> Result:
    content = json.dumps([request.messages, str(request.sampling), request.n], default=str, sort_keys=True)
    text = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    logprobs = None if request.top_logprobs is None else (TokenLogprob(1, -0.5, ((1, -0.5), (0, float("-inf")))),)
    choice = Choice(text, "so", "stop", (1, 2, 3), 1, logprobs)
    usage = Usage(prompt=10, image=2, video=3, cached=4, completion=3 * request.n, reasoning=request.n)
    timings = Timings(0.001, 0.002, 0.003, 0.004, 0.008)
    return Result((choice,) * request.n, usage, timings, ((0.0, 1.5, 3.0),), ("a warning",))


def answerer(engine: FakeEngine, **options) -> Answerer:
    values = {"sampling": SamplingParams(), "pause_s": 0.001} | options
    return Answerer(engine, "fake", lambda token: f"<{token}>", **values)


def line(custom_id: object, text: object = "hi", **body: object) -> bytes:
    """A line of the input."""
    body = {"messages": [{"role": "user", "content": text}], **body}
    values = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(values).encode() + b"\n"
