"""How warpgroups of the Hopper kernel for experts of fewer bits take turns at the steps of a block's units."""

import numpy as np
import pytest

from pallas_kernels.grouped_matmul.mosaic_gpu.quantized import own_steps


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("k_steps", [1, 2, 3, 4, 5, 6, 16])
def test_every_step_has_one_part_and_the_next_step_the_next_one(k_steps, parts):
    owners = np.full((9, k_steps), -1)
    for unit in range(len(owners)):
        for part in range(parts):
            first, count = (int(x) for x in own_steps(np.int32(part), np.int32(unit), k_steps, parts))
            steps = first + parts * np.arange(count)
            assert (owners[unit, steps] == -1).all()
            owners[unit, steps] = part
    np.testing.assert_array_equal(owners.reshape(-1), np.arange(owners.size) % parts)
