"""A small scheduler for tests, sequences that come to it, and the plans that it makes of them."""

from __future__ import annotations

import hashlib
from typing import Any

from keye_jax.engine.plan import Arrival, Event, Plan, Ready, SchedulerConfig
from keye_jax.engine.scheduler import Scheduler


def scheduler(**options: Any) -> Scheduler:
    """Large chunks of four pages, small ones and blocks of one page."""
    defaults: dict[str, Any] = {"rows": 4, "pages_per_shard": 40, "max_context": 2000, "large": 256, "small": 64}
    return Scheduler(SchedulerConfig(**(defaults | options)))


def come(name: str, prompt: int, most: int = 10, text: str = "", ready: int | None = None) -> list[Event]:
    """A sequence arrives. Its prompt begins with a block for each letter of a text."""
    hashes = [hashlib.sha256(text[: end + 1].encode()).digest() for end in range(len(text))]
    return [Arrival(name, prompt, most, tuple(hashes)), Ready(name, prompt if ready is None else ready)]


def chunks(plans: list[Plan]) -> list[tuple[str, int, int]]:
    return [(read.id, read.start, read.count) for plan in plans for read in plan.reads]


def steps(engine: Scheduler, count: int) -> list[Plan]:
    return [engine.step() for _ in range(count)]


def until_idle(engine: Scheduler, *events: Event) -> list[Plan]:
    """Plans until nothing is left to do."""
    plans = [engine.step(events)]
    while plans[-1] != Plan():
        plans.append(engine.step())
        assert len(plans) < 3000
    return plans
