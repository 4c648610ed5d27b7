"""Counts in Prometheus' format, with the names of vLLM behind the prefix `keye_jax_`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from keye_jax.engine.request import Result

_PREFIX = "keye_jax"
# Seconds.
_FIRST = (0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)
_TOKENS = (1, 10, 100, 1_000, 4_000, 16_000, 64_000, 256_000)


class Counted(Protocol):
    """What of a server is counted: whether it is ready, the answers that it has, and its engine, if there is one."""

    engine: Any
    outstanding: int

    @property
    def ready(self) -> bool: ...


class Metrics:
    """The counts of a server.

    Args:
      service: the server, whose engine is asked when the counts are.
    """

    def __init__(self, service: Counted):
        self._registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(name, text, namespace=_PREFIX, buckets=(*buckets, float("inf")), registry=registry)

        self._success = Counter(
            "request_success", "Answers that ended.", ["finished_reason"], namespace=_PREFIX, registry=registry
        )
        self._failed = Counter(
            "request_failure", "Requests without an answer.", ["kind"], namespace=_PREFIX, registry=registry
        )
        self._first = histogram("time_to_first_token_seconds", "From a request to its first token.", _FIRST)
        self._between = histogram("inter_token_latency_seconds", "From a token to the next of its answer.", _BETWEEN)
        self._whole = histogram("e2e_request_latency_seconds", "From a request to its last token.", _WHOLE)
        self._queue = histogram("request_queue_time_seconds", "From a request to its pages being reserved.", _FIRST)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._generated = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        registry.register(_EngineCounts(service))

    def answered(self, result: Result) -> None:
        """Counts a request that was answered."""
        timings = result.timings
        self._queue.observe(timings.admitted)
        self._prompt.observe(result.usage.prompt)
        if any(choice.token_seconds for choice in result.choices):
            self._first.observe(timings.first_token)
            self._whole.observe(timings.last_token)
        for choice in result.choices:
            self._success.labels(choice.finish_reason).inc()
            self._generated.observe(len(choice.token_ids))
            times = choice.token_seconds
            for before, after in itertools.pairwise(times):
                self._between.observe(after - before)

    def failed(self, kind: str) -> None:
        """Counts a request that failed, or was refused."""
        self._failed.labels(kind).inc()

    def text(self) -> bytes:
        """All counts."""
        return generate_latest(self._registry)


class _EngineCounts(Collector):
    """What the engine counts itself."""

    def __init__(self, service: Counted):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service = self._service

        def gauge(name: str, text: str, value: float) -> Metric:
            return GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=value)

        def counter(name: str, text: str, value: float) -> Metric:
            return CounterMetricFamily(f"{_PREFIX}_{name}", text, value=value)

        yield gauge("ready", "Whether requests are taken.", service.ready)
        yield gauge("outstanding_answers", "Answers that are written or wait.", service.outstanding)
        if service.engine is None:
            return
        stats = service.engine.stats()
        pool = stats.scheduler
        used = pool.pages - pool.free_pages - pool.cached_pages
        yield gauge("num_requests_running", "Requests that are read or written.", stats.requests - stats.waiting)
        yield gauge("num_requests_waiting", "Requests that wait.", stats.waiting)
        yield gauge("kv_cache_usage_perc", "Part of the cache's pages that are in use.", used / pool.pages)
        yield counter("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", pool.prompt_tokens)
        yield counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", pool.cached_tokens)
        yield counter("prompt_tokens", "Tokens of prompts.", pool.prompt_tokens)
        yield counter("generation_tokens", "Tokens of answers.", stats.generated_tokens)
        yield counter("num_preemptions", "Answers that were paused.", pool.preemptions)
        yield counter("engine_steps", "Steps of the engine.", stats.steps)
        yield counter("compilations", "Programs compiled since the start.", stats.compilations)
        yield counter("embedding_cache_hits", "Media whose embeddings were kept.", stats.embedding_hits)
