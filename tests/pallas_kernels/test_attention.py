"""Sparse and dense attention against the formula in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention, paged_flash_attention
from pallas_kernels.sparse_attention import sparse_attention
from tests.pallas_kernels.paged import to_pages

SCALE = 0.2


def oracle(q, k, v, visible):
    """Attention of q `[b, t, n, d]` to k, v `[b, s, k, d]` where `visible [b, t, s]`; output and log-sum-exp."""
    groups = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    logits = np.einsum("btnd,bsnd->btns", q, k, dtype=np.float64) * SCALE
    logits = np.where(visible[:, :, None], logits, -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(logits).sum(-1))
    weights = np.exp(logits - np.where(np.isfinite(lse), lse, 0)[..., None])
    return np.einsum("btns,bsnd->btnd", weights, v), lse


def make(rng, *, batch=1, queries, length, heads=8, kv_heads=2, dim=32):
    q = rng.normal(size=(batch, queries, heads, dim)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, length, kv_heads, dim)).astype(np.float32)
    return q, k, v


def check(got, expected, atol):
    out, lse = (np.asarray(x, np.float64) for x in got)
    np.testing.assert_allclose(out, expected[0], atol=atol)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected[1]))
    finite = np.isfinite(expected[1])
    np.testing.assert_allclose(lse[finite], expected[1][finite], atol=atol)


class TestSparseAttention:
    @pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
    def test_groups(self, rng, group, implementation):
        inputs = make(rng, queries=9, length=200, heads=2 * group, kv_heads=2)
        self.check(inputs, self.choose(rng, inputs, 64), implementation)

    @pytest.mark.parametrize("top_k", [1, 64, 300, 512])
    def test_selections(self, rng, top_k, implementation):
        """Fewer selected than wanted, too: the rest is -1."""
        inputs = make(rng, batch=2, queries=7, length=300)
        self.check(inputs, self.choose(rng, inputs, top_k), implementation)

    def test_decode(self, rng, implementation):
        inputs = make(rng, batch=4, queries=1, length=500)
        self.check(inputs, self.choose(rng, inputs, 64), implementation)

    def test_nothing_selected(self, rng, implementation):
        inputs = make(rng, queries=3, length=100)
        indices = self.choose(rng, inputs, 16)
        indices[0, 1] = -1
        self.check(inputs, indices, implementation)

    def test_more_queries_than_fit_the_workspace(self, rng, implementation):
        inputs = make(rng, queries=300, length=400, dim=128, kv_heads=4)
        self.check(inputs, self.choose(rng, inputs, 256), implementation)

    def test_bfloat16(self, rng, implementation):
        inputs = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in make(rng, queries=5, length=200)]
        self.check(inputs, self.choose(rng, inputs, 64), implementation, dtype=jnp.bfloat16, atol=2e-2)

    @staticmethod
    def choose(rng, inputs, top_k):
        batch, queries, length = *inputs[0].shape[:2], inputs[1].shape[1]
        indices = np.full((batch, queries, top_k), -1, np.int32)
        for row in np.ndindex(batch, queries):
            count = rng.integers(1, min(top_k, length) + 1)
            indices[row][:count] = np.sort(rng.choice(length, count, replace=False))
        return indices

    @staticmethod
    def check(inputs, indices, implementation, dtype=jnp.float32, atol=1e-5):
        q, k, v = inputs
        visible = np.zeros((*q.shape[:2], k.shape[1] + 1), bool)
        np.put_along_axis(visible, indices, True, axis=-1)  # -1 lands in the extra column
        kv, table = to_pages(np.random.default_rng(1), np.concatenate([k, v], axis=2), 64)
        got = sparse_attention(
            jnp.asarray(q, dtype), jnp.asarray(kv, dtype), indices, table, scale=SCALE, implementation=implementation
        )
        check(got, oracle(q, k, v, visible[..., :-1]), atol)


class TestPagedFlashAttention:
    @pytest.mark.parametrize(("queries", "length"), [(1, 1), (1, 700), (60, 700), (513, 513), (600, 1100)])
    def test_lengths(self, rng, queries, length, implementation):
        self.check(make(rng, queries=queries, length=length), [length - queries], implementation)

    def test_sequences_of_different_lengths(self, rng, implementation):
        self.check(make(rng, batch=3, queries=4, length=700), [696, 0, 300], implementation)

    @staticmethod
    def check(inputs, start, implementation):
        q, k, v = inputs
        start = np.asarray(start, np.int32)
        kv, table = to_pages(np.random.default_rng(1), np.concatenate([k, v], axis=2), 64)
        # Unseen rows of real caches hold anything finite.
        got = paged_flash_attention(q, np.nan_to_num(kv), table, start, scale=SCALE, implementation=implementation)
        visible = np.arange(k.shape[1]) <= (start[:, None] + np.arange(q.shape[1]))[..., None]
        check(got, oracle(q, k, v, visible), 1e-5)


class TestFlashAttention:
    @pytest.mark.parametrize("length", [1, 30, 512, 1200])
    def test_bidirectional_with_lengths(self, rng, length, implementation):
        q, k, v = make(rng, batch=2, queries=length, length=length, heads=2, kv_heads=2, dim=72)
        lengths = np.array([length, (length + 1) // 2], np.int32)
        got = flash_attention(q, k, v, lengths, scale=SCALE, implementation=implementation)
        visible = np.broadcast_to(np.arange(length) < lengths[:, None, None], (2, length, length))
        np.testing.assert_allclose(np.asarray(got), oracle(q, k, v, visible)[0], atol=1e-5)
