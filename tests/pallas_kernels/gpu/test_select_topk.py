"""Thresholds, unions and positions against the portable selection."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.select_topk import mosaic_gpu, xla
from pallas_kernels.select_topk.thresholds import select_threshold
from pallas_kernels.select_topk.unions import build_unions

KINDS = ("random", "clustered", "ties", "zeros", "constant", "infinite", "blocks", "front", "one_ulp")


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
        case "one_ulp":
            x = (np.float32(1).view(np.int32) + (x > 1).astype(np.int32)).view(np.float32)
    return np.asarray(x, np.float32)


def make_lengths(rows, size, k, seed=0):
    edges = [size, size - 1, k + 1, k, 1, 0, size - 5, 8193, 8192, 9001]
    rng = np.random.default_rng(seed)
    return np.minimum([*edges, *rng.integers(0, size + 1, rows)][:rows], size).astype(np.int32)


def selected(scores, lengths, threshold, last_tie):
    at = np.arange(scores.shape[1])
    threshold, last_tie = threshold[:, None], last_tie[:, None]
    with np.errstate(invalid="ignore"):
        return (at < lengths[:, None]) & ((scores > threshold) | ((scores == threshold) & (at <= last_tie)))


def as_mask(positions, size):
    mask = np.zeros((positions.shape[0], size + 1), bool)
    np.put_along_axis(mask, np.where(positions < 0, size, positions), True, axis=1)
    return mask[:, :size]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "size", "cluster"), [(32, 40_000, 1), (16, 40_004, 2), (16, 131_072, 8), (12, 1024, 4)]
)
def test_all(kind, rows, size, cluster):
    k = 2048 if size > 4096 else 100
    scores, lengths = make_scores(kind, rows, size), make_lengths(rows, size, k)
    for row, length in enumerate(lengths):
        scores[row, length:] = np.where(np.arange(size - length) % 2, np.nan, np.inf)
    expected = np.asarray(xla.select_topk(jnp.asarray(scores), jnp.asarray(lengths), k))
    mask = as_mask(expected, size)
    run = jax.jit(lambda s, n: select_threshold(s, n, k, cluster=cluster))
    threshold, last_tie = run(scores, lengths)
    np.testing.assert_array_equal(selected(scores, lengths, np.asarray(threshold), np.asarray(last_tie)), mask)
    again = run(scores, lengths)
    np.testing.assert_array_equal(threshold, again[0])
    np.testing.assert_array_equal(last_tie, again[1])
    positions = jax.jit(lambda s, n: mosaic_gpu.select_topk(s, n, k))(scores, lengths)
    np.testing.assert_array_equal(positions, expected)
    for group in (4, 16):
        if rows % group:
            continue
        unions = jax.jit(functools.partial(build_unions, group=group, limit=group * k))
        positions, members, counts = map(np.asarray, unions(scores, threshold, last_tie, lengths))
        for i in range(rows // group):
            part = mask[i * group : (i + 1) * group]
            union = np.flatnonzero(part.any(0))
            words = (part[:, union] << np.arange(group)[:, None]).sum(0)
            assert counts[i] == len(union)
            np.testing.assert_array_equal(positions[i], np.pad(union, (0, group * k - len(union))))
            np.testing.assert_array_equal(members[i], np.pad(words, (0, group * k - len(union))))


def test_leading_dimensions_and_short_rows():
    scores = make_scores("ties", 6, 512).reshape(2, 3, 512)
    lengths = np.array([[512, 511, 3], [0, 100, 101]], np.int32)
    positions = mosaic_gpu.select_topk(jnp.asarray(scores), jnp.asarray(lengths), 700)
    np.testing.assert_array_equal(positions, xla.select_topk(jnp.asarray(scores), jnp.asarray(lengths), 700))


def test_limit_drops_the_rest():
    scores, lengths = make_scores("random", 16, 8192), np.full(16, 8192, np.int32)
    threshold, last_tie = select_threshold(jnp.asarray(scores), jnp.asarray(lengths), 64)
    mask = selected(scores, lengths, np.asarray(threshold), np.asarray(last_tie))
    positions, _, counts = build_unions(scores, threshold, last_tie, lengths, limit=128)
    union = np.flatnonzero(mask.any(0))
    assert counts[0] == len(union) > 128
    np.testing.assert_array_equal(positions[0], union[:128])


@pytest.mark.parametrize(
    ("shape", "dtype", "k"), [((4, 1026), jnp.float32, 8), ((4, 1024), jnp.bfloat16, 8), ((4, 1024), jnp.float32, 0)]
)
def test_refuses(shape, dtype, k):
    with pytest.raises(NotImplementedError):
        select_threshold(jnp.zeros(shape, dtype), jnp.ones(shape[0], jnp.int32), k)
