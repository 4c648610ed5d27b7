"""The Hopper index scores: `fill=False`, `skip_below`, equal results on every run, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.indexer_scores import mosaic_gpu, xla


def make_inputs(batch, queries, heads, dim, length, page_size, starts, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    pages = length // page_size
    return (
        jax.random.normal(keys[0], (batch, queries, heads, dim), jnp.bfloat16),
        jax.random.normal(keys[1], (batch, queries, heads), jnp.bfloat16),
        jax.random.normal(keys[2], (batch * pages + 3, page_size, dim), jnp.bfloat16),
        jax.random.permutation(keys[3], batch * pages + 3)[: batch * pages].reshape(batch, pages).astype(jnp.int32),
        jnp.array(starts, jnp.int32),
    )


CASES = {
    "model": (1, 512, 16, 64, 16384, 64, [15872]),
    "ragged starts": (3, 104, 16, 64, 4096, 64, [0, 777, 3992]),
    "queries no multiple of 8": (2, 101, 16, 64, 4096, 64, [0, 3000]),
    "decode": (5, 1, 16, 64, 4096, 64, [0, 63, 64, 3000, 4095]),
    "decode alone": (1, 1, 16, 64, 4096, 64, [3000]),
    "decode, most see nothing": (32, 1, 16, 64, 4096, 64, [-1] * 9 + [2500] + [-1] * 22),
    "decode many": (64, 1, 16, 64, 8192, 64, list(range(0, 8192, 128))),
}


@pytest.mark.parametrize("case", CASES)
def test_unfilled_matches_where_seen(case):
    args = make_inputs(*CASES[case])
    out = np.asarray(mosaic_gpu.indexer_scores(*args, scale=0.125, fill=False))
    expected = np.asarray(jax.jit(functools.partial(xla.indexer_scores, scale=0.125))(*args))
    seen = ~np.isneginf(expected)
    np.testing.assert_allclose(out[seen], expected[seen], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("skip_below", [1, 100, 800, 15_900, 2**20])
@pytest.mark.parametrize("case", ["model", "ragged starts", "queries no multiple of 8", "decode"])
def test_other_scores_are_the_same_where_some_are_skipped(case, skip_below):
    args = make_inputs(*CASES[case])
    run = functools.partial(mosaic_gpu.indexer_scores, *args, scale=0.125, fill=False)
    position = np.asarray(args[4])[:, None] + np.arange(args[0].shape[1])
    seen = np.arange(args[3].shape[1] * 64) <= position[..., None]
    seen &= position[..., None] >= skip_below
    np.testing.assert_array_equal(np.asarray(run(skip_below=skip_below))[seen], np.asarray(run())[seen])


@pytest.mark.parametrize("case", ["model", "decode many"])
def test_deterministic(case):
    args = make_inputs(*CASES[case])
    first = np.asarray(mosaic_gpu.indexer_scores(*args, scale=0.125))
    for _ in range(3):
        np.testing.assert_array_equal(np.asarray(mosaic_gpu.indexer_scores(*args, scale=0.125)), first)


@pytest.mark.parametrize(
    "change", [{"dtype": jnp.float32}, {"heads": 4}, {"dim": 160}, {"page_size": 24}, {"page_size": 192}]
)
def test_refuses(change):
    args = make_inputs(1, 8, change.get("heads", 16), change.get("dim", 64), 960, change.get("page_size", 64), [100])
    if "dtype" in change:
        args = (args[0].astype(change["dtype"]), *args[1:])
    with pytest.raises(NotImplementedError):
        mosaic_gpu.indexer_scores(*args, scale=0.125)
