"""Prompts' selections as bitmaps on Hopper GPUs, and attention to them beside attention to lists of positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import topk_attention
from pallas_kernels.select_topk.mosaic_gpu import select_bits, select_topk
from pallas_kernels.sparse_attention.mosaic_gpu import sparse_attention
from pallas_kernels.topk_attention import mosaic_gpu
from tests.pallas_kernels.gpu.compiled.test_sparse_attention import SCALE, pool_and_pages, relative_error

TOP_K = 256
CASES = {  # first positions of sequences, queries of each, the page tables' positions, and top_k
    "from the first token": ([0], 2048, 2048, TOP_K),
    "a later chunk": ([1111], 400, 2048, TOP_K),
    "several sequences": ([0, 700, 3, 1900, 240], 128, 2048, TOP_K),
    "about top_k": ([TOP_K - 80, TOP_K - 79], 80, 2048, TOP_K),
    "rows of a longer plan": ([33_000, 5], 144, 36_864, 2048),
}


def natural(key, shape):
    """Neighbours select nearly the same: scores drift from one random row to the next, with noise of their own."""
    rows_key, noise = jax.random.split(key)
    rows = jax.random.normal(rows_key, (shape[0], shape[1] // 64 + 2, shape[2]))
    at, phase = jnp.arange(shape[1]) // 64, (jnp.arange(shape[1]) % 64 * (jnp.pi / 128))[:, None]
    drift = jnp.cos(phase) * rows[:, at] + jnp.sin(phase) * rows[:, at + 1]
    return drift + 0.3 * jax.random.normal(noise, shape)


SCORES = {
    "natural": natural,
    "random": lambda key, shape: jax.random.normal(key, shape),
    "ties": lambda key, shape: jnp.round(jax.random.normal(key, shape)),
    "all equal": lambda key, shape: jnp.zeros(shape),
    "neighbours share": lambda key, shape: jnp.repeat(
        jax.random.normal(key, (shape[0], shape[1] // 16, shape[2])), 16, axis=1
    ),
    "nothing shared": lambda key, shape: (
        (jnp.arange(shape[2]) % 16 == jnp.arange(shape[1])[:, None] % 16) + jax.random.uniform(key, shape)
    ),
    "one half shares nothing with the other": lambda key, shape: (
        (jnp.arange(shape[2]) // 128 % 2 == jnp.arange(shape[1])[:, None] // 8 % 2) + jax.random.uniform(key, shape)
    ),
    "the latest": lambda key, shape: jnp.broadcast_to(jnp.arange(shape[2], dtype=jnp.float32), shape),
}


@pytest.fixture(autouse=True)
def no_lists(monkeypatch):
    """The operation would fail if it selected lists."""
    monkeypatch.setattr(mosaic_gpu, "select_topk", None)


def make(case, scores="random"):
    starts, queries, context, _ = CASES[case]
    key = jax.random.key(len(case))
    kv, pages = pool_and_pages(key, context * len(starts), 4)
    q = jax.random.normal(key, (len(starts), queries, 32, 128), jnp.bfloat16)
    lengths = jnp.minimum(jnp.array(starts)[:, None] + jnp.arange(queries) + 1, context).astype(jnp.int32)
    return q, SCORES[scores](key, (len(starts), queries, context)), lengths, kv, pages.reshape(len(starts), -1)


def by_bitmaps(arrays, top_k=TOP_K):
    return jax.jit(functools.partial(mosaic_gpu.topk_attention, top_k=top_k, scale=SCALE))(*arrays)


@functools.partial(jax.jit, static_argnames="top_k")
def by_lists(q, scores, lengths, kv, tables, top_k):
    return sparse_attention(q, kv, select_topk(scores, lengths, top_k), tables, scale=SCALE)


def assert_equal(a, b):
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(left, np.float32), np.asarray(right, np.float32))


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_lists(case, scores):
    arrays, top_k = make(case, scores), CASES[case][-1]
    got = by_bitmaps(arrays, top_k)
    assert_equal(got, by_lists(*arrays, top_k))
    assert_equal(got, by_bitmaps(arrays, top_k))


@pytest.mark.parametrize("case", CASES)
def test_matches_portable(case):
    arrays, top_k = make(case), CASES[case][-1]
    how = {"top_k": top_k, "scale": SCALE, "implementation": "xla"}
    expected = jax.jit(functools.partial(topk_attention, **how))(*arrays)
    got = by_bitmaps(arrays, top_k)
    assert relative_error(got[0], expected[0]) < 5e-3
    assert relative_error(got[1], expected[1]) < 1e-5


def test_a_sequence_has_the_same_bits_alone():
    q, scores, lengths, kv, tables = make("several sequences")
    alone = by_bitmaps((q[:2], scores[:2], lengths[:2], kv, tables[:2]))
    assert_equal(alone, [x[:2] for x in by_bitmaps((q, scores, lengths, kv, tables))])


def test_reads_no_key_behind_the_queries():
    """Other rows and pages are NaN, and scores behind a length. Entries of the page table behind a context are 0."""
    q, scores, lengths, kv, tables = make("several sequences")
    expected = by_bitmaps((q, scores, lengths, kv, tables))
    ends = np.asarray(lengths).max(1)
    seen = np.zeros(kv.shape[:2], bool)
    for table, end in zip(np.asarray(tables), ends, strict=True):
        at = np.arange(end)
        seen[table[at // 64], at % 64] = True
    poisoned = jnp.where(seen[..., None, None], kv, jnp.nan)
    used = np.arange(tables.shape[1]) * 64 < ends[:, None]
    hidden = jnp.where(jnp.arange(scores.shape[2]) < lengths[..., None], scores, jnp.nan)
    assert_equal(by_bitmaps((q, hidden, lengths, poisoned, jnp.where(used, tables, 0))), expected)


def test_queries_that_see_nothing():
    q, scores, lengths, kv, tables = make("a later chunk")
    lengths = lengths.at[0, 16:40].set(0).at[0, 100].set(-5)
    out, lse = by_bitmaps((q, scores, lengths, kv, tables))
    empty = np.asarray(lengths) <= 0
    assert np.all(np.asarray(out, np.float32)[empty] == 0)
    assert np.all(np.isneginf(np.asarray(lse)[empty]))
    assert np.all(np.isfinite(np.asarray(lse)[~empty]))


@pytest.mark.parametrize("kind", ["random", "ties", "all equal"])
@pytest.mark.parametrize("size", [2048, 2180, 32_768, 32_772, 131_072])
def test_bitmaps(size, kind):
    """Of 560 rows of ragged lengths. Behind the longest of 16 neighbours, rounded up to 128, nothing is compared."""
    rows, rng = 560, np.random.default_rng(size)
    scores = np.asarray(SCORES[kind](jax.random.key(size), (1, rows, size))[0])
    lengths = rng.integers(0, size + 1, rows).astype(np.int32)
    lengths[:16] = rng.integers(0, TOP_K + 2, 16)
    reach = lengths.reshape(-1, 16).max(1)
    bits = np.asarray(jax.jit(functools.partial(select_bits, k=TOP_K))(scores, lengths, reach))
    got = np.unpackbits(np.ascontiguousarray(bits).view(np.uint8), axis=1, bitorder="little").astype(bool)
    for row, length in enumerate(lengths):
        expected = np.zeros(got.shape[1], bool)
        expected[np.argsort(-scores[row, :length], kind="stable")[:TOP_K]] = True
        end = -(-reach[row // 16] // 128) * 128
        np.testing.assert_array_equal(got[row, :end], expected[:end])
