"""Every operation's tests run against every implementation that works on this machine."""

import numpy as np
import pytest

from pallas_kernels.dispatch import available


@pytest.fixture(params=available())
def implementation(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(0)
