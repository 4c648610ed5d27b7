"""Sparse and dense attention against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention, paged_flash_attention
from pallas_kernels.sparse_attention import sparse_attention
from tests.pallas_kernels.paged import to_pages

SCALE = 0.2

FORMS = {"float32": (jnp.float32, 32, 1e-5), "bfloat16": (jnp.bfloat16, 128, 2e-2)}
"""Data types with a size of heads that kernels for accelerators take, and the tolerance of the output."""


run_sparse, run_paged, run_dense = (
    jax.jit(function, static_argnames=("scale", "implementation"))
    for function in (sparse_attention, paged_flash_attention, flash_attention)
)


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def oracle(q, k, v, visible):
    """Attention of q `[b, t, n, d]` to k, v `[b, s, k, d]` where `visible [b, t, s]`; output and log-sum-exp."""
    groups = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    logits = np.einsum("btnd,bsnd->btns", q, k, dtype=np.float64) * SCALE
    logits = np.where(visible[:, :, None], logits, -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(logits).sum(-1))
    weights = np.exp(logits - np.where(np.isfinite(lse), lse, 0)[..., None])
    return np.einsum("btns,bsnd->btnd", weights, v, optimize=True), lse


def make(rng, form=FORMS["float32"], *, batch=1, queries, length, heads=8, kv_heads=2, dim=None):
    """Queries, keys and values that `form`'s data type can hold, in float32."""
    dim = dim or form[1]
    q = rng.normal(size=(batch, queries, heads, dim))
    k, v = rng.normal(size=(2, batch, length, kv_heads, dim))
    return [np.asarray(jnp.asarray(x, form[0]), np.float32) for x in (q, k, v)]


def check(got, expected, atol):
    """The log-sum-exps are of float32 sums whatever the inputs are."""
    out, lse = (np.asarray(x, np.float64) for x in got)
    np.testing.assert_allclose(out, expected[0], atol=atol)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected[1]))
    finite = np.isfinite(expected[1])
    np.testing.assert_allclose(lse[finite], expected[1][finite], atol=min(atol, 1e-4))


class TestSparseAttention:
    @pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
    def test_groups(self, rng, group, form, implementation):
        inputs = make(rng, form, queries=9, length=200, heads=2 * group, kv_heads=2)
        self.check(inputs, self.choose(rng, inputs, 64), form, implementation)

    @pytest.mark.parametrize("top_k", [1, 64, 300, 512])
    def test_selections(self, rng, top_k, form, implementation):
        """Fewer selected than wanted, too: the rest is -1."""
        inputs = make(rng, form, batch=2, queries=7, length=300)
        self.check(inputs, self.choose(rng, inputs, top_k), form, implementation)

    @pytest.mark.parametrize("queries", [15, 16, 33])
    def test_neighbours_that_share_keys(self, rng, queries, form, implementation):
        """All select from the same few keys, whole groups of neighbours and a group that is not full."""
        inputs = make(rng, form, batch=2, queries=queries, length=1000)
        pool = np.sort(rng.choice(1000, 150, replace=False))
        places = self.choose(rng, make(rng, form, batch=2, queries=queries, length=len(pool)), 60)
        self.check(inputs, np.where(places < 0, -1, pool[places]).astype(np.int32), form, implementation)

    def test_decode(self, rng, form, implementation):
        inputs = make(rng, form, batch=4, queries=1, length=500)
        self.check(inputs, self.choose(rng, inputs, 64), form, implementation)

    def test_nothing_selected(self, rng, form, implementation):
        inputs = make(rng, form, queries=3, length=100)
        indices = self.choose(rng, inputs, 16)
        indices[0, 1] = -1
        self.check(inputs, indices, form, implementation)

    def test_more_queries_than_fit_the_workspace(self, rng, form, implementation):
        inputs = make(rng, form, queries=300, length=400, dim=128, kv_heads=4)
        self.check(inputs, self.choose(rng, inputs, 256), form, implementation)

    @staticmethod
    def choose(rng, inputs, top_k):
        batch, queries, length = *inputs[0].shape[:2], inputs[1].shape[1]
        indices = np.full((batch, queries, top_k), -1, np.int32)
        for row in np.ndindex(batch, queries):
            count = rng.integers(1, min(top_k, length) + 1)
            indices[row][:count] = np.sort(rng.choice(length, count, replace=False))
        return indices

    @staticmethod
    def check(inputs, indices, form, implementation):
        (q, k, v), (dtype, _, atol) = inputs, form
        visible = np.zeros((*q.shape[:2], k.shape[1] + 1), bool)
        np.put_along_axis(visible, indices, True, axis=-1)  # -1 lands in the extra column
        kv, table = to_pages(np.random.default_rng(1), np.concatenate([k, v], axis=2), 64)
        got = run_sparse(
            jnp.asarray(q, dtype), jnp.asarray(kv, dtype), indices, table, scale=SCALE, implementation=implementation
        )
        check(got, oracle(q, k, v, visible[..., :-1]), atol)


class TestPagedFlashAttention:
    @pytest.mark.parametrize(("queries", "length"), [(1, 1), (1, 700), (60, 700), (513, 513), (600, 1100)])
    def test_lengths(self, rng, queries, length, form, implementation):
        self.check(make(rng, form, queries=queries, length=length), [length - queries], form, implementation)

    def test_sequences_of_different_lengths(self, rng, form, implementation):
        self.check(make(rng, form, batch=3, queries=4, length=700), [696, 0, 300], form, implementation)

    def test_a_query_that_sees_nothing(self, rng, form, implementation):
        """As on a device whose part of the cache its sequence has not reached."""
        self.check(make(rng, form, batch=4, queries=1, length=700), [100, -1, 650, -1], form, implementation)

    @staticmethod
    def check(inputs, start, form, implementation):
        (q, k, v), (dtype, _, atol) = inputs, form
        start = np.asarray(start, np.int32)
        kv, table = to_pages(np.random.default_rng(1), np.concatenate([k, v], axis=2), 64)
        # Unseen rows of real caches hold anything finite.
        arrays = jnp.asarray(q, dtype), jnp.asarray(np.nan_to_num(kv), dtype), table, start
        got = run_paged(*arrays, scale=SCALE, implementation=implementation)
        visible = np.arange(k.shape[1]) <= (start[:, None] + np.arange(q.shape[1]))[..., None]
        check(got, oracle(q, k, v, visible), atol)


class TestFlashAttention:
    @pytest.mark.parametrize("length", [1, 30, 512, 1200])
    def test_bidirectional_with_lengths(self, rng, length, form, implementation):
        dtype, _, atol = form
        q, k, v = make(rng, form, batch=2, queries=length, length=length, heads=2, kv_heads=2, dim=72)
        lengths = np.array([length, (length + 1) // 2], np.int32)
        arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
        got = run_dense(*arrays, lengths, scale=SCALE, implementation=implementation)
        visible = np.broadcast_to(np.arange(length) < lengths[:, None, None], (2, length, length))
        np.testing.assert_allclose(np.asarray(got, np.float32), oracle(q, k, v, visible)[0], atol=atol)
