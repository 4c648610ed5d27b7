"""`python -m tests.fuzz_scheduler`: random traces of requests, and a device that does what the scheduler plans.

The device keeps for each token in its pages which text it belongs to and which program wrote it. A sequence's pages
must hold what they would hold if it were alone, so a page that is given away too early, or a prefix that another
program wrote, is found. After every step the pages are counted. At the end every request must have ended within a
bounded number of steps, and a second scheduler must make the same plans of the same events.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import hashlib
import random
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from keye_jax.engine.plan import (
    Arrival,
    Cancel,
    Ended,
    Event,
    Failed,
    Measured,
    Plan,
    Read,
    Ready,
    SchedulerConfig,
)
from keye_jax.engine.scheduler import AGEING_STEPS, MOST_DECODES, Scheduler
from keye_jax.page_allocator import PAGE_SIZE


@dataclasses.dataclass(eq=False)
class Request:
    """A sequence as the device and the checks see it.

    Attributes:
      arrival: as the scheduler is told.
      expected: int64 `[prompt + max_tokens]`, what its pages hold of each token when it is alone.
      chunks: `(program, start, count)` of those that read its prompt when it is alone.
      stop: token of its answer that is an end token; above `max_tokens` if none is.
      ready, read, drawn: tokens of the prompt that can be read, and are read; tokens of the answer.
      chunks_since: chunks since its last token.
      how: how it ended.
    """

    arrival: Arrival
    expected: np.ndarray
    chunks: list[tuple[str, int, int]]
    stop: int
    ready: int = 0
    read: int | None = None
    drawn: int = 0
    chunks_since: int = 0
    how: str = ""


@dataclasses.dataclass(eq=False)
class Row:
    """A row of the device's batch: its pages, and how many tokens they hold."""

    request: Request
    pages: tuple[int, ...]
    length: int


class Device:
    """Does what plans say, and checks that every sequence finds its own tokens in its pages."""

    def __init__(self, config: SchedulerConfig, requests: dict[str, Request]):
        self.config, self.requests = config, requests
        self.pool = np.zeros((config.pages_per_shard * config.homes * config.turns, PAGE_SIZE), np.int64)
        self.rows: list[Row | None] = [None] * config.rows
        self.host: dict[str, tuple[Row, np.ndarray]] = {}

    def run(self, plan: Plan) -> None:
        for row in plan.clear:
            assert self.rows[row] is not None, "an idle row is cleared"
            self.rows[row] = None
        for placed in plan.offload:
            row = self._take(placed.row)
            assert placed.pages == row.pages[: -(-row.length // PAGE_SIZE)]
            self.check(row.request, row.pages, row.length)
            self.host[placed.id] = row, self.pool[list(placed.pages)]
        for placed in plan.restore:
            row, content = self.host.pop(placed.id)
            self.pool[list(placed.pages[: len(content)])] = content
            self._join(placed.row, Row(row.request, placed.pages, row.length))
        for placed in plan.grow:
            row = self.rows[placed.row]
            assert row and row.request.arrival.id == placed.id
            assert placed.pages[: len(row.pages)] == row.pages and len(placed.pages) > len(row.pages)
            self._join(placed.row, Row(row.request, placed.pages, self._take(placed.row).length))
        for read in plan.reads:
            request = self.requests[read.id]
            self.check(request, read.pages, read.start)
            tokens = np.arange(read.start, read.start + read.count)
            text = request.expected[tokens]
            # Of the other program the expected value has the other sign.
            right = (text > 0) == (read.program == "large")
            pages = np.asarray(read.pages)[tokens // PAGE_SIZE]
            self.pool[pages, tokens % PAGE_SIZE] = np.where(right, text, 0)
        for begin in plan.begin:
            request = self.requests[begin.id]
            self.check(request, begin.pages, begin.prompt_tokens)
            self._join(begin.row, Row(request, begin.pages, begin.prompt_tokens))
        if plan.decode:
            for row in filter(None, self.rows):
                # Idle rows write nothing; all others do, whether their tokens count or not.
                self.pool[row.pages[row.length // PAGE_SIZE], row.length % PAGE_SIZE] = row.request.expected[row.length]
                row.length += 1

    def check(self, request: Request, pages: tuple[int, ...], tokens: int) -> None:
        """Pages of a request hold its first tokens as if it were alone."""
        found = self.pool[list(pages)].reshape(-1)[:tokens]
        assert np.array_equal(found, request.expected[:tokens]), f"{request.arrival.id} has lost its tokens"

    def _take(self, number: int) -> Row:
        row, self.rows[number] = self.rows[number], None
        assert row, "the row is idle"
        return row

    def _join(self, number: int, row: Row) -> None:
        assert self.rows[number] is None, "a row is taken before it is idle"
        each = self.config.rows // self.config.homes
        for index, page in enumerate(row.pages):
            shard = page // self.config.pages_per_shard
            assert shard == number // each * self.config.turns + index % self.config.turns, "a page is on another shard"
        self.rows[number] = row


class Trace:
    """One random trace."""

    def __init__(self, seed: int, number: int):
        self.random = random.Random(f"{seed} {number}")
        self.config = self._config()
        self.scheduler = Scheduler(self.config)
        self.requests: dict[str, Request] = {}
        self.device = Device(self.config, self.requests)
        self.due: dict[int, list[Event]] = collections.defaultdict(list)
        self._requests()
        self.events: list[list[Event]] = []
        self.plans: list[Plan] = []
        self.decodes = self.overdue = 0
        self.counts: collections.Counter[str] = collections.Counter()

    def _config(self) -> SchedulerConfig:
        choose = self.random.choice
        homes, small, chunks = choose((1, 2)), choose((1, 2)) * PAGE_SIZE, choose((1, 2, 4))
        return SchedulerConfig(
            rows=homes * choose((1, 2, 4, 8)),
            pages_per_shard=choose((8, 8, 16, 40)),
            max_context=choose((500, 1000, 2000)),
            homes=homes,
            turns=choose((1, 2)),
            large=chunks * small,
            small=small,
            prompts_together=choose((1, chunks)),
            chunks_between=choose((1, 1, 2, 3)),
            decodes_between=choose((1, 1, 2, 5)),
            target_gap_ms=choose((None, None, 20.0, 100.0)),
            optimistic=choose((False, True)),
            prefix_cache=choose((False, True, True)),
        )

    def _requests(self) -> None:
        """Makes requests, many of which begin with the same text, and the events of their lives."""
        config, choose, number = self.config, self.random.choice, self.random.randint
        texts = [[number(1, 3) for _ in range(config.most_tokens // config.small)] for _ in range(2)]
        at, gaps = 0, choose(((0,), (0, 0, 1, 5), (0, 5, 30)))
        answers = choose((False, False, True))  # which then take most of the pages
        for index in range(number(1, 24)):
            at += choose(gaps)
            prompt = number(1, 8) * config.small + choose((0, 0, 1, 30))
            prompt = (
                number(1, 100)
                if answers
                else min(choose((number(1, config.most_tokens), prompt)), config.most_tokens - 1)
            )
            most = number(1, min(config.most_tokens - prompt, 400 if answers else choose((1, 20, 200))))
            request = _request(f"s{index}", prompt, most, choose(texts), index + 1, config)
            request.stop = number(1, 2 * most)
            self.requests[request.arrival.id] = request
            self.due[at].append(request.arrival)
            ready, broken = choose((prompt, prompt, 0)), choose((False,) * 9 + (True,))
            step = at
            while ready < prompt and not broken:
                self.due[step].append(Ready(request.arrival.id, ready))
                step, ready = step + choose((0, 1, 10)), min(prompt, ready + number(1, prompt))
            end = Failed(request.arrival.id) if broken else Ready(request.arrival.id, prompt)
            self.due[step + broken * number(0, 20)].append(end)
            if choose((False,) * 7 + (True,)):
                self.due[at + number(0, 100)].append(Cancel(request.arrival.id))

    def run(self) -> None:
        """Runs the trace to its end, with all checks.

        Raises:
          AssertionError: something is wrong.
        """
        pauses = MOST_DECODES if self.config.target_gap_ms else self.config.decodes_between
        work = sum(
            len(request.chunks) * (pauses + AGEING_STEPS + 1) + request.arrival.max_tokens + 10
            for request in self.requests.values()
        )
        last = max(self.due) + 2 * work
        while not all(request.how for request in self.requests.values()) or any(self.device.rows):
            assert len(self.plans) <= last, "a request waits for ever"
            self._one_step()
        stats = self.scheduler.stats
        assert stats.free_pages + stats.cached_pages == stats.pages, "pages are lost"
        self.counts += collections.Counter(
            traces=1,
            steps=len(self.plans),
            preemptions=stats.preemptions,
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
        )
        again = Scheduler(self.config)
        assert [again.step(events) for events in self.events] == self.plans, "the replay has other plans"

    def _one_step(self) -> None:
        step = len(self.plans)
        events = self.due.pop(step, [])
        if self.random.random() < 0.2:
            program = self.random.choice(("large", "small", None))
            seconds = self.random.random() / (10 if program else 100)
            events.append(Measured(seconds, program, program is None or self.random.random() < 0.5))
        for event in events:
            if isinstance(event, Ready):
                self.requests[event.id].ready = event.tokens
            elif isinstance(event, Cancel | Failed | Ended):
                self._end(event.id, type(event).__name__.lower())
        running = {row.request.arrival.id for row in self.device.rows if row and not row.request.how}
        plan = self.scheduler.step(tuple(events))
        self.events.append(events)
        self.plans.append(plan)
        for name, tokens in plan.cached:
            assert self.requests[name].read is None, "a sequence is admitted twice"
            self.requests[name].read = tokens
        if plan.reads:
            most = self.config.chunk_shape(plan.reads[0].program)[1]
            assert len(plan.reads) <= most and len({read.program for read in plan.reads}) == 1
            self._check_gap(bool(running - {placed.id for placed in plan.offload}))
        for read in plan.reads:
            self._check_read(read)
        self.device.run(plan)
        assert [begin.id for begin in plan.begin] == [read.id for read in plan.reads if read.last]
        for begin in plan.begin:
            self._draw(begin.id)
        counting = {row.request.arrival.id for row in self.device.rows if row and not row.request.how}
        if plan.decode:
            want = {name for name in counting if self.requests[name].drawn < self.requests[name].arrival.max_tokens}
            assert {name for _, name in plan.rows} == want, "a running row does not decode"
            for number, name in plan.rows:
                row = self.device.rows[number]
                assert row and row.request.arrival.id == name
                self._draw(name)
        for name in counting:
            assert self.requests[name].chunks_since <= self.config.chunks_between, "an answer waits too long"
        for name in plan.ended:
            assert self.requests[name].drawn == self.requests[name].arrival.max_tokens
            self._end(name, "length")
        assert not any(
            request.drawn == request.arrival.max_tokens and not request.how for request in self.requests.values()
        )
        self._check_turns(plan)
        if events or plan != Plan(rows=plan.rows):
            self._check_pages()

    def _draw(self, name: str) -> None:
        request = self.requests[name]
        assert not request.how
        request.drawn, request.chunks_since = request.drawn + 1, 0
        if request.drawn == request.stop:
            # The next step is out before this is known.
            self.due[len(self.plans) + 1].append(Ended(name))

    def _end(self, name: str, how: str) -> None:
        request = self.requests[name]
        if not request.how:
            request.how = how
            self.counts[how] += 1
            row = next((row for row in self.device.rows if row and row.request is request), None)
            if row:
                self.device.check(request, row.pages, row.length)

    def _check_read(self, read: Read) -> None:
        """A chunk is the next one of its prompt, as it is read alone."""
        request = self.requests[read.id]
        assert not request.how and read.start == request.read
        assert (read.program, read.start, read.count) in request.chunks, "alone it is read in other chunks"
        request.read = read.start + read.count
        assert request.read <= request.ready, "a chunk is not ready"
        assert read.last == (request.read == request.arrival.prompt_tokens)

    def _check_gap(self, running: bool) -> None:
        """Before a step that reads there is no decoding too few."""
        if running and self.decodes:
            assert self.decodes >= self.config.decodes_between, "chunks come too often"
        for row in self.device.rows:
            if row:
                row.request.chunks_since += 1
        self.decodes = 0

    def _check_turns(self, plan: Plan) -> None:
        """A prompt that has its place and a chunk to read does not wait for more decode steps than it must."""
        self.decodes += plan.decode
        pending = any(
            not request.how
            and request.read is not None
            and any(start == request.read and start + count <= request.ready for _, start, count in request.chunks)
            for request in self.requests.values()
        )
        self.overdue = self.overdue + 1 if pending and not plan.reads else 0
        most = MOST_DECODES if self.config.target_gap_ms else self.config.decodes_between
        assert self.overdue <= most, "a prompt waits too long"

    def _check_pages(self) -> None:
        """Every page is on one free list, or held by as many as its allocator says."""
        manager = self.scheduler._pages
        allocator = manager._allocator
        holders: collections.Counter[int] = collections.Counter()
        for sequence in self.scheduler._sequences.values():
            holders.update(sequence.pages)
            assert len(set(sequence.pages)) == len(sequence.pages)
        used = set(holders)
        for block in manager._blocks.values():
            holders.update(block.pages)
            assert (block.key in manager._unheld[block.home]) == used.isdisjoint(block.pages)
        assert manager.cached_pages == len(set(holders) - used), "unheld pages are counted wrongly"
        free = [page for pages in allocator._free for page in pages]
        assert sorted([*free, *holders]) == list(range(allocator.page_count)), "a page is lost or held twice"
        assert +allocator._holders == holders


def _request(name: str, prompt: int, most: int, text: list[int], number: int, config: SchedulerConfig) -> Request:
    """A request for the first tokens of a text; what is no whole block is its own."""
    large = prompt // config.large * config.large
    hashes, expected, last = [], np.zeros(prompt + most, np.int64), b""
    for start in range(0, prompt, config.small):
        end = min(start + config.small, prompt)
        label = text[start // config.small] if end - start == config.small else f"rest of {name}"
        last = hashlib.sha256(last + str(label).encode()).digest()
        # Positive where the large program writes, negative where the small one does.
        sign = 1 if end <= large else -1
        expected[start:end] = sign * (int.from_bytes(last[:6]) + np.arange(start, end))
        if end - start == config.small:
            hashes.append(last)
    expected[prompt:] = (number << 50) + np.arange(most)
    chunks = [("large", start, config.large) for start in range(0, large, config.large)]
    chunks += [("small", start, min(config.small, prompt - start)) for start in range(large, prompt, config.small)]
    return Request(Arrival(name, prompt, most, tuple(hashes)), expected, chunks, most)


def run(seed: int, number: int) -> tuple[collections.Counter[str], str, str]:
    """Runs a trace; returns counts, a hash of its plans, and the traceback of what was found or ""."""
    trace, found = Trace(seed, number), ""
    try:
        trace.run()
    except Exception:
        found = traceback.format_exc()
    return trace.counts, hashlib.sha256(repr(trace.plans).encode()).hexdigest(), found


def main() -> int:
    """Parses the command line, runs the traces and prints; returns 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_scheduler", description=__doc__)
    parser.add_argument("--traces", type=int, default=10_000, metavar="N", help="how many traces")
    parser.add_argument("--seed", type=int, default=0, help="other traces for another seed")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that run traces side by side")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run only this trace")
    arguments = parser.parse_args()
    numbers = range(arguments.traces) if arguments.only is None else [arguments.only]
    counts: collections.Counter[str] = collections.Counter()
    findings, plans = 0, hashlib.sha256()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        outcomes = pool.map(functools.partial(run, arguments.seed), numbers, chunksize=16)
        for number, (found_counts, digest, found) in zip(numbers, outcomes, strict=True):
            counts += found_counts
            plans.update(digest.encode())
            if found:
                findings += 1
                print(f"trace {number}, seed {arguments.seed}:\n{found}", flush=True)
            if (number + 1) % 1000 == 0:
                print(f"{number + 1:,} of {len(numbers):,}", file=sys.stderr, flush=True)
    print(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(counts.items())))
    print(f"plans {plans.hexdigest()}")
    print(f"{findings:,} findings in {len(numbers):,} traces, seed {arguments.seed}")
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
