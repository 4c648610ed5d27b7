"""Dense attention against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention, paged_flash_attention
from tests.pallas_kernels.attention_oracle import SCALE, assert_close, attention, random_inputs
from tests.pallas_kernels.paged import to_pages

run_paged, run_dense = (
    jax.jit(function, static_argnames=("scale", "implementation"))
    for function in (paged_flash_attention, flash_attention)
)


class TestPagedFlashAttention:
    @pytest.mark.parametrize(("queries", "length"), [(1, 1), (1, 700), (60, 700), (513, 513), (600, 1100)])
    def test_lengths(self, rng, queries, length, form, implementation):
        self.check(random_inputs(rng, form, queries=queries, length=length), [length - queries], form, implementation)

    def test_sequences_of_different_lengths(self, rng, form, implementation):
        self.check(random_inputs(rng, form, batch=3, queries=4, length=700), [696, 0, 300], form, implementation)

    def test_a_query_that_sees_nothing(self, rng, form, implementation):
        """As on a device whose part of the cache its sequence has not reached."""
        self.check(random_inputs(rng, form, batch=4, queries=1, length=700), [100, -1, 650, -1], form, implementation)

    @staticmethod
    def check(inputs, start, form, implementation):
        (q, k, v), (dtype, _, atol) = inputs, form
        start = np.asarray(start, np.int32)
        kv, table = to_pages(np.random.default_rng(1), np.concatenate([k, v], axis=2), 64)
        # Unseen rows of real caches hold anything finite.
        arrays = jnp.asarray(q, dtype), jnp.asarray(np.nan_to_num(kv), dtype), table, start
        got = run_paged(*arrays, scale=SCALE, implementation=implementation)
        visible = np.arange(k.shape[1]) <= (start[:, None] + np.arange(q.shape[1]))[..., None]
        assert_close(got, attention(q, k, v, visible), atol)


class TestFlashAttention:
    @pytest.mark.parametrize("length", [1, 30, 512, 1200])
    def test_bidirectional_with_lengths(self, rng, length, form, implementation):
        dtype, _, atol = form
        q, k, v = random_inputs(rng, form, batch=2, queries=length, length=length, heads=2, kv_heads=2, dim=72)
        lengths = np.array([length, (length + 1) // 2], np.int32)
        arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
        got = run_dense(*arrays, lengths, scale=SCALE, implementation=implementation)
        visible = np.broadcast_to(np.arange(length) < lengths[:, None, None], (2, length, length))
        np.testing.assert_allclose(np.asarray(got, np.float32), attention(q, k, v, visible)[0], atol=atol)
