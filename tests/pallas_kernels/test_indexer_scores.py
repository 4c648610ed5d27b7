import collections

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.indexer_scores import indexer_scores
from tests.pallas_kernels.paged import to_pages

FLOAT8_ERROR = collections.defaultdict(lambda: 2.0**-20, mosaic_gpu=2.0**-11)
"""Largest error relative to the sum of the terms' magnitudes. Hopper adds float8 products in less than float32."""


def oracle(q, weights, keys, query_start, scale):
    """The formula in float64; -inf after a query's own position."""
    dots = np.einsum("btnd,bsd->btns", q.astype(np.float64), keys, optimize=True)
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

    @pytest.mark.parametrize(("queries", "length"), [(1, 1), (1, 700), (3, 700), (70, 1300), (513, 513)])
    def test_lengths(self, rng, queries, length, implementation):
        self.check(make(rng, queries=queries, length=length), [length - queries], implementation)

    def test_sequences_of_different_lengths(self, rng, implementation):
        self.check(make(rng, batch=3, queries=5, length=900), [895, 0, 411], implementation)

    def test_bfloat16_is_accumulated_in_float32(self, rng, implementation):
        inputs = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in make(rng, queries=8, length=600)]
        self.check(inputs, [592], implementation, dtype=jnp.bfloat16)

    def check(self, inputs, start, implementation, dtype=jnp.float32):
        q, weights, keys = inputs
        start = np.asarray(start, np.int32)
        pages, table = to_pages(np.random.default_rng(1), keys, 64)
        arrays = jnp.asarray(q, dtype), jnp.asarray(weights), jnp.asarray(pages, dtype), jnp.asarray(table)
        got = indexer_scores(*arrays, jnp.asarray(start), scale=0.125, implementation=implementation)
        got = np.asarray(got)
        expected = oracle(q, weights, keys, start, 0.125)
        assert got.shape[-1] == table.shape[1] * 64
        np.testing.assert_array_equal(np.isneginf(got[..., : keys.shape[1]]), np.isneginf(expected))
        assert np.isneginf(got[..., keys.shape[1] :]).all()
        seen = np.isfinite(expected)
        np.testing.assert_allclose(
            got[..., : keys.shape[1]][seen], expected[seen], atol=2e-5 * np.sqrt(q.shape[2] * 64)
        )


CASES = {  # batch, queries, heads, dim, length, page size, starts
    "of the model": (1, 256, 16, 64, 4096, 64, [3840]),
    "ragged starts": (3, 104, 16, 64, 2048, 64, [0, 777, 1944]),
    "queries no multiple of 8": (2, 101, 16, 64, 2048, 64, [0, 1500]),
    "few queries": (2, 3, 16, 64, 2048, 64, [0, 2045]),
    "8 queries": (2, 8, 16, 64, 640, 64, [592, 0]),
    "past the end": (1, 64, 16, 64, 1024, 64, [1000]),
    "pages of 16": (2, 104, 16, 64, 2048, 16, [1944, 777]),
    "pages of 256": (2, 104, 16, 64, 2048, 256, [1944, 777]),
    "odd number of pages": (2, 104, 16, 64, 1984, 64, [1880, 0]),
    "8 heads of 32": (2, 104, 8, 32, 2048, 64, [1944, 777]),
    "9 heads of 48": (1, 50, 9, 48, 2048, 64, [1000]),
    "32 heads of 128": (1, 104, 32, 128, 2048, 64, [1944]),
    "64 heads of 128": (1, 104, 64, 128, 1024, 64, [920]),
    "decode": (5, 1, 16, 64, 4096, 64, [0, 63, 64, 3000, 4095]),
    "decode, pages of 16": (3, 1, 16, 64, 2048, 16, [0, 1000, 2047]),
    "decode, odd number of pages": (2, 1, 16, 64, 1984, 64, [1983, 5]),
    "decode, 64 heads of 128": (2, 1, 64, 128, 2048, 64, [2047, 100]),
    "decode, several steps of keys": (2, 1, 16, 64, 9024, 64, [9023, 0]),
    "decode, past the end": (2, 1, 16, 64, 1984, 64, [5000, 1983]),
    "decode, 12 heads": (2, 1, 12, 64, 2048, 64, [2047, 100]),
}

run = jax.jit(indexer_scores, static_argnames=("scale", "skip_below", "implementation"))


class TestBfloat16:
    """Bfloat16 queries and keys, in every shape that kernels treat differently."""

    @pytest.mark.parametrize("case", CASES)
    def test_matches_the_formula(self, rng, case, implementation):
        self.check(rng, CASES[case], jnp.float32, implementation)

    @pytest.mark.parametrize("case", ["ragged starts", "few queries", "decode"])
    def test_queries_that_are_skipped_change_no_others(self, rng, case, implementation):
        """Whole blocks of queries, parts of them, and all."""
        batch, queries, heads, dim, length, page_size, starts = CASES[case]
        q, gates, keys = make(rng, batch=batch, queries=queries, heads=heads, dim=dim, length=length)
        pages, table = to_pages(rng, keys, page_size)
        arrays = jnp.asarray(q, jnp.bfloat16), gates, jnp.asarray(pages, jnp.bfloat16), table, np.asarray(starts)
        expected = np.asarray(run(*arrays, scale=0.125, implementation=implementation))
        position = np.asarray(starts)[:, None] + np.arange(queries)
        for skip_below in (1, 800, 2000, 4096):
            got = run(*arrays, scale=0.125, skip_below=skip_below, implementation=implementation)
            read = position >= skip_below
            np.testing.assert_array_equal(np.asarray(got)[read], expected[read])

    @pytest.mark.parametrize("case", ["of the model", "decode"])
    def test_gates_of_bfloat16(self, rng, case, implementation):
        self.check(rng, CASES[case], jnp.bfloat16, implementation)

    @pytest.mark.parametrize("queries", [1, 40])
    def test_keys_behind_the_query_may_be_nan(self, rng, queries, implementation):
        """They may be another sequence's."""
        q, gates, keys = make(rng, queries=queries, length=640)
        for start in (0, 300, 555):
            keys[0, start + queries :] = np.nan
            arrays = (
                jnp.asarray(q, jnp.bfloat16),
                jnp.asarray(gates),
                jnp.asarray(keys.reshape(10, 64, 64), jnp.bfloat16),
            )
            where = np.arange(10, dtype=np.int32)[None], np.array([start], np.int32)
            got = np.asarray(run(*arrays, *where, scale=0.125, implementation=implementation))
            seen = np.arange(640) <= start + np.arange(queries)[:, None]
            np.testing.assert_array_equal(np.isfinite(got[0]), seen)
            keys[0] = rng.normal(size=keys.shape[1:])

    @staticmethod
    def check(rng, case, gate_dtype, implementation):
        batch, queries, heads, dim, length, page_size, starts = case
        q, gates, keys = make(rng, batch=batch, queries=queries, heads=heads, dim=dim, length=length)
        pages, table = to_pages(rng, keys, page_size)
        q, pages = (jnp.asarray(x, jnp.bfloat16) for x in (q, pages))
        gates, starts = jnp.asarray(gates, gate_dtype), np.asarray(starts, np.int32)
        got = np.asarray(run(q, gates, pages, table, starts, scale=0.125, implementation=implementation))
        keys = np.asarray(pages, np.float32)[table].reshape(batch, length, dim)
        expected = oracle(np.asarray(q, np.float32), np.asarray(gates, np.float32), keys, starts, 0.125)
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
        seen = np.isfinite(expected)
        np.testing.assert_allclose(got[seen], expected[seen], rtol=1e-5, atol=2e-5 * np.sqrt(heads * dim))


class TestFloat8:
    """Float8 queries and keys, with a power of two for each key, as `quantize` makes them."""

    @pytest.mark.parametrize("case", [case for case, (*_, dim, _, _, _) in CASES.items() if dim % 32 == 0])
    def test_matches_the_formula(self, rng, case, implementation):
        self.check(rng, CASES[case], implementation)

    def test_scales_of_one_change_nothing(self, rng, implementation):
        q, gates, keys = make(rng, queries=40, length=640)
        q, pages = (jnp.asarray(x, jnp.float8_e4m3fn) for x in (q, keys.reshape(10, 64, 64)))
        args = q, jnp.asarray(gates), pages, np.arange(10, dtype=np.int32)[None], np.array([600], np.int32)
        scaled = run(*args, scale=0.125, key_scales=jnp.ones((10, 64)), implementation=implementation)
        plain = run(*args, scale=0.125, implementation=implementation)
        np.testing.assert_array_equal(np.asarray(scaled), np.asarray(plain))

    def test_scores_are_the_recorded_ones(self, golden, implementation):
        """Of the publisher's values and scales; the reference is in float64."""
        arrays = np.load(golden / "indexer_fp8.npz")
        got, gates = self.recorded(arrays, implementation), arrays["w"] * arrays["q_scale"]
        positions = arrays["positions"]
        q, keys = (arrays[name].view(ml_dtypes.float8_e4m3fn).astype(np.float32) for name in ("q_fp8", "k_fp8"))
        seen = np.arange(len(keys)) <= positions[:, None]
        np.testing.assert_array_equal(np.isneginf(got), ~seen)
        q, keys = q[:, None], np.broadcast_to(keys, (len(q), *keys.shape))
        magnitude = oracle(np.abs(q), np.abs(gates)[:, None], np.abs(keys), positions, 64**-0.5)[:, 0]
        error = np.abs(np.where(seen, got - arrays["scores_fp8"], 0))
        assert (error[seen] <= FLOAT8_ERROR[implementation] * (magnitude * arrays["k_scale"])[seen]).all()

    def test_most_selected_positions_are_those_of_recorded_exact_scores(self, golden, implementation):
        arrays, top_k, overlaps = np.load(golden / "indexer_fp8.npz"), 48, []
        got = self.recorded(arrays, implementation)
        for position, coarse, exact in zip(arrays["positions"], got, arrays["scores_exact"], strict=True):
            if position >= top_k:
                chosen = (set(np.argsort(-row[: position + 1], kind="stable")[:top_k]) for row in (coarse, exact))
                overlaps.append(len(set.intersection(*chosen)) / top_k)
        print(f"{np.mean(overlaps):.1%} in common, least {np.min(overlaps):.1%}")
        assert np.mean(overlaps) > 0.97

    @staticmethod
    def recorded(arrays, implementation):
        """Scores of the recorded queries and keys, `[queries, keys]`."""
        q, keys = (arrays[name].view(ml_dtypes.float8_e4m3fn) for name in ("q_fp8", "k_fp8"))
        gates, positions = arrays["w"] * arrays["q_scale"], arrays["positions"]
        padding = ((0, -len(keys) % 64), (0, 0))
        pages = jnp.asarray(np.pad(keys.view(np.uint8), padding).view(ml_dtypes.float8_e4m3fn).reshape(-1, 64, 64))
        # Each query is a sequence of its own, over the same pages, at its own position.
        got = run(
            jnp.asarray(q)[:, None],
            jnp.asarray(gates)[:, None],
            pages,
            np.tile(np.arange(len(pages), dtype=np.int32), (len(q), 1)),
            positions,
            scale=64**-0.5,
            key_scales=jnp.asarray(np.pad(arrays["k_scale"], padding[0]).reshape(-1, 64)),
            implementation=implementation,
        )
        return np.asarray(got)[:, 0, : len(keys)]

    @staticmethod
    def check(rng, case, implementation):
        batch, queries, heads, dim, length, page_size, starts = case
        q, gates, keys = make(rng, batch=batch, queries=queries, heads=heads, dim=dim, length=length)
        scales = (2.0 ** rng.integers(-9, 3, (batch, length))).astype(np.float32)
        pages, table = to_pages(np.random.default_rng(1), keys, page_size)
        scale_pages, _ = to_pages(np.random.default_rng(1), scales, page_size)
        q, pages = (jnp.asarray(x, jnp.float8_e4m3fn) for x in (q, pages))
        starts = np.asarray(starts, np.int32)
        got = run(
            *(q, jnp.asarray(gates), pages, table, starts),
            scale=0.125,
            key_scales=jnp.asarray(scale_pages),
            implementation=implementation,
        )
        got, q = np.asarray(got), np.asarray(q, np.float32)
        keys = np.asarray(pages, np.float32)[table].reshape(batch, length, dim)
        expected = oracle(q, gates, keys, starts, 0.125) * scales[:, None]
        magnitude = oracle(np.abs(q), np.abs(gates), np.abs(keys), starts, 0.125) * scales[:, None]
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
        seen = np.isfinite(expected)
        worst = np.max(np.abs(got[seen] - expected[seen]) / magnitude[seen])
        print(f"largest error 2 ** {np.log2(worst):.1f} of the terms' magnitudes")
        assert worst <= FLOAT8_ERROR[implementation]
