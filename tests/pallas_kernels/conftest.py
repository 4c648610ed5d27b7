"""Every operation's tests run against every implementation that works on this machine."""

import contextlib

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import available
from pallas_kernels.errors import UnsupportedError


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """What an accelerated implementation refuses is not its failure; the portable one takes everything."""
    try:
        return (yield)
    except UnsupportedError as error:
        if "xla: " in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(params=dict.fromkeys([*available(), "mosaic_tpu"]))
def implementation(request):
    """Each name in turn; what is for a TPU is interpreted elsewhere, its memories, copies and semaphores simulated."""
    interpreted = request.param == "mosaic_tpu" and "mosaic_tpu" not in available()
    with pltpu.force_tpu_interpret_mode() if interpreted else contextlib.nullcontext():
        yield request.param


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 matrices are multiplied as such: left to itself, JAX rounds them on a GPU."""
    with jax.default_matmul_precision("highest" if jax.default_backend() == "gpu" else None):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
