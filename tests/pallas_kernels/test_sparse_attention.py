"""Sparse attention against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_attention import sparse_attention
from tests.pallas_kernels.attention_oracle import SCALE, assert_close, attention, random_inputs
from tests.pallas_kernels.paged import to_pages

run = jax.jit(sparse_attention, static_argnames=("scale", "implementation"))


class TestSparseAttention:
    @pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
    def test_groups(self, rng, group, form, implementation):
        inputs = random_inputs(rng, form, queries=9, length=200, heads=2 * group, kv_heads=2)
        self.check(inputs, self.choose(rng, inputs, 64), form, implementation)

    @pytest.mark.parametrize("top_k", [1, 64, 300, 512])
    def test_selections(self, rng, top_k, form, implementation):
        """Fewer selected than wanted, too: the rest is -1."""
        inputs = random_inputs(rng, form, batch=2, queries=7, length=300)
        self.check(inputs, self.choose(rng, inputs, top_k), form, implementation)

    @pytest.mark.parametrize("queries", [15, 16, 33])
    def test_neighbours_that_share_keys(self, rng, queries, form, implementation):
        """All select from the same few keys, whole groups of neighbours and a group that is not full."""
        inputs = random_inputs(rng, form, batch=2, queries=queries, length=1000)
        pool = np.sort(rng.choice(1000, 150, replace=False))
        places = self.choose(rng, random_inputs(rng, form, batch=2, queries=queries, length=len(pool)), 60)
        self.check(inputs, np.where(places < 0, -1, pool[places]).astype(np.int32), form, implementation)

    @pytest.mark.parametrize("shared", [0, 40, 300])
    def test_halves_of_neighbours_that_share_keys(self, rng, shared, form, implementation):
        """Of 16 neighbours with 8 heads on a KV head, all select from `shared` keys, and each half from its own."""
        inputs = random_inputs(rng, form, queries=39, length=1000, heads=8, kv_heads=1)
        both, *halves = np.split(rng.permutation(1000), [shared, shared + 400, shared + 500])[:3]
        indices = np.full((1, 39, 256), -1, np.int32)
        for query in range(39):
            own = np.concatenate([both, halves[query // 8 % 2]])
            count = min(rng.integers(128, 257), len(own))
            indices[0, query, :count] = np.sort(rng.choice(own, count, replace=False))
        self.check(inputs, indices, form, implementation)

    def test_decode(self, rng, form, implementation):
        inputs = random_inputs(rng, form, batch=4, queries=1, length=500)
        self.check(inputs, self.choose(rng, inputs, 64), form, implementation)

    def test_runs_of_neighbouring_positions(self, rng, form, implementation):
        """At all alignments, across pages, in falling order too, with gaps of one position and an entry of -1."""
        inputs = random_inputs(rng, form, batch=2, queries=2, length=900)
        indices = np.full((2, 2, 128), -1, np.int32)
        for row, size in zip(np.ndindex(2, 2), (2, 8, 9, 64), strict=True):
            runs = [np.arange(start, start + size) for start in range(59, 890 - size, size + 1)]
            chosen = np.concatenate(runs[::-1] if size == 8 else runs)[:128]
            indices[row][: len(chosen)] = chosen
        indices[1, 1, 17] = -1
        self.check(inputs, indices, form, implementation)

    def test_nothing_selected(self, rng, form, implementation):
        inputs = random_inputs(rng, form, queries=3, length=100)
        indices = self.choose(rng, inputs, 16)
        indices[0, 1] = -1
        self.check(inputs, indices, form, implementation)

    def test_more_queries_than_fit_the_workspace(self, rng, form, implementation):
        inputs = random_inputs(rng, form, queries=300, length=400, dim=128, kv_heads=4)
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
        got = run(
            jnp.asarray(q, dtype), jnp.asarray(kv, dtype), indices, table, scale=SCALE, implementation=implementation
        )
        assert_close(got, attention(q, k, v, visible[..., :-1]), atol)
