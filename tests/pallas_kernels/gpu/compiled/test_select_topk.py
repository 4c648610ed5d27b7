"""The Hopper selection against the portable one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.select_topk import mosaic_gpu, xla
from pallas_kernels.select_topk.mosaic_gpu import few_rows

KINDS = ("random", "clustered", "ties", "zeros", "constant", "infinite", "blocks", "front", "one_ulp", "periodic")


def make_scores(kind, rows, size, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, size), np.float32)
    at = np.arange(size)
    match kind:
        case "clustered":
            x = 1 + x * 2**-12
        case "ties":
            x = np.round(x * 4) / 4
        case "zeros":
            x = np.where(rng.random(x.shape) < 0.99, np.where(rng.random(x.shape) < 0.5, 0.0, -0.0), x)
        case "constant":
            x = np.full_like(x, -3.5)
        case "infinite":
            x = np.where(rng.random(x.shape) < 0.99, -np.inf, np.where(x > 2, np.inf, x))
        case "blocks":
            x = 0.1 * x + np.repeat(rng.standard_normal((rows, -(-size // 64)), np.float32), 64, 1)[:, :size]
        case "front":
            x = 1e-3 * x + 50 * (at < 2000)
        case "periodic":
            x = 1e-2 * x + 50 * (at % 2048 < 100)
        case "one_ulp":
            x = (np.float32(1).view(np.int32) + (x > 1).astype(np.int32)).view(np.float32)
    return np.asarray(x, np.float32)


def make_lengths(rows, size, k, seed=0):
    edges = [size, size - 1, k + 1, k, 1, 0, size - 5, 8193, 8192, 9001]
    rng = np.random.default_rng(seed)
    return np.minimum([*edges, *rng.integers(0, size + 1, rows)][:rows], size).astype(np.int32)


run = jax.jit(mosaic_gpu.select_topk, static_argnames=("k", "cluster"))
portable = jax.jit(xla.select_topk, static_argnames="k")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "size", "k", "cluster"),
    [
        (300, 40_000, 2048, None),
        (140, 100_000, 4096, None),
        (32, 150_000, 2048, None),
        (32, 40_000, 2048, 1),
        (16, 40_004, 2048, 2),
        (16, 131_072, 2048, 8),
        (12, 1024, 100, 4),
    ],
)
def test_all(kind, rows, size, k, cluster):
    scores, lengths = make_scores(kind, rows, size), make_lengths(rows, size, k)
    for row, length in enumerate(lengths):
        scores[row, length:] = np.where(np.arange(size - length) % 2, np.nan, np.inf)
    positions = run(scores, lengths, k=k, cluster=cluster)
    np.testing.assert_array_equal(positions, portable(scores, lengths, k=k))
    np.testing.assert_array_equal(positions, run(scores, lengths, k=k, cluster=cluster))


few = jax.jit(few_rows.select_few_rows, static_argnames="plan")


@pytest.mark.parametrize(
    ("rows", "size", "k", "cluster"),
    [
        (10, 131_072, 2048, 16),
        (10, 131_072, 2048, 8),
        (10, 32_768, 2048, 8),
        (10, 40_004, 2048, 4),
        (10, 20_000, 4096, 2),
        (6, 1024, 100, 8),
    ],
)
def test_few_rows(rows, size, k, cluster):
    plan = few_rows.HeldRowPlan(size, k, cluster)
    for kind in KINDS:
        scores, lengths = make_scores(kind, rows, size), make_lengths(rows, size, k)
        for row, length in enumerate(lengths):
            scores[row, length:] = np.where(np.arange(size - length) % 2, np.nan, np.inf)
        positions = few(scores, lengths, plan)
        np.testing.assert_array_equal(positions, portable(scores, lengths, k=k), err_msg=kind)
        np.testing.assert_array_equal(positions, few(scores, lengths, plan), err_msg=kind)


def test_leading_dimensions_and_short_rows():
    scores = make_scores("ties", 6, 512).reshape(2, 3, 512)
    lengths = np.array([[512, 511, 3], [0, 100, 101]], np.int32)
    positions = mosaic_gpu.select_topk(jnp.asarray(scores), jnp.asarray(lengths), 700)
    np.testing.assert_array_equal(positions, xla.select_topk(jnp.asarray(scores), jnp.asarray(lengths), 700))


@pytest.mark.parametrize(
    ("shape", "dtype", "k"), [((4, 1026), jnp.float32, 8), ((4, 1024), jnp.bfloat16, 8), ((4, 1024), jnp.float32, 0)]
)
def test_refuses(shape, dtype, k):
    with pytest.raises(NotImplementedError):
        mosaic_gpu.select_topk(jnp.zeros(shape, dtype), jnp.ones(shape[0], jnp.int32), k)
