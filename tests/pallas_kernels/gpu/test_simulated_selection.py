"""A NumPy machine runs the bodies of the GPU selection kernels. It tests logic, not races, without a GPU."""

import functools

import numpy as np
import pytest

from pallas_kernels.select_topk.mosaic_gpu import few_rows, row_body
from pallas_kernels.select_topk.mosaic_gpu.row_reader import RowPlan
from tests.pallas_kernels.gpu.numpy_machine import NumpyMachine

ROWS, SIZE, K, THREADS = 5, 6004, 100, 128
KINDS = ("normal", "clustered", "ties", "zeros", "constant", "infinite", "front", "periodic")


def make_scores(kind, rng, rows=ROWS):
    scores = rng.standard_normal((rows, SIZE)).astype(np.float32)
    match kind:
        case "clustered":
            scores = 1 + scores * 1e-5
        case "ties":
            scores = np.round(scores * 2) / 2
        case "zeros":
            signs = np.where(rng.random(scores.shape) < 0.5, 0.0, -0.0)
            scores = np.where(rng.random(scores.shape) < 0.99, signs, scores)
        case "constant":
            scores[:] = 3
        case "infinite":
            scores = np.where(rng.random(scores.shape) < 0.99, -np.inf, scores)
        case "front":
            scores = scores * 0.01 + np.where(np.arange(SIZE) < 150, 50, 0)
        case "periodic":
            scores = scores * 0.01 + np.where(np.arange(SIZE) % (4 * THREADS) < 40, 50, 0)
    return scores.astype(np.float32)


def oracle(scores, lengths):
    selected = np.zeros(scores.shape, bool)
    for row, length in enumerate(lengths):
        values = np.where(scores[row, :length] == 0, 0.0, scores[row, :length])
        selected[row, np.argsort(-values, kind="stable")[:K]] = True
    return selected


def select(scores, lengths, body, plan, words):
    positions = np.full((ROWS, K), 7, np.uint32)
    for row in range(ROWS):
        machine = NumpyMachine(THREADS, plan.cluster, words, row)
        body(
            machine,
            scores.view(np.uint32),
            lengths.astype(np.uint32),
            positions,
            machine.word(row),
            machine.rank,
            rows=ROWS,
            plan=plan,
        )
    return positions.view(np.int32)


def check_selection(kind, cluster, body, plan, words):
    rng = np.random.default_rng(cluster)
    scores = make_scores(kind, rng)
    given = np.array([-3, 1, SIZE - 1, 5001, 1999] if cluster == 2 else [SIZE + 9, SIZE - 3, K + 1, 50, 4000])
    lengths = given.clip(0, SIZE)
    for row, length in enumerate(lengths):
        scores[row, length:] = np.nan
    positions = select(scores, given, body, plan, words)
    for own, expected in zip(positions, oracle(scores, lengths), strict=True):
        expected = np.flatnonzero(expected)
        np.testing.assert_array_equal(own, np.pad(expected, (0, K - len(expected)), constant_values=-1))


@pytest.mark.parametrize(("cluster", "slots"), [(1, 4), (1, 8), (2, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_selection(kind, cluster, slots):
    plan = RowPlan(SIZE, K, THREADS, cluster, slots=slots, spill=160, stages=3, samples=512)
    check_selection(kind, cluster, row_body, plan, plan.words)


@pytest.mark.parametrize("cluster", [2, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_selection_of_few_rows(kind, cluster):
    plan = few_rows.HeldRowPlan(SIZE, K, cluster, THREADS)
    check_selection(kind, cluster, few_rows.few_rows_body, plan, few_rows.WORDS)


@pytest.mark.parametrize("cluster", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_selection_that_holds_short_rows_only(kind, cluster):
    plan = RowPlan(SIZE, K, THREADS, cluster, slots=4, spill=160, stages=3, samples=512)
    short = few_rows.HeldRowPlan(5120, K, cluster, THREADS)
    body = functools.partial(row_body, short=short)
    check_selection(kind, cluster, body, plan, max(plan.words, few_rows.WORDS))
