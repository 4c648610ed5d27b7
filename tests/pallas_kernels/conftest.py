"""Every operation's tests run against every implementation that works on this machine."""

import contextlib
from unittest import mock

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import available
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.topk_attention.mosaic_tpu import attention as union_attention
from tests.pallas_kernels.attention_oracle import FORMS
from tests.pallas_kernels.subcore_machine import SubcoreInfo, simulated_subcores

SIMULATED = ("mosaic_tpu", "sparse_core")
"""Implementations whose kernels a CPU runs in an interpreter or a machine of NumPy."""

SUBCORES = SubcoreInfo(num_cores=2, num_subcores=4, num_lanes=8, vmem_capacity_bytes=2**17)
"""Fewer subcores than a TPU's, with less memory: long rows need teams of several, and a team has several rows."""

INTERPRETED = {
    "test_sparse_attention.py": {
        "TestSparseAttention": {
            "test_decode[bfloat16-mosaic_tpu]",
            "test_nothing_selected[bfloat16-mosaic_tpu]",
            "test_selections[float32-mosaic_tpu-64]",
        },
    },
    "test_flash_attention.py": {
        "TestPagedFlashAttention": {
            "test_lengths[float32-mosaic_tpu-60-700]",
            "test_sequences_of_different_lengths[bfloat16-mosaic_tpu]",
            "test_a_query_that_sees_nothing[float32-mosaic_tpu]",
            "test_scales_that_are_not_positive[bfloat16-mosaic_tpu--1]",
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
        "TestFloat8": {"test_matches_the_formula[mosaic_tpu-few queries]"},
    },
    "test_select_topk.py": {
        "TestSelectTopk": {
            "test_long_rows[mosaic_tpu-ties]",
            "test_scores_that_share_their_leading_bits[mosaic_tpu]",
            "test_infinities[mosaic_tpu]",
            "test_long_rows[sparse_core-ties]",
            "test_random[sparse_core-64]",
            "test_many_ties[sparse_core]",
            "test_lengths_about_k[sparse_core-64]",
            "test_zeros_of_both_signs_are_equal[sparse_core]",
            "test_infinities[sparse_core]",
            "test_leading_axes[sparse_core]",
        },
    },
    "test_out_of_range.py": {
        "TestSelectTopk": {
            "test_scores_that_are_no_numbers_count_as_infinity[mosaic_tpu]",
            "test_scores_that_are_no_numbers_count_as_infinity[sparse_core]",
            "test_lengths_out_of_range_are_the_nearest_in_range[sparse_core]",
            "test_lengths_out_of_range_are_the_nearest_in_range[mosaic_tpu]",
        },
        "TestSparseAttention": {
            "test_positions_from_the_capacity_on_are_ignored[mosaic_tpu]",
            "test_pages_out_of_range_are_the_nearest_in_range[mosaic_tpu]",
        },
        "TestTopkAttention": {"test_lengths_and_scores[mosaic_tpu]"},
        "TestPagedFlashAttention": {
            "test_queries_behind_the_capacity_see_all_of_it[mosaic_tpu]",
            "test_pages_out_of_range_are_the_nearest_in_range[mosaic_tpu]",
        },
        "TestFlashAttention": {"test_lengths_out_of_range_are_the_nearest_in_range[mosaic_tpu]"},
        "TestIndexerScores": {"test_queries_and_pages_out_of_range[mosaic_tpu]"},
        "TestExperts": {"test_group_sizes[mosaic_tpu-64-more rows than there are]"},
    },
    "test_topk_attention.py": {
        "TestTopkAttention": {
            "test_queries[bfloat16-mosaic_tpu-64-40]",
            "test_lengths_about_top_k[float32-mosaic_tpu-65]",
            "test_ties[bfloat16-mosaic_tpu]",
        },
    },
}
"""Tests that `make test` interprets for TPUs. Interpreting is slow: all tests take ten minutes."""


def pytest_collection_modifyitems(config, items):
    """Without a TPU and `--interpret-all`, leaves out the tests of kernels for TPUs that are not in `INTERPRETED`.

    Only selections run on SparseCores.
    """
    all_of_them = "mosaic_tpu" in available() or config.getoption("interpret_all")

    def chosen(item):
        name = item.callspec.params.get("implementation") if hasattr(item, "callspec") else None
        if name not in SIMULATED or (name == "sparse_core" and item.parent.name != "TestSelectTopk"):
            return name != "sparse_core"
        return all_of_them or item.name in INTERPRETED.get(item.path.name, {}).get(item.parent.name, ())

    left_out = [item for item in items if not chosen(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if chosen(item)]
    for item in items:
        if (
            not all_of_them
            and "mosaic_tpu" in item.name
            and item.path.name in ("test_out_of_range.py", "test_topk_attention.py")
        ):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """Skips a test whose arguments an accelerated implementation refuses. The portable one must take all arguments."""
    try:
        return (yield)
    except UnsupportedError as error:
        if "xla: " in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(params=(*available(), *SIMULATED) if jax.default_backend() == "cpu" else available())
def implementation(request):
    """Each name in turn. On a CPU, kernels for TPUs are interpreted: memories, copies and semaphores are simulated."""
    with contextlib.ExitStack() as stack:
        if request.param in SIMULATED and request.param not in available():
            stack.enter_context(pltpu.force_tpu_interpret_mode())
            # Each row that is copied takes the interpreter milliseconds, and small unions would be padded to 1,024.
            stack.enter_context(mock.patch.object(union_attention, "_CHUNK", 128))
            stack.enter_context(simulated_subcores(SUBCORES))
        yield request.param


@pytest.fixture(params=FORMS)
def form(request):
    """A dtype, a head dimension, and the tolerance of the output."""
    return FORMS[request.param]


@pytest.fixture(autouse=True)
def exact_products():
    """Multiplies float32 matrices in float32. By default JAX rounds them on a GPU."""
    with jax.default_matmul_precision("highest" if jax.default_backend() == "gpu" else None):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
