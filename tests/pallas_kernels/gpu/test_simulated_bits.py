"""A NumPy machine runs the kernel that writes selections as bitmaps."""

import numpy as np
import pytest

from pallas_kernels.gpu.machine import SHARED_WORDS
from pallas_kernels.select_topk.mosaic_gpu import bits_body, bits_plan
from pallas_kernels.select_topk.mosaic_gpu.row_reader import RowPlan
from tests.pallas_kernels.gpu.numpy_machine import NumpyMachine
from tests.pallas_kernels.gpu.test_simulated_selection import KINDS, SIZE, THREADS, K, make_scores, oracle
from tests.pallas_kernels.gpu.union_lists import UNWRITTEN, bitmaps

ROWS = 4
PLANS = {
    "few slots": RowPlan(SIZE, K, THREADS, slots=4, spill=160, stages=3, samples=512),
    "more slots": RowPlan(SIZE, K, THREADS, slots=8, spill=160, stages=3, samples=512),
    "short rows": bits_plan(200, SIZE, K)[0],
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_selection(kind, plan):
    """Of rows of which the first two and the other two are groups. No score behind a length is read."""
    scores = make_scores(kind, np.random.default_rng(4), ROWS)
    for given in ([0, 1, K, K + 1], [64, 5001, SIZE, 33], [K - 1, 128, SIZE - 3, 4096]):
        lengths = np.array(given, np.int32)
        hidden = np.where(np.arange(SIZE) < lengths[:, None], scores, np.nan).astype(np.float32)
        reach = lengths.reshape(2, 2).max(1)
        expected = bitmaps(oracle(hidden, lengths), np.repeat(reach, 2))
        bits = np.full(expected.shape, UNWRITTEN, np.uint32)
        for row in range(ROWS):
            machine = NumpyMachine(plan.threads, 1, plan.words, row)
            arrays = hidden.view(np.uint32), lengths.view(np.uint32), reach.astype(np.uint32), bits
            shapes = {"rows": ROWS, "groups": len(reach), "plan": plan, "width": bits.shape[1]}
            bits_body(machine, *arrays, machine.word(row), machine.rank, **shapes)
        np.testing.assert_array_equal(bits, expected)


@pytest.mark.parametrize("k", [1, 2048, 4096])
def test_teams_fit_a_block(k):
    """Rows of up to 32K have four small teams, unless k scores of each do not fit."""
    for size in (4, 2048, 32_768, 32_772, 131_072, 524_288):
        plan, teams = bits_plan(200, size, k)
        assert teams * plan.words <= SHARED_WORDS
        assert teams * plan.threads <= 1024
        assert (teams == 4) == (size <= 32_768 and k <= 2048)
