"""The time in which kernels run, from when each begins and ends."""

import pytest

from keye_jax.bench.jobs import kernel_time


def test_kernels_that_run_side_by_side_count_once():
    found = kernel_time([(2.0, 3.0), (0.0, 1.0), (0.5, 1.5), (0.6, 0.7)])
    assert found.busy_s == pytest.approx(2.5)
    assert found.gaps_s == pytest.approx((0.0, 0.0, 0.5))


def test_gaps_by_their_length():
    found = kernel_time([(5.0, 6.0), (6.0 + 1e-5, 7.0), (7.0 + 1e-4, 8.0), (8.5, 9.0)])
    assert found.gaps_s == pytest.approx((1e-5, 1e-4, 0.5))
    assert found.busy_s == pytest.approx(3.5 - 1.1e-4)
