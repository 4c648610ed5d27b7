"""Dense attention against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_attention
from pallas_kernels.flash_attention import flash_attention, paged_flash_attention, xla
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

    def test_an_odd_number_of_tiles(self, rng, form, implementation):
        """The kernel for TPUs takes tiles of 64 queries of one key head in pairs."""
        self.check(random_inputs(rng, form, queries=192, length=1300, kv_heads=1), [1108], form, implementation)

    @pytest.mark.parametrize("factor", [-1, 0])
    def test_scales_that_are_not_positive(self, rng, factor, form, implementation):
        inputs = random_inputs(rng, form, queries=3, length=90)
        self.check(inputs, [87], form, implementation, factor=factor)

    @staticmethod
    def check(inputs, start, form, implementation, factor=1):
        (q, k, v), (dtype, _, atol) = inputs, form
        start = np.asarray(start, np.int32)
        kv, table = to_pages(np.random.default_rng(1), np.concatenate([k, v], axis=2), 64)
        # Unseen rows of real caches hold anything finite.
        arrays = jnp.asarray(q, dtype), jnp.asarray(np.nan_to_num(kv), dtype), table, start
        got = run_paged(*arrays, scale=factor * SCALE, implementation=implementation)
        visible = np.arange(k.shape[1]) <= (start[:, None] + np.arange(q.shape[1]))[..., None]
        assert_close(got, attention(factor * q, k, v, visible), atol)


def test_words_of_a_tpu_hold_two_heads(rng):
    """The compiled kernel reads keys as words. The interpreter does not, so this is what tests their order."""
    rows = jnp.asarray(rng.normal(size=(16, 128)), jnp.bfloat16)

    def kernel(rows, first, second):
        first[...], second[...] = tpu_attention._halves(pltpu.bitcast(rows[...], jnp.uint32))

    with pltpu.force_tpu_interpret_mode():
        halves = pl.pallas_call(kernel, out_shape=[jax.ShapeDtypeStruct((8, 128), rows.dtype)] * 2)(rows)
    for half, expected in zip(halves, (rows[::2], rows[1::2]), strict=True):
        np.testing.assert_array_equal(half, expected)


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

    @pytest.mark.parametrize("gradient_bytes", [2**30, 2**16])
    def test_gradient(self, rng, monkeypatch, gradient_bytes):
        """Of the portable implementation, of all queries at once and in blocks; one sequence has no key."""
        monkeypatch.setattr(xla, "_GRADIENT_BYTES", gradient_bytes)
        shape, lengths = (3, 70, 4, 8), np.array([70, 33, 0], np.int32)
        q, d_out = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
        k, v = (rng.normal(size=(3, 70, 2, 8)).astype(np.float32) for _ in range(2))

        def formula(q, k, v):
            k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
            logits = jnp.einsum("btnd,bsnd->bnts", q, k) * SCALE
            seen = jnp.arange(70) < lengths[:, None, None, None]
            weights = jnp.where(seen, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0)
            weights /= jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
            return jnp.einsum("bnts,bsnd->btnd", weights, v)

        with jax.enable_x64(True):
            wide = [jnp.asarray(x, jnp.float64) for x in (q, k, v, d_out)]
            expected = jax.vjp(formula, wide[0], wide[1], wide[2])[1](wide[3])
        run = jax.jit(lambda q, k, v: flash_attention(q, k, v, jnp.asarray(lengths), scale=SCALE, implementation="xla"))
        got = jax.vjp(run, q, k, v)[1](d_out)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
