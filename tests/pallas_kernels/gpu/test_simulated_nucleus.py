"""A NumPy machine runs the search for the nucleus. It tests logic, not races, without a GPU."""

import dataclasses

import numpy as np
import pytest

from pallas_kernels import kernel_call, nucleus
from pallas_kernels.nucleus import mosaic_gpu
from tests.pallas_kernels.gpu.numpy_machine import numpy_launch
from tests.pallas_kernels.nucleus_oracle import CASES, assert_nucleus, logits_of


@pytest.fixture(autouse=True)
def in_numpy(monkeypatch):
    """Lets the public function run its kernel in a NumPy machine."""
    monkeypatch.setattr(kernel_call, "interpreted", lambda name: True)
    monkeypatch.setattr(mosaic_gpu, "launch", numpy_launch)


def found(logits, top_k, top_p, active=None):
    active = np.ones(len(logits), np.int32) if active is None else active
    return [np.asarray(x) for x in nucleus(logits, top_k, top_p, active, implementation="mosaic_gpu")]


@pytest.mark.parametrize("kind", CASES)
def test_nucleus(kind):
    logits = logits_of(kind, 4, 2052)
    for top_k in (0, 1, 20, 2048):
        limits, shares = np.full(4, top_k, np.int32), np.asarray([1e-6, 0.5, 0.95, 1], np.float32)
        assert_nucleus(logits, limits, shares, *found(logits, limits, shares))


@pytest.mark.parametrize("cluster", [1, 3])
def test_clusters(monkeypatch, cluster):
    plan = mosaic_gpu.nucleus_plan
    monkeypatch.setattr(mosaic_gpu, "nucleus_plan", lambda *sizes: dataclasses.replace(plan(*sizes), cluster=cluster))
    logits = logits_of("normal", 2, 6 * 2048 + 4)
    limits, shares = np.asarray([0, 100], np.int32), np.asarray([0.9, 0.8], np.float32)
    assert_nucleus(logits, limits, shares, *found(logits, limits, shares))


def test_a_row_does_not_depend_on_others():
    logits = logits_of("normal", 4, 2048)
    limits, shares = np.asarray([0, 5, 0, 40], np.int32), np.asarray([0.3, 0.9, 0.99, 1], np.float32)
    together = found(logits, limits, shares, np.asarray([1, 0, 1, 1], np.int32))
    for row in (0, 2, 3):
        alone = found(logits[row:][:1], limits[row:][:1], shares[row:][:1])
        assert [x[row] for x in together] == [x[0] for x in alone]


def test_refused():
    with pytest.raises(NotImplementedError, match="multiple of 4"):
        mosaic_gpu.nucleus_plan(1, 1002)
    with pytest.raises(NotImplementedError, match="too long for 4 blocks"):
        mosaic_gpu.nucleus_plan(32, 1 << 18)
