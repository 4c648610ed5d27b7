"""A NumPy machine runs the kernels for single tokens of a decoder layer. It tests logic, not races, without a GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import combine_experts, finish_projections, kernel_call, route
from pallas_kernels.decode_layer import xla
from pallas_kernels.decode_layer.mosaic_gpu import combining, finishing, ordering, routing
from tests.pallas_kernels.gpu.numpy_machine import numpy_launch

BF16, PAGE_SIZE = ml_dtypes.bfloat16, 16
HEADS, KV_HEADS, INDEX_HEADS, EPS, INDEX_EPS = 2, 2, 6, 1e-6, 1e-5


@pytest.fixture(autouse=True)
def in_numpy(monkeypatch, quick_to_compile):
    """Lets the public functions run their kernels in a NumPy machine."""
    monkeypatch.setattr(kernel_call, "interpreted", lambda name: True)
    for module in (combining, finishing, ordering, routing):
        monkeypatch.setattr(module, "launch", numpy_launch)


def numbers(rng, *shape):
    return rng.standard_normal(shape).astype(BF16)


def near_one(rng, *shape):
    return (1 + rng.standard_normal(shape) / 4).astype(BF16)


def arguments(rows):
    rng = np.random.default_rng(rows)
    angles, index_angles = rng.uniform(-9, 9, (rows, 64)), rng.uniform(-9, 9, (rows, 32))
    return {
        "q": 3 * numbers(rng, rows, HEADS, 128),
        "k": numbers(rng, rows, KV_HEADS, 128),
        "v": numbers(rng, rows, KV_HEADS, 128),
        "index": numbers(rng, rows, INDEX_HEADS * 65),
        "index_k": 3 + 2 * numbers(rng, rows, 64),
        "q_norm": near_one(rng, 128),
        "k_norm": near_one(rng, 128),
        "index_q_norm": near_one(rng, 64),
        "index_k_norm": near_one(rng, 64),
        "index_k_bias": numbers(rng, 64),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "index_cos": np.cos(index_angles).astype(np.float32),
        "index_sin": np.sin(index_angles).astype(np.float32),
    }


def finished(arrays, cache=None):
    """Queries, the indexer's, its gates, and rows of keys and values and of index keys, or pages with them."""
    out = finish_projections(**arrays, **(cache or {}), eps=EPS, index_eps=INDEX_EPS, implementation="mosaic_gpu")
    return [np.asarray(x) for x in out]


def assert_near(got, wanted, tolerance=2e-2):
    for one, other in zip(got, wanted, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())
        assert np.linalg.norm(one - other) < tolerance / 2 * np.linalg.norm(other)


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_finish_projections(rows):
    """Near the portable formulas, whose roundings are the same: few numbers differ, by one rounding."""
    arrays, none = arguments(rows), dict.fromkeys(("kv_pages", "index_pages", "slots"))
    given = {name: jnp.asarray(x) for name, x in arrays.items()}
    got, wanted = finished(arrays), xla.finish_projections(**given, **none, eps=EPS, index_eps=INDEX_EPS)
    assert [x.dtype.name for x in got] == ["bfloat16", "bfloat16", "float32", "bfloat16", "bfloat16"]
    assert_near(got, wanted, 1e-2)
    for one, other in zip(got, wanted, strict=True):
        assert np.mean(one != np.asarray(other)) < 5e-3


def test_a_token_has_the_same_bits_alone():
    arrays = arguments(35)
    together = finished(arrays)
    for count in (1, 9):
        part = {name: x[34 - count : 34].copy() if len(x) == 35 else x for name, x in arrays.items()}
        for one, all_of_them in zip(finished(part), together, strict=True):
            np.testing.assert_array_equal(one, all_of_them[34 - count : 34])


def test_rows_go_to_their_places_in_pages():
    """Where a token has no place, nothing is written; all other places keep what they have."""
    pages, arrays = 3, arguments(5)
    rng = np.random.default_rng(1)
    before = numbers(rng, pages, PAGE_SIZE, 2 * KV_HEADS, 128), numbers(rng, pages, PAGE_SIZE, 64)
    places = np.array([PAGE_SIZE * pages, 7, PAGE_SIZE * pages - 1, -1, 0], np.int32)
    cache = {"kv_pages": before[0], "index_pages": before[1], "slots": places}
    *_, kv, index_keys = finished(arrays, cache)
    *_, new_kv, new_keys = finished(arrays)
    wanted = [x.reshape(-1, *x.shape[2:]).copy() for x in before]
    for row in (1, 2, 4):
        wanted[0][places[row]], wanted[1][places[row]] = new_kv[row], new_keys[row]
    np.testing.assert_array_equal(kv.reshape(wanted[0].shape), wanted[0])
    np.testing.assert_array_equal(index_keys.reshape(wanted[1].shape), wanted[1])


def routed(arrays, top_k=5, normalise=True, named="mosaic_gpu", **here) -> Any:
    """`Routed` of NumPy arrays."""
    how = {"top_k": top_k, "eps": EPS, "normalise": normalise, "implementation": named}
    return jax.tree.map(np.asarray, route(**arrays, **how, **here))


def route_arguments(rows, experts, size=256, seed=None):
    rng = np.random.default_rng(rows if seed is None else seed)
    return {
        "x": 2 * numbers(rng, rows, size),
        "update": numbers(rng, rows, size),
        "norm": near_one(rng, size),
        "router": (numbers(rng, experts, size) / 8).astype(BF16),
        "valid": rng.random(rows) < 0.7,
    }


def sorted_rows(out, valid, experts, first=0):
    """Rows, places and counts of this number of experts, from the first one on, that follow from the chosen ones."""
    top_k, own = out.experts.shape[1], out.experts - first
    keys = np.where(valid[:, None] & (own >= 0) & (own < experts), own, experts).reshape(-1)
    order = np.argsort(keys, kind="stable")
    counts = np.bincount(keys, minlength=experts + 1)[:experts]
    return out.normed[order // top_k], np.argsort(order).reshape(-1, top_k), counts


class TestRoute:
    @pytest.mark.parametrize(
        ("rows", "experts", "top_k"),
        [(1, 128, 8), (3, 128, 8), (8, 128, 8), (7, 16, 5), (8, 32, 32), (5, 64, 3), (9, 64, 5), (17, 128, 8)],
    )
    @pytest.mark.parametrize("normalise", [True, False])
    def test_experts(self, rows, experts, top_k, normalise):
        """A token's choice is that of its logits wherever these lead by more than rounding."""
        arrays = route_arguments(rows, experts)
        out, portable = (routed(arrays, top_k, normalise, named) for named in ("mosaic_gpu", "xla"))
        np.testing.assert_array_equal(out.y, portable.y)
        assert_near([out.normed], [portable.normed])
        logits = out.normed.astype(np.float64) @ arrays["router"].astype(np.float64).T
        probabilities = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
        chosen = np.take_along_axis(probabilities, out.experts, axis=1)
        best = -np.sort(-probabilities, axis=1)[:, :top_k]
        np.testing.assert_allclose(chosen, best, rtol=1e-4)
        assert all(len(set(row)) == top_k for row in out.experts)
        wanted = chosen / chosen.sum(axis=1, keepdims=True) if normalise else chosen
        np.testing.assert_allclose(out.weights, np.where(arrays["valid"][:, None], wanted, 0), rtol=1e-4)

    @pytest.mark.parametrize("valid", ["all", "none", "some"])
    @pytest.mark.parametrize(
        ("rows", "experts", "top_k"),
        [
            *((1, 128, 8), (3, 32, 8), (8, 128, 8), (6, 64, 5), (8, 16, 16)),
            *((9, 64, 5), (17, 128, 9), (40, 128, 8), (64, 32, 32)),
        ],
    )
    def test_rows_are_sorted_by_expert(self, rows, experts, top_k, valid):
        """Tokens share experts: half of them are twice there."""
        arrays = route_arguments(rows, experts)
        for name in ("x", "update"):
            arrays[name][rows // 2 :] = arrays[name][: rows - rows // 2].copy()
        if valid != "some":
            arrays["valid"] = np.full(rows, valid == "all")
        for named in ("mosaic_gpu", "xla"):
            out = routed(arrays, top_k, named=named)
            given, places, counts = sorted_rows(out, arrays["valid"], experts)
            np.testing.assert_array_equal(out.row_of, places)
            np.testing.assert_array_equal(out.group_sizes, counts)
            np.testing.assert_array_equal(out.rows, given)
            np.testing.assert_array_equal((out.weights > 0).all(axis=1), arrays["valid"])
            assert counts.sum() == top_k * np.count_nonzero(arrays["valid"])

    @pytest.mark.parametrize(
        ("rows", "experts", "top_k", "first", "own"),
        [
            *((1, 128, 8, 64, 64), (7, 128, 8, 0, 64), (8, 64, 5, 48, 16), (3, 16, 16, 6, 2)),
            *((9, 64, 5, 16, 16), (17, 128, 9, 112, 16), (40, 128, 8, 64, 64), (64, 32, 32, 0, 30)),
        ],
    )
    def test_rows_of_experts_that_are_here(self, rows, experts, top_k, first, own):
        arrays = route_arguments(rows, experts)
        for named in ("mosaic_gpu", "xla"):
            everywhere = routed(arrays, top_k, named=named)
            out = routed(arrays, top_k, named=named, first_own=first, own=own)
            for name in ("y", "normed", "experts"):
                np.testing.assert_array_equal(getattr(out, name), getattr(everywhere, name))
            given, places, counts = sorted_rows(out, arrays["valid"], own, first)
            np.testing.assert_array_equal(out.row_of, places)
            np.testing.assert_array_equal(out.group_sizes, counts)
            np.testing.assert_array_equal(out.rows, given)
            here = (out.experts >= first) & (out.experts < first + own)
            np.testing.assert_array_equal(out.weights, np.where(here, everywhere.weights, 0))

    def test_of_equal_experts_the_lower_come_first(self):
        arrays, like = route_arguments(2, 128), [3, 17, 40, 90, 99, 127]
        arrays["router"][like] = arrays["router"][99]
        arrays["router"] = np.where(np.isin(np.arange(128), like)[:, None], arrays["router"], 0).astype(BF16)
        others = [0, 1, 2, 4, 5, 6, 7, 8]
        for own in routed(arrays, top_k=8).experts:
            assert own.tolist() in ([*like, *others[:2]], others)

    def test_probabilities_of_zero_are_chosen_last_and_in_order(self):
        """Far below the best, all probabilities are 0."""
        arrays = {"x": np.ones((1, 256), BF16), "update": np.zeros((1, 256), BF16), "norm": np.ones(256, BF16)}
        router = np.full((16, 256), -4, BF16)
        router[[2, 9]] = [[1], [0.99]]
        out = routed(arrays | {"router": router, "valid": np.ones(1, bool)}, top_k=4)
        assert out.experts.tolist() == [[2, 9, 0, 1]]
        np.testing.assert_array_equal(out.weights[0, 2:], 0)

    def test_a_token_has_the_same_bits_in_every_group(self):
        """One of 17 tokens alone and among 8, which one cluster has."""
        arrays = route_arguments(17, 64, 512)
        arrays["valid"][[0, 7, 16]] = True
        together = routed(arrays)
        for rows in ([0], [7], [16], [3, 4, 16, 1, 7, 2, 9, 0]):
            part = {name: x[rows] if name in ("x", "update", "valid") else x for name, x in arrays.items()}
            found = routed(part)
            for name in ("y", "normed", "experts", "weights"):
                np.testing.assert_array_equal(getattr(found, name), getattr(together, name)[rows])


def expert_rows(tokens, experts, size):
    rng = np.random.default_rng(tokens)
    weights = rng.uniform(0, 1, (tokens, experts)).astype(np.float32)
    weights[0, -1] = 0
    row_of = rng.permutation(tokens * experts).reshape(tokens, experts).astype(np.int32)
    return numbers(rng, tokens * experts, size), row_of, weights, 2 * numbers(rng, tokens, size), near_one(rng, size)


def combined(*arrays):
    return [np.asarray(x) for x in combine_experts(*arrays, eps=EPS, implementation="mosaic_gpu")]


class TestCombineExperts:
    @pytest.mark.parametrize(
        ("tokens", "experts", "size"),
        [(1, 8, 2048), (3, 8, 256), (8, 1, 512), (17, 8, 768), (1, 32, 256), (2, 6, 1792)],
    )
    def test_sums(self, tokens, experts, size):
        """Sums have the bits of single operations; norms differ by the order in which squares are added."""
        arrays = expert_rows(tokens, experts, size)
        y, normed = combined(*arrays)
        alone: Any = functools.partial(xla.combine_experts, addresses=None, eps=EPS, axes=(), summed=())
        wanted, wanted_norm = alone(*map(jnp.asarray, arrays))
        np.testing.assert_array_equal(y, np.asarray(wanted))
        near, wanted_norm = normed.astype(np.float32), np.asarray(wanted_norm, np.float32)
        np.testing.assert_allclose(near, wanted_norm, rtol=2**-7, atol=0)
        assert np.mean(near == wanted_norm) > 0.98

    def test_places_out_of_range_are_the_nearest_in_range(self):
        rows, _, *others = expert_rows(2, 4, 256)
        bad = np.array([[-1, 8, 3, 2**31 - 1], [-(2**31), 0, 7, 5]], np.int32)
        for one, other in zip(combined(rows, bad, *others), combined(rows, bad.clip(0, 7), *others), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_a_token_has_the_same_bits_alone(self):
        rows, row_of, weights, x, norm = expert_rows(17, 8, 512)
        together = combined(rows, row_of, weights, x, norm)
        for token in (0, 9, 16):
            # Alone, its rows lie in another order.
            own = np.roll(np.arange(8, dtype=np.int32), token)[None]
            mine = np.empty_like(rows[:8])
            mine[own[0]] = rows[row_of[token]]
            part = slice(token, token + 1)
            for one, all_of_them in zip(combined(mine, own, weights[part], x[part], norm), together, strict=True):
                np.testing.assert_array_equal(one, all_of_them[part])
