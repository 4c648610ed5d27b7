"""Every operation's tests run against every implementation that works on this machine."""

import contextlib

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import available
from pallas_kernels.errors import UnsupportedError

INTERPRETED = {
    "test_attention.py": {
        "TestSparseAttention": {
            "test_decode[bfloat16-mosaic_tpu]",
            "test_nothing_selected[bfloat16-mosaic_tpu]",
            "test_selections[float32-mosaic_tpu-64]",
        },
        "TestPagedFlashAttention": {
            "test_lengths[float32-mosaic_tpu-60-700]",
            "test_sequences_of_different_lengths[bfloat16-mosaic_tpu]",
            "test_a_query_that_sees_nothing[float32-mosaic_tpu]",
        },
        "TestFlashAttention": {"test_bidirectional_with_lengths[bfloat16-mosaic_tpu-512]"},
    },
    "test_grouped_matmul.py": {
        "TestGroupedMatmul": {"test_decode[bfloat16-mosaic_tpu-16]"},
        "TestExpertMlp": {"test_group_sizes[bfloat16-mosaic_tpu-rows that belong to no group]"},
    },
    "test_indexer_scores.py": {
        "TestBfloat16": {
            "test_matches_the_formula[mosaic_tpu-queries no multiple of 8]",
            "test_matches_the_formula[mosaic_tpu-decode, several steps of keys]",
        },
    },
    "test_select_topk.py": {
        "TestSelectTopk": {
            "test_long_rows[mosaic_tpu-ties]",
            "test_scores_that_share_their_leading_bits[mosaic_tpu]",
            "test_infinities[mosaic_tpu]",
        },
    },
    "test_topk_attention.py": {
        "TestTopkAttention": {
            "test_queries[bfloat16-mosaic_tpu-64-40]",
            "test_lengths_about_top_k[float32-mosaic_tpu-65]",
            "test_ties[bfloat16-mosaic_tpu]",
        },
    },
}
"""What is interpreted for TPUs in `make test`: interpretation is slow, and everything takes ten minutes."""


def pytest_collection_modifyitems(config, items):
    """Without a TPU, leaves out what is for one and neither quick nor asked for by `--interpret-all`."""
    if "mosaic_tpu" in available() or config.getoption("interpret_all"):
        return

    def chosen(item):
        if getattr(item, "callspec", None) is None or item.callspec.params.get("implementation") != "mosaic_tpu":
            return True
        return item.name in INTERPRETED[item.path.name].get(item.parent.name, ())

    left_out = [item for item in items if not chosen(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if chosen(item)]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """What an accelerated implementation refuses is not its failure; the portable one takes everything."""
    try:
        return (yield)
    except UnsupportedError as error:
        if "xla: " in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(params=(*available(), "mosaic_tpu") if jax.default_backend() == "cpu" else available())
def implementation(request):
    """Each name in turn; what is for a TPU is interpreted on a CPU, its memories, copies and semaphores simulated."""
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
