import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.indexer_scores import indexer_scores
from tests.pallas_kernels.paged import to_pages


def oracle(q, weights, keys, query_start, scale):
    """The formula in float64; -inf after a query's own position."""
    dots = np.einsum("btnd,bsd->btns", q, keys, dtype=np.float64)
    scores = np.einsum("btns,btn->bts", np.maximum(dots, 0), weights) * scale
    visible = np.arange(keys.shape[1]) <= (query_start[:, None] + np.arange(q.shape[1]))[..., None]
    return np.where(visible, scores, -np.inf)


def make(rng, *, batch=1, queries, heads=16, dim=64, length):
    q = rng.normal(size=(batch, queries, heads, dim)).astype(np.float32)
    weights = rng.normal(size=(batch, queries, heads)).astype(np.float32)
    keys = rng.normal(size=(batch, length, dim)).astype(np.float32)
    return q, weights, keys


class TestIndexerScores:
    @pytest.mark.parametrize(("heads", "dim"), [(16, 64), (8, 32), (64, 128), (16, 16)])
    def test_shapes(self, rng, heads, dim, implementation):
        self.check(make(rng, queries=40, heads=heads, dim=dim, length=40), [0], implementation)

    @pytest.mark.parametrize(("queries", "length"), [(1, 1), (1, 700), (3, 700), (70, 1300), (513, 513), (300, 5000)])
    def test_lengths(self, rng, queries, length, implementation):
        self.check(make(rng, queries=queries, length=length), [length - queries], implementation)

    def test_sequences_of_different_lengths(self, rng, implementation):
        self.check(make(rng, batch=3, queries=5, length=900), [895, 0, 411], implementation)

    def test_decode(self, rng, implementation):
        self.check(make(rng, batch=3, queries=1, length=9000), [8999, 0, 4095], implementation)

    def test_bfloat16_is_accumulated_in_float32(self, rng, implementation):
        self.check(make(rng, queries=8, length=600), [592], implementation, dtype=jnp.bfloat16)

    def check(self, inputs, start, implementation, dtype=None):
        """The portable implementation in float32 if not said otherwise, the kernels in the bfloat16 they are for."""
        dtype = dtype or (jnp.float32 if implementation == "xla" else jnp.bfloat16)
        q, keys = (np.asarray(jnp.asarray(x, dtype), np.float32) for x in (inputs[0], inputs[2]))
        weights = inputs[1]
        start = np.asarray(start, np.int32)
        pages, table = to_pages(np.random.default_rng(1), keys, 64)
        args = (jnp.asarray(q, dtype), jnp.asarray(weights), jnp.asarray(pages, dtype), table, start)
        got = np.asarray(indexer_scores(*args, scale=0.125, implementation=implementation))
        expected = oracle(q, weights, keys, start, 0.125)
        assert got.shape[-1] == table.shape[1] * 64
        np.testing.assert_array_equal(np.isneginf(got[..., : keys.shape[1]]), np.isneginf(expected))
        assert np.isneginf(got[..., keys.shape[1] :]).all()
        seen = np.isfinite(expected)
        np.testing.assert_allclose(
            got[..., : keys.shape[1]][seen], expected[seen], atol=2e-5 * np.sqrt(q.shape[2] * 64)
        )
