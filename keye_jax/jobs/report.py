"""What a job has done so far, and what it did: progress, a report, and a plot."""

from __future__ import annotations

import dataclasses
import sys
import time
from array import array
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keye_jax.engine.request import Result

_MINUTE_S, _HOUR_S = 60, 3600
_BINS = 60
_POINTS = {"median": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a line.

    Attributes:
      record: the line of the output.
      seconds: from its first submission.
      tries: how often it was submitted.
      result: the engine's; None if it failed.
      code: of its error; None if it did not fail.
    """

    record: Mapping[str, Any]
    seconds: float
    tries: int
    result: Result | None = None
    code: str | None = None


class Tally:
    """Counts outcomes.

    Args:
      total: number of lines of the job.
      succeeded, failures: of lines that were done before this run; failures by code.
    """

    def __init__(self, total: int, succeeded: int, failures: Mapping[str, int]):
        self.total = total
        self.succeeded, self.failures = succeeded, Counter(failures)
        self._before = succeeded + self.failures.total()
        self._start = time.monotonic()
        self._retries = self._prompt = self._cached = self._completion = 0
        self._video_s = 0.0
        # One of each for a request that succeeded: seconds, and numbers of tokens.
        self._ends, self._latencies, self._first, self._between = (array("d") for _ in range(4))
        self._tokens = array("q")

    def begin(self) -> None:
        """Notes that the run begins now. What the engine needed to load does not count."""
        self._start = time.monotonic()

    @property
    def failed(self) -> int:
        return self.failures.total()

    @property
    def done(self) -> int:
        """Lines that have a result, of earlier runs too."""
        return self.succeeded + self.failed

    def add(self, outcome: Outcome) -> None:
        """Counts a line that is done."""
        self._retries += outcome.tries - 1
        result = outcome.result
        if result is None:
            self.failures[str(outcome.code)] += 1
            return
        self.succeeded += 1
        usage, timings = result.usage, result.timings
        self._prompt += usage.prompt
        self._cached += usage.cached
        self._completion += usage.completion
        self._video_s += sum(max(times) - min(times) for times in result.frame_times if times)
        self._ends.append(time.monotonic() - self._start)
        self._latencies.append(outcome.seconds)
        self._tokens.append(usage.completion)
        self._first.append(timings.first_token)
        longest = max(len(choice.token_ids) for choice in result.choices)
        if longest > 1:
            self._between.append((timings.last_token - timings.first_token) / (longest - 1))

    def sentence(self) -> str:
        """One line about this run so far."""
        wall = time.monotonic() - self._start
        now = self.done - self._before
        parts = [
            f"{self.done:,} of {self.total:,} done",
            f"{self.failed:,} failed",
            f"{self._completion / max(wall, 1e-9):,.0f} tokens/s",
            f"{self._video_s / max(wall, 1e-9):,.1f} video hours an hour",
        ]
        if now > 0 and self.done < self.total:
            parts.append(f"{duration(wall / now * (self.total - self.done))} left")
        return ", ".join(parts)

    def report(self) -> dict[str, Any]:
        """An object for JSON: of the job, and of this run. Durations are in seconds."""
        wall = time.monotonic() - self._start
        now = self.done - self._before

        def rate(count: float) -> float:
            return round(count / max(wall, 1e-9), 3)

        return {
            "job": {
                "requests": self.total,
                "succeeded": self.succeeded,
                "failed": self.failed,
                "not_done": self.total - self.done,
                "failures": dict(sorted(self.failures.items())),
            },
            "run": {
                "seconds": round(wall, 3),
                "requests": now,
                "retries": self._retries,
                "requests_per_second": rate(now),
                "prompt_tokens": self._prompt,
                "cached_tokens": self._cached,
                "completion_tokens": self._completion,
                "prompt_tokens_per_second": rate(self._prompt),
                "completion_tokens_per_second": rate(self._completion),
                "video_hours": round(self._video_s / _HOUR_S, 4),
                "video_hours_per_hour": rate(self._video_s),
                "latency_seconds": _spread(self._latencies),
                "first_token_seconds": _spread(self._first),
                "seconds_between_tokens": _spread(self._between),
            },
        }

    def plot(self, path: Path) -> None:
        """Draws this run as SVG: throughput over time, latencies, and failures of the whole job by code.

        Raises:
          ModuleNotFoundError: Matplotlib is not installed.
          OSError: the file cannot be written.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.6), layout="constrained")
        speed, latency, failures = figure.subplots(1, 3)
        wall = max(time.monotonic() - self._start, 1e-9)
        sums, edges = np.histogram(self._ends, bins=_BINS, range=(0, wall), weights=np.array(self._tokens, float))
        speed.stairs(sums / (wall / _BINS), edges, fill=True)
        speed.set(title="throughput", xlabel="time of completion (s)", ylabel="output tokens/s", ylim=(0, None))
        latency.hist(np.array(self._latencies), bins=_BINS)
        latency.set(title="latency", xlabel="s from submission to the last token", ylabel="requests")
        codes = sorted(self.failures)
        failures.barh(codes, [self.failures[code] for code in codes])
        failures.set(title=f"{self.failed:,} of {self.total:,} requests failed", xlabel="requests")
        figure.savefig(path, format="svg")


def _spread(values: array) -> dict[str, float] | None:
    if not values:
        return None
    return {name: round(float(np.percentile(values, point)), 4) for name, point in _POINTS.items()}


def duration(seconds: float) -> str:
    """A length of time in the two units that matter, such as "2 h 10 min"."""
    minutes, rest = divmod(round(seconds), _MINUTE_S)
    hours, minutes = divmod(minutes, _MINUTE_S)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Progress:
    """Shows a tally on stderr: as a bar on a terminal, else as a line a minute.

    Attributes:
      interval_s: seconds after which `show` is called again.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        console = Console(stderr=True)
        self._bars = None
        if console.is_terminal:
            self._bars = Bars(BarColumn(), TextColumn("{task.description}"), console=console)
            self._task = self._bars.add_task("", total=None)
            self._bars.start()
        self.interval_s = 0.5 if self._bars else float(_MINUTE_S)

    def show(self, tally: Tally) -> None:
        """Shows what is done so far."""
        if self._bars:
            self._bars.update(self._task, description=tally.sentence(), completed=tally.done, total=tally.total)
        else:
            print(tally.sentence(), file=sys.stderr, flush=True)

    def close(self, tally: Tally) -> None:
        """Shows what was done, and leaves it there."""
        self.show(tally)
        if self._bars:
            self._bars.stop()
