"""Selection with attention against both formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.topk_attention import topk_attention
from tests.pallas_kernels.attention_oracle import SCALE, assert_close, attention, random_inputs
from tests.pallas_kernels.paged import to_pages
from tests.pallas_kernels.selection_oracle import selection

run = jax.jit(topk_attention, static_argnames=("top_k", "scale", "implementation"))


class TestTopkAttention:
    @pytest.mark.parametrize("queries", [1, 3, 16, 40, 80])
    @pytest.mark.parametrize("top_k", [64, 200])
    def test_queries(self, rng, queries, top_k, form, implementation):
        """Lengths from 1 to ten times `top_k`."""
        scores = rng.normal(size=(2, queries, 640))
        self.check(rng, scores, rng.integers(1, 641, (2, queries)), top_k, form, implementation)

    @pytest.mark.parametrize("length", [1, 63, 64, 65])
    def test_lengths_about_top_k(self, rng, length, form, implementation):
        scores = rng.normal(size=(1, 17, 128))
        self.check(rng, scores, np.full((1, 17), length), 64, form, implementation)

    def test_causal(self, rng, form, implementation):
        """As in prefill: scores behind a query are -inf."""
        lengths = np.arange(700, 748)[None] + 1
        scores = np.where(np.arange(768) < lengths[..., None], rng.normal(size=(1, 48, 768)), -np.inf)
        self.check(rng, scores, lengths, 128, form, implementation)

    def test_neighbours_that_select_the_same(self, rng, form, implementation):
        scores = np.repeat(rng.normal(size=(1, 2, 1024)), 16, axis=1)
        self.check(rng, scores, np.full((1, 32), 1000), 100, form, implementation)

    def test_neighbours_that_select_nothing_in_common(self, rng, form, implementation):
        own = np.arange(1024) % 16 == np.arange(16)[:, None]
        self.check(rng, own + 0.1 * rng.random((1, 16, 1024)), np.full((1, 16), 1024), 64, form, implementation)

    def test_ties(self, rng, form, implementation):
        scores = rng.integers(0, 3, (1, 20, 512))
        self.check(rng, scores, rng.integers(1, 513, (1, 20)), 64, form, implementation)

    def test_rows_of_equal_scores(self, rng, form, implementation):
        self.check(rng, np.zeros((1, 20, 512)), rng.integers(1, 513, (1, 20)), 64, form, implementation)

    def test_infinities_among_the_visible(self, rng, form, implementation):
        scores = np.where(rng.random((1, 20, 512)) < 0.95, -np.inf, rng.normal(size=(1, 20, 512)))
        self.check(rng, scores, rng.integers(1, 513, (1, 20)), 64, form, implementation)

    @staticmethod
    def check(rng, scores, lengths, top_k, form, implementation):
        dtype, _, atol = form
        batch, queries, length = scores.shape
        q, k, v = random_inputs(rng, form, batch=batch, queries=queries, length=length, heads=8, kv_heads=2)
        kv, table = to_pages(rng, np.concatenate([k, v], axis=2), 64)
        scores, lengths = np.asarray(scores, np.float32), np.asarray(lengths, np.int32)
        arrays = jnp.asarray(q, dtype), scores, lengths, jnp.asarray(kv, dtype), table
        got = run(*arrays, top_k=top_k, scale=SCALE, implementation=implementation)
        selected = selection(scores, lengths, top_k)
        visible = np.zeros((batch, queries, length + 1), bool)
        np.put_along_axis(visible, selected, True, axis=-1)  # -1 lands in the extra column
        assert_close(got, attention(q, k, v, visible[..., :-1]), atol)
