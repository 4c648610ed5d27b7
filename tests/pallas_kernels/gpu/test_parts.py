"""How the Hopper kernel for index scores of single queries shares sequences out among blocks."""

import numpy as np
import pytest

from pallas_kernels.gpu.hopper import MULTIPROCESSORS
from pallas_kernels.indexer_scores.mosaic_gpu.decode import parts

STEPS = {
    "one sequence": [1024],
    "fewer steps than blocks": [0, 0, 17, 0, 1],
    "no steps": [0, 0, 0],
    "one of many has steps": [0] * 20 + [256] + [0] * 11,
    "ends between blocks": [MULTIPROCESSORS, 0, 2 * MULTIPROCESSORS, 0],
    "many sequences": [int(n) for n in np.random.default_rng(0).integers(0, 300, 64)],
}


@pytest.mark.parametrize("case", STEPS)
def test_blocks_have_all_steps_once_and_in_equal_parts(case):
    steps = np.array(STEPS[case], np.int32)
    wanted = [(sequence, step) for sequence, count in enumerate(steps) for step in range(count)]
    found, sizes = [], []
    for first, behind, begin, count in np.asarray(parts(steps)):
        own = [(b, step) for b in range(first, behind) for step in range(begin if b == first else 0, steps[b])]
        found += own[:count]
        sizes.append(count)
        assert len(own) >= count
        assert not count or own[count - 1][0] == behind - 1, "no sequence behind the last step is looked at"
    assert found == wanted
    assert max(sizes) - min(sizes) <= 1
