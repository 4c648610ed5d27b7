"""The numbering of steps by which index scores divide their work is checked against counting."""

import itertools

import numpy as np
import pytest

from pallas_kernels.indexer_scores.mosaic_gpu.shares import EqualSteps, SeenSteps


def check(work, counts):
    """Of blocks that have `counts` steps: every part of them is found."""
    ends = np.cumsum(counts)
    assert int(work.total) == ends[-1]
    for block in np.flatnonzero(counts):
        assert int(work.count(block)) == counts[block]
        assert int(work.before(block)) == ends[block] - counts[block]
    cuts = np.unique(np.linspace(0, ends[-1], 14).astype(int))
    for first, end in [*itertools.pairwise(cuts), (0, ends[-1])]:
        block_first, block_end = (int(x) for x in work.blocks_of(np.int32(first), np.int32(end)))
        own = np.searchsorted(ends, [first, end - 1], side="right")
        assert (block_first, block_end) == (own[0], own[1] + 1)
    for at in (0, ends[-1]):
        block_first, block_end = work.blocks_of(np.int32(at), np.int32(at))
        assert block_first == block_end, "no steps are in no block"


@pytest.mark.parametrize("skip_below", [0, 100, 2048])
@pytest.mark.parametrize("steps", [2, 9, 40])
@pytest.mark.parametrize("start", [0, 1, 15, 16, 200, 1111, 2047, 2048, 5000])
def test_seen_steps(start, steps, skip_below):
    block, step, blocks = 16, 256, 61
    work = SeenSteps.of(np.int32(start), blocks, block, step=step, steps=steps, skip_below=skip_below)
    last = start + (np.arange(blocks) + 1) * block - 1
    counts = np.where(last < skip_below, 0, np.minimum(last // step + 1, steps))
    needed = np.minimum(
        (start + np.minimum((np.arange(blocks) + 1) * block, blocks * block - 5) - 1) // step + 1, steps
    )
    assert (counts >= np.where(last < skip_below, 0, needed)).all(), "also where the last block is not full"
    if counts.any():
        check(work, counts)
    else:
        assert int(work.total) == 0


def test_a_sequence_that_sees_nothing_has_the_steps_of_one_that_begins():
    work = SeenSteps.of(np.int32(-1), 4, 16, step=64, steps=8, skip_below=0)
    check(work, np.array([1, 1, 1, 1]))


def test_equal_steps():
    check(EqualSteps(7, np.int32(5)), np.full(7, 5))
    assert EqualSteps(7, np.int32(0)).total == 0
