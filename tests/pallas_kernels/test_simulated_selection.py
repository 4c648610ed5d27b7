"""The bodies of the GPU selection kernels, run by a NumPy machine: logic, not races, and no GPU needed."""

import numpy as np
import pytest

from pallas_kernels.select_topk import thresholds as threshold_kernel
from pallas_kernels.select_topk import unions as union_kernel
from tests.pallas_kernels.simt import NumpyMachine

ROWS, SIZE, K, THREADS, CAPACITY, SAMPLES = 4, 6004, 100, 128, 512, 512


def make_scores(kind, rng):
    scores = rng.standard_normal((ROWS, SIZE)).astype(np.float32)
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
    return scores.astype(np.float32)


def oracle(scores, lengths):
    selected = np.zeros(scores.shape, bool)
    for row, length in enumerate(lengths):
        values = np.where(scores[row, :length] == 0, 0.0, scores[row, :length])
        selected[row, np.argsort(-values, kind="stable")[:K]] = True
    return selected


def thresholds(scores, lengths, cluster):
    threshold, last_tie = np.zeros(ROWS, np.uint32), np.zeros(ROWS, np.uint32)
    for row in range(ROWS):
        machine = NumpyMachine(THREADS, cluster, threshold_kernel.BUFFER + 2 * CAPACITY + threshold_kernel.BINS, row)
        threshold_kernel.threshold_body(
            machine,
            scores.view(np.uint32),
            lengths.astype(np.uint32),
            threshold,
            last_tie,
            machine.word(row),
            machine.rank,
            rows=ROWS,
            size=SIZE,
            k=K,
            capacity=CAPACITY,
            samples=SAMPLES,
            unroll=2,
        )
    return threshold, last_tie


def unions(scores, lengths, threshold, last_tie, group, cluster):
    limit = group * K
    positions, members = (np.full((ROWS // group, limit), 7, np.uint32) for _ in range(2))
    counts = np.zeros(ROWS // group, np.uint32)
    cluster, words = union_kernel.union_cluster(ROWS // group, group, SIZE, cluster, THREADS)
    for index in range(ROWS // group):
        machine = NumpyMachine(THREADS, cluster, words, index)
        union_kernel.union_body(
            machine,
            scores.view(np.uint32),
            threshold,
            last_tie,
            lengths.astype(np.uint32),
            positions,
            None if group == 1 else members,
            None if group == 1 else counts,
            machine.word(index),
            machine.rank,
            rows=ROWS,
            size=SIZE,
            group=group,
            limit=limit,
        )
    return positions, members, counts


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("kind", ["normal", "clustered", "ties", "zeros", "constant", "infinite", "front"])
def test_selection_and_unions(kind, cluster):
    rng = np.random.default_rng(cluster)
    scores = make_scores(kind, rng)
    lengths = np.array([SIZE, SIZE - 3, K + 1, 50] if cluster == 1 else [0, 1, SIZE - 1, 5001])
    for row, length in enumerate(lengths):
        scores[row, length:] = np.nan
    threshold, last_tie = thresholds(scores, lengths, cluster)
    at, limit, tie = np.arange(SIZE), threshold.view(np.float32)[:, None], last_tie.view(np.int32)[:, None]
    with np.errstate(invalid="ignore"):
        selected = (at < lengths[:, None]) & ((scores > limit) | ((scores == limit) & (at <= tie)))
    expected = oracle(scores, lengths)
    np.testing.assert_array_equal(selected, expected)

    positions, members, counts = unions(scores, lengths, threshold, last_tie, 4, cluster)
    union = np.flatnonzero(expected.any(0))
    words = (expected[:, union] << np.arange(4)[:, None]).sum(0)
    assert counts[0] == len(union)
    np.testing.assert_array_equal(positions[0], np.pad(union, (0, 4 * K - len(union))))
    np.testing.assert_array_equal(members[0], np.pad(words, (0, 4 * K - len(union))))

    positions, _, _ = unions(scores, lengths, threshold, last_tie, 1, cluster)
    for row in range(ROWS):
        own = np.flatnonzero(expected[row])
        assert (positions[row, : len(own)] == own).all()
        assert (positions[row, len(own) :].view(np.int32) == -1).all()
