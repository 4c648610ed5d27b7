"""Sequences that share, leave and join a pool, and chunks of several of them: all as each sequence alone.

On one device and on eight virtual ones, where the pool's pages lie on several. Sequences are longer than top_k and than
several pages.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from keye_jax.page_allocator import PAGE_SIZE, PageAllocator, pages_for
from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams
from tests.keye_jax.golden_models import Trace, golden_model, preset, random_ids, rules_of, text, traced, traced_decode
from tests.near_ties import assert_leads, selection_leads

LENGTH = 3 * PAGE_SIZE + 40
"""Tokens of a text."""

PREFIX = 2 * PAGE_SIZE
"""Tokens that texts 0 and 1 have in common: whole pages."""

SEEDS = (2, 8, 51, 46)
"""Of texts whose selections are all `LEAD` ahead."""

LEAD = 4e-4
ATOL = 5e-4

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@functools.cache
def runtime_on(where: str) -> Runtime:
    """Two layers of a golden model on one device, or on eight by a preset. Chunks are smaller than a text."""
    model, config = golden_model("a", 2)
    if where == "one device":
        return Runtime(model, config, prefill_chunk=512)
    rules = (
        rules_of(config, {"x": 2, "y": 4}, {"batch": ["y", "x"], "query_sequence": "y", "experts": ["x", "y"]})
        if where == "homes in another order"
        else preset(where, config)
    )
    return Runtime(model, config, rules=rules, prefill_chunk=64)


@pytest.fixture(params=["one device", "expert", "combined", "sequence", "homes in another order"], scope="module")
def runtime(request) -> Runtime:
    return runtime_on(request.param)


def ids(number: int) -> np.ndarray:
    """A text."""
    made = random_ids(LENGTH, SEEDS[number])
    if number == 1:
        made[:PREFIX] = ids(0)[:PREFIX]
    return made


@functools.cache
def alone(number: int) -> Trace:
    """What one device computes of a text by itself; its choices are safe."""
    runtime = runtime_on("one device")
    pool, tables = runtime.new_cache(1, LENGTH)
    trace, _ = traced(runtime, text(ids(number), tables[0]), pool)
    assert_leads(selection_leads(trace.scores, runtime.config.sa_config.topk), LEAD)
    return trace


class Batch:
    """A pool with its allocator, and a batch of decode: three rows on each home."""

    ROWS = 3

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.homes = runtime.rules.size("batch")
        self.width = runtime.table_width(LENGTH)
        self.pool = runtime.new_pool(self.ROWS * self.homes * self.width)
        self.pages = PageAllocator(self.pool.page_count, homes=self.homes, turns=runtime.page_multiple)
        self.state = runtime.new_state(self.ROWS * self.homes, self.width)
        self.rows: dict[int, tuple[int, int, np.ndarray]] = {}

    def take(self, home: int = 0, shared: np.ndarray | None = None) -> np.ndarray:
        """Pages for a text, the first ones those that are shared."""
        shared = np.zeros(0, np.int32) if shared is None else shared
        self.pages.share(shared)
        return np.concatenate([shared, self.pages.allocate(self.width - len(shared), home=home, first=len(shared))])

    def prefill(self, *parts: tuple[int, np.ndarray, int, int]) -> None:
        """Reads tokens `start` to `end - 1` of each `(text, pages, start, end)`; their logits are as alone."""
        segments = [text(ids(number), pages, start, end=end) for number, pages, start, end in parts]
        logits, self.pool = self.runtime.prefill(segments, self.pool)
        for (number, _, _, end), found in zip(parts, np.asarray(logits), strict=True):
            assert_as_alone(found, number, end - 1)

    def join(self, row: int, number: int, length: int, pages: np.ndarray) -> None:
        """A row is to go on with a text's token at `length`."""
        self.rows[row] = number, length, pages
        self.state = self.runtime.set_row(
            self.state,
            row,
            token=int(ids(number)[length]),
            length=length,
            position_delta=0,
            pages=pages,
            sampling=SamplingParams(temperature=0),
        )

    def leave(self, row: int) -> None:
        _, _, pages = self.rows.pop(row)
        self.pages.release(pages)
        self.state = self.runtime.clear_rows(self.state, [row])

    def decode(self) -> None:
        """Reads the next token of each row; its logits, and the sets it selects, are as alone."""
        logits, self.state, self.pool = self.runtime.decode(self.state, self.pool)
        for row, (number, length, _) in self.rows.items():
            assert_as_alone(np.asarray(logits[row]), number, length)
        count = len(self.state.tokens)
        tokens, lengths = np.zeros(count, np.int32), np.full(count, -1, np.int32)
        tables = np.zeros((count, self.width), np.int32)
        for row, (number, length, pages) in self.rows.items():
            tokens[row], lengths[row], tables[row] = ids(number)[length], length, pages
        trace, self.pool = traced_decode(self.runtime, tokens, lengths, tables, self.pool)
        for row, (number, length, pages) in self.rows.items():
            np.testing.assert_array_equal(trace.selected[:, row], alone(number).selected[:, length])
            self.join(row, number, length + 1, pages)


def assert_as_alone(logits: np.ndarray, number: int, position: int) -> None:
    expected = alone(number).logits[position]
    np.testing.assert_allclose(logits, expected, atol=ATOL, err_msg=f"text {number} at {position}")


def test_pages_in_any_order(runtime: Runtime):
    """Where pages take turns on shards, each may be any of its shard's."""
    batch, rng = Batch(runtime), np.random.default_rng(0)
    turns = batch.pages.turns
    free = np.stack([batch.take(), batch.take()]).reshape(-1, turns)
    pages = rng.permuted(free, axis=0).reshape(-1)[: batch.width]
    assert not np.array_equal(pages, free.reshape(-1)[: batch.width])
    trace, batch.pool = traced(runtime, text(ids(0), pages), batch.pool)
    np.testing.assert_allclose(trace.logits, alone(0).logits, atol=ATOL)
    np.testing.assert_array_equal(trace.selected, alone(0).selected)


def test_sequences_that_share_leave_and_join(runtime: Runtime):
    """Texts 0 and 1 share the pages of their prefix, which is read once. Text 0 leaves, and text 3 takes its pages.

    Chunks are of several texts, each from where it stands, also in the middle of a page.
    """
    batch = Batch(runtime)
    other = 1 % batch.homes
    pages = {0: batch.take(0)}
    pages[1] = batch.take(0, shared=pages[0][: pages_for(PREFIX)])
    pages[2] = batch.take(other)
    batch.prefill((2, pages[2], 0, 30), (0, pages[0], 0, PREFIX))
    batch.prefill((0, pages[0], PREFIX, 200), (1, pages[1], PREFIX, 150), (2, pages[2], 30, 171))
    rows = {0: 0, 1: 1, 2: other * Batch.ROWS + 2}
    for number, length in ((0, 200), (1, 150), (2, 171)):
        batch.join(rows[number], number, length, pages[number])
    batch.decode()
    batch.decode()

    batch.leave(rows[0])
    batch.decode()
    pages[3] = batch.take(0)
    assert not set(pages[3]).isdisjoint(pages[0])
    assert set(pages[3]).isdisjoint(pages[1]) and set(pages[3]).isdisjoint(pages[2])
    batch.prefill((3, pages[3], 0, 190))
    batch.decode()
    batch.join(0, 3, 190, pages[3])
    batch.decode()
    assert {row: length for row, (_, length, _) in batch.rows.items()} == {0: 191, 1: 155, rows[2]: 176}


def test_segments_from_any_start_select_as_alone(runtime: Runtime):
    """A text in parts that begin and end anywhere."""
    batch = Batch(runtime)
    batch.take()
    pages, parts = batch.take(1 % batch.homes), []
    for start, end in ((0, 50), (50, 51), (51, 190), (190, LENGTH)):
        trace, batch.pool = traced(runtime, text(ids(2), pages, start, end=end), batch.pool)
        parts.append(trace)
    trace = Trace.join(parts)
    np.testing.assert_allclose(trace.logits, alone(2).logits, atol=ATOL)
    np.testing.assert_array_equal(trace.selected, alone(2).selected)
