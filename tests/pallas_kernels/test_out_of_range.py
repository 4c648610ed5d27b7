"""Lengths, positions, pages, group sizes and scores that mean nothing: what docstrings say of them.

Each is compared with a call whose values are in range and mean the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    expert_mlp,
    flash_attention,
    grouped_matmul,
    indexer_scores,
    paged_flash_attention,
    select_topk,
    sparse_attention,
    topk_attention,
)
from tests.pallas_kernels.selection_oracle import selection

PAGES, PAGE_SIZE, HEADS, KV_HEADS, DIM = 6, 64, 8, 2, 128
CAPACITY = 3 * PAGE_SIZE
TABLE = np.array([[3, 0, 5], [1, 4, 2]], np.int32)


@pytest.fixture
def pool(rng):
    return jnp.asarray(rng.normal(size=(PAGES, PAGE_SIZE, 2 * KV_HEADS, DIM)), jnp.float32)


def queries(rng, count, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=(2, count, HEADS, DIM)), dtype)


def assert_same(got, expected):
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


class TestSelectTopk:
    def test_scores_that_are_no_numbers_count_as_infinity(self, rng, implementation):
        scores = rng.normal(size=(3, 300)).astype(np.float32)
        scores[0, ::9], scores[1, 5:200] = np.nan, -np.float32(np.nan)
        scores[2, 3], scores[2, 40], scores[2, 41] = np.inf, np.nan, -np.inf
        lengths = np.array([300, 290, 64], np.int32)
        got = select_topk(scores, lengths, 20, implementation=implementation)
        np.testing.assert_array_equal(got, selection(np.where(np.isnan(scores), np.inf, scores), lengths, 20))

    def test_lengths_out_of_range_are_the_nearest_in_range(self, rng, implementation):
        scores = rng.normal(size=(4, 300)).astype(np.float32)
        got = select_topk(scores, np.array([-5, 301, 2**31 - 1, -(2**31)]), 20, implementation=implementation)
        np.testing.assert_array_equal(got, selection(scores, np.array([0, 300, 300, 0]), 20))


class TestSparseAttention:
    def test_positions_from_the_capacity_on_are_ignored(self, rng, pool, implementation):
        q, good = queries(rng, 2), rng.permuted(np.tile(np.arange(CAPACITY), (2, 2, 1)), axis=-1)[..., :32]
        bad, ignored = good.copy(), good.copy()
        bad[..., ::3], bad[..., 1], ignored[..., ::3], ignored[..., 1] = CAPACITY, 2**31 - 1, -1, -1
        got, expected = (
            sparse_attention(q, pool, x, TABLE, scale=0.1, implementation=implementation) for x in (bad, ignored)
        )
        assert_same(got, expected)

    def test_pages_out_of_range_are_the_nearest_in_range(self, rng, pool, implementation):
        q, indices = queries(rng, 1), np.tile(np.arange(0, CAPACITY, 7, dtype=np.int32), (2, 1, 1))
        bad = np.array([[-1, 0, PAGES], [1, 2**31 - 1, 2]], np.int32)
        got, expected = (
            sparse_attention(q, pool, indices, x, scale=0.1, implementation=implementation)
            for x in (bad, bad.clip(0, PAGES - 1))
        )
        assert_same(got, expected)


class TestTopkAttention:
    def test_lengths_and_scores(self, rng, pool, implementation):
        q = queries(rng, 17)
        scores = rng.normal(size=(2, 17, CAPACITY)).astype(np.float32)
        scores[0, :, ::5] = np.nan
        lengths = rng.integers(1, CAPACITY, (2, 17))
        lengths[0, :3], lengths[1, :3] = (-1, CAPACITY + 1, CAPACITY), (0, 2**31 - 1, CAPACITY)
        run = jax.jit(topk_attention, static_argnames=("top_k", "scale", "implementation"))
        got = run(q, scores, lengths, pool, TABLE, top_k=24, scale=0.1, implementation=implementation)
        scores, lengths = np.where(np.isnan(scores), np.inf, scores), lengths.clip(0, CAPACITY)
        expected = run(q, scores, lengths, pool, TABLE, top_k=24, scale=0.1, implementation="xla")
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        assert np.isneginf(np.asarray(got[1])[[0, 1], [0, 0]]).all()


class TestPagedFlashAttention:
    def test_queries_behind_the_capacity_see_all_of_it(self, rng, pool, implementation):
        """The context is no whole number of a kernel's chunks."""
        q = queries(rng, 3)
        got = paged_flash_attention(
            q, pool, TABLE, np.array([CAPACITY + 200, CAPACITY - 1]), scale=0.1, implementation=implementation
        )
        indices = np.broadcast_to(np.arange(CAPACITY, dtype=np.int32), (2, 3, CAPACITY))
        expected = sparse_attention(q, pool, indices, TABLE, scale=0.1, implementation="xla")
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)

    def test_pages_out_of_range_are_the_nearest_in_range(self, rng, pool, implementation):
        q, start = queries(rng, 1), np.array([CAPACITY - 1, 100])
        bad = np.array([[-1, 0, PAGES], [1, 2**31 - 1, 2]], np.int32)
        got, expected = (
            paged_flash_attention(q, pool, x, start, scale=0.1, implementation=implementation)
            for x in (bad, bad.clip(0, PAGES - 1))
        )
        assert_same(got, expected)


class TestFlashAttention:
    def test_lengths_out_of_range_are_the_nearest_in_range(self, rng, implementation):
        q, k, v = (queries(rng, 30, jnp.bfloat16) for _ in range(3))
        got, expected = (
            flash_attention(q, k, v, np.array(x), scale=0.1, implementation=implementation)
            for x in ([-2, 500], [0, 30])
        )
        assert_same(got, expected)
        assert not np.asarray(got[0], np.float32).any()

    def test_more_keys_than_a_chunk(self, rng):
        """Of the portable implementation, whose last chunk is padded with zeros."""
        q, k, v = (jnp.asarray(rng.normal(size=(1, n, 2, 8)), jnp.float32) for n in (3, 700, 700))
        got, expected = (flash_attention(q, k, v, np.array([n]), scale=0.1, implementation="xla") for n in (5000, 700))
        assert_same(got, expected)


class TestIndexerScores:
    def test_queries_and_pages_out_of_range(self, rng, implementation):
        """A query before the first position sees nothing, one behind the capacity sees all of it."""
        q, keys = queries(rng, 2, jnp.bfloat16), jnp.asarray(rng.normal(size=(PAGES, PAGE_SIZE, DIM)), jnp.bfloat16)
        gates = jnp.asarray(rng.normal(size=(2, 2, HEADS)), jnp.float32)
        bad = np.array([[-1, 0, PAGES], [1, 2**31 - 1, 2]], np.int32)

        def run(table, start):
            start = np.array(start)
            return np.asarray(indexer_scores(q, gates, keys, table, start, scale=0.1, implementation=implementation))

        got = run(bad, [-5, CAPACITY + 7])
        assert np.isneginf(got[0]).all()
        last = run(bad.clip(0, PAGES - 1), [CAPACITY - 1, CAPACITY - 1])
        np.testing.assert_array_equal(got[1], np.where(np.isneginf(last[1]), got[1], last[1]))
        assert np.isfinite(got[1]).all()


SIZES = {
    "more rows than there are": ([30, 50, 40], [30, 34, 0]),
    "below 0": ([-7, 20, -(2**31)], [0, 20, 0]),
    "huge": ([2**31 - 1, 2**31 - 1, 5], [64, 0, 0]),
}


class TestExperts:
    @pytest.mark.parametrize("case", SIZES)
    @pytest.mark.parametrize("rows", [16, 64])
    def test_group_sizes(self, rng, rows, case, implementation):
        """Few rows and many take different ways. Rows of no group are zeros, whatever they hold."""
        bad, good = (np.array(sizes, np.int32) for sizes in SIZES[case])
        good = np.diff(np.minimum(np.cumsum(good), rows), prepend=0)
        lhs = np.asarray(rng.normal(size=(rows, 64)), np.float32)
        lhs[good.sum() :] = np.nan
        matrices = jnp.asarray(rng.normal(size=(3, 64, 256)), jnp.bfloat16)
        down = jnp.asarray(rng.normal(size=(3, 128, 64)), jnp.bfloat16)
        for run in (
            lambda sizes: grouped_matmul(
                jnp.asarray(lhs, jnp.bfloat16), matrices, sizes, implementation=implementation
            ),
            lambda sizes: expert_mlp(
                jnp.asarray(lhs, jnp.bfloat16), matrices, down, sizes, implementation=implementation
            ),
        ):
            got = run(bad)
            assert_same(got, run(good))
            assert not np.asarray(got[good.sum() :], np.float32).any()
            assert np.isfinite(np.asarray(got, np.float32)).all()
