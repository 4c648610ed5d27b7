"""Index scores against the portable ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.indexer_scores import mosaic_gpu, xla


def make_inputs(
    batch, queries, heads, dim, length, page_size, starts, gate_dtype=jnp.bfloat16, dtype=jnp.bfloat16, seed=0
):
    keys = jax.random.split(jax.random.key(seed), 4)
    pages = length // page_size
    return (
        jax.random.normal(keys[0], (batch, queries, heads, dim), jnp.bfloat16).astype(dtype),
        jax.random.normal(keys[1], (batch, queries, heads), gate_dtype),
        jax.random.normal(keys[2], (batch * pages + 3, page_size, dim), jnp.bfloat16).astype(dtype),
        jax.random.permutation(keys[3], batch * pages + 3)[: batch * pages].reshape(batch, pages).astype(jnp.int32),
        jnp.array(starts, jnp.int32),
    )


CASES = {
    "model": (1, 512, 16, 64, 16384, 64, [15872]),
    "ragged starts": (3, 104, 16, 64, 4096, 64, [0, 777, 3992]),
    "queries no multiple of 8": (2, 101, 16, 64, 4096, 64, [0, 3000]),
    "few queries": (2, 3, 16, 64, 4096, 64, [0, 4093]),
    "8 queries": (2, 8, 16, 64, 640, 64, [592, 0]),
    "past the end": (1, 64, 16, 64, 1024, 64, [1000]),
    "pages of 16": (2, 104, 16, 64, 4096, 16, [3992, 777]),
    "pages of 256": (2, 104, 16, 64, 4096, 256, [3992, 777]),
    "pages of 512": (1, 40, 16, 64, 4096, 512, [2000]),
    "odd number of tiles": (2, 104, 16, 64, 4032, 64, [3928, 0]),
    "8 heads of 32": (2, 104, 8, 32, 4096, 64, [3992, 777]),
    "9 heads of 48": (1, 50, 9, 48, 2048, 64, [1000]),
    "24 heads of 96": (2, 104, 24, 96, 4096, 64, [3992, 777]),
    "32 heads of 128": (1, 104, 32, 128, 4096, 64, [3992]),
    "64 heads of 64": (1, 104, 64, 64, 4096, 64, [3992]),
    "64 heads of 128": (1, 104, 64, 128, 4096, 64, [3992]),
    "decode": (5, 1, 16, 64, 4096, 64, [0, 63, 64, 3000, 4095]),
    "decode pages of 16": (3, 1, 16, 64, 4096, 16, [0, 3000, 4095]),
    "decode pages of 512": (3, 1, 16, 64, 4096, 512, [0, 3000, 4095]),
    "decode odd number of tiles": (2, 1, 16, 64, 4032, 64, [4031, 5]),
    "decode 64 heads of 128": (2, 1, 64, 128, 4096, 64, [4095, 100]),
    "decode 12 heads": (2, 1, 12, 64, 4096, 64, [4095, 100]),
    "decode many": (64, 1, 16, 64, 8192, 64, list(range(0, 8192, 128))),
}


@pytest.mark.parametrize(
    ("case", "gate_dtype"),
    [*((case, jnp.bfloat16) for case in CASES), ("model", jnp.float32), ("decode", jnp.float32)],
)
def test_matches_portable(case, gate_dtype):
    args = make_inputs(*CASES[case], gate_dtype=gate_dtype)
    out = np.asarray(mosaic_gpu.indexer_scores(*args, scale=0.125))
    expected = np.asarray(jax.jit(functools.partial(xla.indexer_scores, scale=0.125))(*args))
    np.testing.assert_array_equal(np.isneginf(out), np.isneginf(expected))
    seen = ~np.isneginf(expected)
    np.testing.assert_allclose(out[seen], expected[seen], atol=5e-5, rtol=1e-5)


FLOAT8_CASES = [case for case, (*_, dim, _, page_size, _) in CASES.items() if dim % 32 == 0 and page_size >= 32]


@pytest.mark.parametrize("case", FLOAT8_CASES)
def test_float8_matches_portable(case):
    """Scales are powers of two, so that the difference grows with them and with nothing else."""
    args = make_inputs(*CASES[case], gate_dtype=jnp.float32, dtype=jnp.float8_e4m3fn)
    scales = 2.0 ** jax.random.randint(jax.random.key(1), args[2].shape[:2], -8, 4).astype(jnp.float32)
    out = np.asarray(mosaic_gpu.indexer_scores(*args, scale=0.125, key_scales=scales))
    expected = np.asarray(jax.jit(functools.partial(xla.indexer_scores, scale=0.125))(*args, key_scales=scales))
    np.testing.assert_array_equal(np.isneginf(out), np.isneginf(expected))
    seen = ~np.isneginf(expected)
    of_key = np.broadcast_to(np.asarray(scales)[args[3]].reshape(len(args[3]), 1, -1), out.shape)
    difference = np.abs(out[seen] - expected[seen]) / of_key[seen]
    print(f"largest difference {difference.max():.1e}")
    assert difference.max() < 5e-3


def test_float8_without_scales():
    args = make_inputs(*CASES["model"], dtype=jnp.float8_e4m3fn)
    scales = jnp.ones(args[2].shape[:2])
    np.testing.assert_array_equal(
        np.asarray(mosaic_gpu.indexer_scores(*args, scale=0.125)),
        np.asarray(mosaic_gpu.indexer_scores(*args, scale=0.125, key_scales=scales)),
    )


@pytest.mark.parametrize("case", ["ragged starts", "queries no multiple of 8", "decode"])
def test_unfilled_matches_where_seen(case):
    args = make_inputs(*CASES[case])
    out = np.asarray(mosaic_gpu.indexer_scores_unfilled(*args, scale=0.125))
    expected = np.asarray(jax.jit(functools.partial(xla.indexer_scores, scale=0.125))(*args))
    seen = ~np.isneginf(expected)
    np.testing.assert_allclose(out[seen], expected[seen], atol=5e-5, rtol=1e-5)


def test_deterministic():
    args = make_inputs(*CASES["model"])
    first = np.asarray(mosaic_gpu.indexer_scores(*args, scale=0.125))
    for _ in range(3):
        np.testing.assert_array_equal(np.asarray(mosaic_gpu.indexer_scores(*args, scale=0.125)), first)


@pytest.mark.parametrize("change", [{"dtype": jnp.float32}, {"heads": 4}, {"dim": 160}, {"page_size": 24}])
def test_refuses(change):
    args = make_inputs(1, 8, change.get("heads", 16), change.get("dim", 64), 960, change.get("page_size", 64), [100])
    if "dtype" in change:
        args = (args[0].astype(change["dtype"]), *args[1:])
    with pytest.raises(NotImplementedError):
        mosaic_gpu.indexer_scores(*args, scale=0.125)
