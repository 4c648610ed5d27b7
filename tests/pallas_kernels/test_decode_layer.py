"""The operations between attention and experts of single tokens: against their formulas in float64, and their refusals.

The sizes are such that the kernels for Hopper GPUs take them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ArgumentError, UnsupportedError, combine_experts, dispatch, finish_projections, route

SIZE, HEADS, KV_HEADS, INDEX_HEADS, DIM, INDEX_DIM, PAGE_SIZE, PAGES = 512, 5, 2, 6, 128, 64, 16, 4
EPS, INDEX_EPS = 1e-5, 1e-6
HOW: dict[str, Any] = {"eps": EPS, "index_eps": INDEX_EPS}


@pytest.fixture(params=[name for name in dispatch.OPERATIONS["route"].implementations if name in dispatch.available()])
def named(request) -> str:
    return request.param


def numbers(seed: int, *shape: int, scale: float = 1.0, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def arguments(tokens: int, dtype: Any = jnp.bfloat16) -> dict[str, jax.Array]:
    def rows(seed: int, *shape: int) -> jax.Array:
        return numbers(seed, tokens, *shape, scale=seed, dtype=dtype)

    def factors(seed: int, size: int) -> jax.Array:
        return (1 + numbers(seed, size, scale=0.2, dtype=jnp.float32)).astype(dtype)

    angles, index_angles = (
        np.random.default_rng(tokens).uniform(-9, 9, (tokens, size)) for size in (DIM // 2, INDEX_DIM // 2)
    )
    of_angles = [jnp.asarray(f(x), jnp.float32) for x in (angles, index_angles) for f in (np.cos, np.sin)]
    return {
        "q": rows(2, HEADS, DIM),
        "k": rows(3, KV_HEADS, DIM),
        "v": rows(4, KV_HEADS, DIM),
        "index": rows(5, INDEX_HEADS * (INDEX_DIM + 1)),
        "index_k": 4 + rows(6, INDEX_DIM),
        "q_norm": factors(7, DIM),
        "k_norm": factors(8, DIM),
        "index_q_norm": factors(9, INDEX_DIM),
        "index_k_norm": factors(10, INDEX_DIM),
        "index_k_bias": numbers(11, INDEX_DIM, dtype=dtype),
        **dict(zip(("cos", "sin", "index_cos", "index_sin"), of_angles, strict=True)),
    }


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def rms(x: np.ndarray, factors: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * factors


def turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def formula(arrays: dict[str, jax.Array]) -> list[np.ndarray]:
    a = {name: wide(x) for name, x in arrays.items()}
    q, k = (turned(rms(a[name], a[f"{name}_norm"], EPS), a["cos"], a["sin"]) for name in ("q", "k"))
    rows, angles = a["index"], (a["index_cos"], a["index_sin"])
    queries = rows[:, : INDEX_HEADS * INDEX_DIM].reshape(-1, INDEX_HEADS, INDEX_DIM)
    queries = turned(rms(queries, a["index_q_norm"], INDEX_EPS), *angles)
    keys = a["index_k"] - a["index_k"].mean(axis=-1, keepdims=True)
    keys = rms(keys, a["index_k_norm"], INDEX_EPS) + a["index_k_bias"]
    keys = turned(keys[:, None], *angles)[:, 0]
    return [q, queries, rows[:, INDEX_HEADS * INDEX_DIM :], np.concatenate([k, a["v"]], axis=1), keys]


def assert_near(got: Any, wanted: Any, tolerance: float = 2e-2) -> None:
    """Each number to a part of the largest, and all together closer: bfloat16 rounds several times."""
    for one, other in zip(got, wanted, strict=True):
        one = wide(one)
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())
        assert np.linalg.norm(one - other) < tolerance / 2 * np.linalg.norm(other)


class TestFinishProjections:
    @pytest.mark.parametrize("tokens", [1, 4, 16, 40, 64])
    def test_rows(self, tokens: int, named: str):
        arrays = arguments(tokens)
        got = jax.jit(lambda arrays: finish_projections(**arrays, **HOW, implementation=named))(arrays)
        assert [x.dtype.name for x in got] == ["bfloat16", "bfloat16", "float32", "bfloat16", "bfloat16"]
        assert_near(got, formula(arrays), 1e-2)
        np.testing.assert_array_equal(wide(got[2]), wide(arrays["index"][:, INDEX_HEADS * INDEX_DIM :]))
        np.testing.assert_array_equal(wide(got[3][:, KV_HEADS:]), wide(arrays["v"]))

    def test_in_float32(self):
        arrays = arguments(3, jnp.float32)
        assert_near(finish_projections(**arrays, **HOW), formula(arrays), 1e-5)

    def test_pages(self, named: str):
        """Rows are where their slots say; a slot that is not there is dropped; nothing else changes."""
        arrays, slots = arguments(5), jnp.array([PAGES * PAGE_SIZE, 7, PAGES * PAGE_SIZE - 1, -1, 0])
        before = numbers(12, PAGES, PAGE_SIZE, 2 * KV_HEADS, DIM), numbers(13, PAGES, PAGE_SIZE, INDEX_DIM)
        pages = {"kv_pages": before[0], "index_pages": before[1], "slots": slots}
        run = jax.jit(lambda arrays: finish_projections(**arrays, **HOW, implementation=named))
        *queries, kv, keys = run(arrays | pages)
        *others, new_kv, new_keys = run(arrays)
        for one, other in zip(queries, others, strict=True):
            np.testing.assert_array_equal(wide(one), wide(other))
        for got, old, new in ((kv, before[0], new_kv), (keys, before[1], new_keys)):
            wanted = wide(old).reshape(PAGES * PAGE_SIZE, *old.shape[2:])
            for row in (1, 2, 4):
                wanted[slots[row]] = wide(new[row])
            np.testing.assert_array_equal(wide(got).reshape(wanted.shape), wanted)

    def test_gradients(self):
        arrays = arguments(2, jnp.float32)
        run = jax.grad(lambda given: sum(x.sum() for x in finish_projections(**arrays | given, **HOW)))
        given = {name: arrays[name] for name in ("q", "k", "v", "index", "index_k", "q_norm", "index_k_norm")}
        assert all(np.abs(wide(x)).max() > 0 for x in run(given).values())

    def test_what_does_not_fit(self):
        arrays = arguments(2)
        for changed, message in (
            ({"index": arrays["index"][:, 1:]}, "index has 389 columns; it must have 65 for each head of the indexer"),
            ({"index": arrays["index"][:, :0]}, "index has 0 columns"),
            ({"k": arrays["k"].astype(jnp.float32)}, "k is float32; it must be bfloat16, as q is"),
            ({"slots": jnp.zeros(2, jnp.int32)}, "slots given alone; kv_pages, index_pages, slots go together"),
            ({"cos": arrays["cos"][:, 1:]}, r"cos has shape \[2, 63\]; it must be \[tokens, d\] with d = 64, as q has"),
        ):
            with pytest.raises(ArgumentError, match=message):
                finish_projections(**arrays | changed, **HOW)

    def test_what_the_kernel_does_not_take(self):
        of_two, cut = arguments(2), 5 * (INDEX_DIM + 1)
        pages = {"kv_pages": jnp.zeros((PAGES, PAGE_SIZE, 2 * KV_HEADS, DIM)), "slots": jnp.arange(2)}
        pages["index_pages"] = jnp.zeros((PAGES, PAGE_SIZE, INDEX_DIM))
        for arrays, message in (
            (arguments(65), "takes up to 64 tokens, not 65"),
            (arguments(2, jnp.float32), "only bfloat16, not float32"),
            (of_two | {"index": of_two["index"][:, :cut]}, "an even number up to 32 of 64, not 128, and 5 of 64"),
            (of_two | pages, "takes bf16 pages, not float32 and float32"),
        ):
            with pytest.raises(UnsupportedError, match=message):
                finish_projections(**arrays, **HOW, implementation="mosaic_gpu")


def route_arguments(tokens: int, experts: int = 128) -> dict[str, Any]:
    """Every third token is not valid."""
    return {
        "x": numbers(0, tokens, SIZE),
        "update": numbers(1, tokens, SIZE),
        "norm": 1 + numbers(2, SIZE, scale=0.2),
        "router": numbers(3, experts, SIZE, scale=0.1),
        "valid": jnp.arange(tokens) % 3 != 1,
    }


class TestRoute:
    @pytest.mark.parametrize("normalise", [True, False])
    @pytest.mark.parametrize("tokens", [1, 4, 8, 9, 40, 64])
    def test_experts(self, tokens: int, normalise: bool, named: str):
        """The chosen are the best of the logits that follow from the rounded norm."""
        arrays = route_arguments(tokens)
        run = jax.jit(lambda arrays: route(**arrays, top_k=8, eps=EPS, normalise=normalise, implementation=named))
        out = run(arrays)
        assert out.experts.dtype == jnp.int32 and out.weights.dtype == jnp.float32
        np.testing.assert_array_equal(wide(out.y), wide(arrays["x"] + arrays["update"]))
        assert_near([out.normed], [rms(wide(out.y), wide(arrays["norm"]), EPS)])
        logits = wide(out.normed) @ wide(arrays["router"]).T
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        assert all(len(set(row)) == 8 for row in np.asarray(out.experts).tolist())
        chosen = np.take_along_axis(probabilities, np.asarray(out.experts), axis=1)
        np.testing.assert_allclose(chosen, -np.sort(-probabilities, axis=1)[:, :8], rtol=1e-3)
        wanted = chosen / chosen.sum(axis=1, keepdims=True) if normalise else chosen
        np.testing.assert_allclose(out.weights, np.where(arrays["valid"][:, None], wanted, 0), rtol=1e-3)

    @pytest.mark.parametrize("tokens", [1, 5, 8, 9, 64, 100])
    def test_rows_by_expert(self, tokens: int, named: str):
        """Of 16 experts, of which tokens share many."""
        arrays = route_arguments(tokens, 16)
        if named == "mosaic_gpu" and tokens > 64:
            pytest.skip("the kernel takes up to 64 tokens")
        out = jax.jit(lambda arrays: route(**arrays, top_k=6, eps=EPS, implementation=named))(arrays)
        assert out.row_of.dtype == out.group_sizes.dtype == jnp.int32
        keys = np.where(arrays["valid"][:, None], out.experts, 16).reshape(-1)
        order = np.argsort(keys, kind="stable")
        np.testing.assert_array_equal(wide(out.rows), wide(out.normed)[order // 6])
        np.testing.assert_array_equal(np.asarray(out.row_of).reshape(-1)[order], np.arange(6 * tokens))
        np.testing.assert_array_equal(out.group_sizes, np.bincount(keys, minlength=17)[:16])

    @pytest.mark.parametrize("tokens", [1, 8, 9, 64])
    def test_rows_of_experts_that_are_here(self, tokens: int, named: str):
        """The choice is among all 16, and its weights have the same bits."""
        arrays, how = route_arguments(tokens, 16), {"top_k": 6, "eps": EPS, "implementation": named}
        everywhere = jax.jit(lambda arrays: route(**arrays, **how))(arrays)
        run = jax.jit(lambda arrays, first: route(**arrays, first_own=first, own=4, **how))
        for first in (0, 4, 12):
            out = run(arrays, first)
            for name in ("y", "normed", "experts"):
                np.testing.assert_array_equal(wide(getattr(out, name)), wide(getattr(everywhere, name)))
            own = np.asarray(out.experts) - first
            here = np.asarray(arrays["valid"])[:, None] & (own >= 0) & (own < 4)
            np.testing.assert_array_equal(out.weights, np.where(here, everywhere.weights, 0))
            keys = np.where(here, own, 4).reshape(-1)
            order = np.argsort(keys, kind="stable")
            np.testing.assert_array_equal(wide(out.rows), wide(out.normed)[order // 6])
            np.testing.assert_array_equal(np.asarray(out.row_of).reshape(-1)[order], np.arange(6 * tokens))
            np.testing.assert_array_equal(out.group_sizes, np.bincount(keys, minlength=5)[:4])

    def test_a_token_has_the_same_bits_alone(self, named: str):
        if named == "xla":
            pytest.skip("XLA orders sums by the number of tokens")
        arrays = route_arguments(17)
        run = jax.jit(lambda arrays: route(**arrays, top_k=8, eps=EPS, implementation=named))
        together = run(arrays)
        for row in (0, 9, 16):
            by_row = ("x", "update", "valid")
            alone = run({name: x[row : row + 1] if name in by_row else x for name, x in arrays.items()})
            for name in ("y", "normed", "experts", "weights"):
                np.testing.assert_array_equal(wide(getattr(alone, name)[0]), wide(getattr(together, name)[row]))

    def test_of_equal_experts_the_lower_come_first(self, named: str):
        arrays = route_arguments(3)
        arrays["router"] = jnp.tile(numbers(1, 2, SIZE), (16, 1))
        for own in np.asarray(route(**arrays, top_k=5, eps=EPS, implementation=named).experts).tolist():
            assert own in ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])

    def test_gradients(self):
        arrays = route_arguments(3)
        arrays |= {name: x.astype(jnp.float32) for name, x in arrays.items() if name != "valid"}

        def loss(x: jax.Array, router: jax.Array) -> jax.Array:
            changed: dict[str, Any] = {"x": x, "router": router}
            out = route(**arrays | changed, top_k=4, eps=EPS)
            return jnp.sum(out.weights**2) + jnp.sum(out.rows**2)

        of_x, of_router = jax.grad(loss, argnums=(0, 1))(arrays["x"], arrays["router"])
        assert (np.abs(wide(of_x)).max(axis=1) > 0).all() and np.abs(wide(of_router)).max() > 0

    def test_what_does_not_fit(self):
        arrays = route_arguments(2, 16)
        changes: list[tuple[dict[str, Any], int, str]] = [
            ({}, 17, "route: top_k is 17; it must be at most e = 16 of router"),
            ({"valid": jnp.ones(2, jnp.int32)}, 8, "route: valid is int32; it must be bool"),
            ({"valid": jnp.ones(3, bool)}, 8, r"valid has shape \[3\]; it must be \[tokens\] with tokens = 2"),
            ({"update": jnp.zeros((2, SIZE))}, 8, "update is float32; it must be bfloat16, as x is"),
        ]
        for changed, top_k, message in changes:
            with pytest.raises(ArgumentError, match=message):
                route(**arrays | changed, top_k=top_k, eps=EPS)
        parts: list[tuple[dict[str, Any], str]] = [
            ({"own": 4}, "route: first_own and own go together; one of them is None"),
            ({"own": 17, "first_own": 0}, "route: own is 17; it must be at most e = 16 of router"),
            ({"own": 4, "first_own": jnp.zeros(2, jnp.int32)}, r"route: first_own has shape \[2\]; it must be \[\]"),
        ]
        for given, message in parts:
            with pytest.raises(ArgumentError, match=message):
                route(**arrays, **given, top_k=8, eps=EPS)


def expert_rows(tokens: int, experts: int, size: int = SIZE, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    rng = np.random.default_rng(tokens)
    weights = rng.uniform(0, 1, (tokens, experts)) * (rng.uniform(size=(tokens, experts)) < 0.9)
    return {
        "rows": numbers(0, tokens * experts, size, dtype=dtype),
        "row_of": jnp.asarray(rng.permutation(tokens * experts).reshape(tokens, experts), jnp.int32),
        "weights": jnp.asarray(weights, jnp.float32),
        "x": numbers(1, tokens, size, dtype=dtype),
        "norm": (1 + numbers(2, size, scale=0.2, dtype=jnp.float32)).astype(dtype),
    }


class TestCombineExperts:
    @staticmethod
    def formula(arrays: dict[str, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
        """The mixed rows, and with the residual, both rounded as the operation rounds them."""
        row_of, x = np.asarray(arrays["row_of"]), np.asarray(arrays["x"])
        weights, rows = np.asarray(arrays["weights"]), np.asarray(arrays["rows"], np.float32)
        mixed = np.zeros(x.shape, np.float32)
        for i in range(row_of.shape[1]):
            mixed += weights[:, i, None] * rows[row_of[:, i]]
        mixed = mixed.astype(x.dtype).astype(np.float32)
        return mixed, (x.astype(np.float32) + mixed).astype(x.dtype).astype(np.float32)

    def check(self, got: Any, arrays: dict[str, jax.Array]) -> None:
        """Sums to a unit in the last place, of the larger number that is added; norms of what these became."""
        (y, normed), (mixed, wanted), x = got, self.formula(arrays), arrays["x"]
        assert y.dtype == normed.dtype == x.dtype and y.shape == normed.shape == x.shape
        unit = float(jnp.finfo(x.dtype).eps)
        larger = np.maximum(np.maximum(np.abs(mixed), np.abs(wide(x))), np.abs(wanted))
        assert (np.abs(wide(y) - wanted) <= unit * larger + 1e-6).all()
        np.testing.assert_allclose(wide(normed), rms(wide(y), wide(arrays["norm"]), EPS), rtol=2 * unit, atol=2 * unit)

    @pytest.mark.parametrize("experts", [1, 3, 8, 32])
    @pytest.mark.parametrize("tokens", [1, 4, 17, 64])
    def test_sums(self, tokens: int, experts: int, named: str):
        arrays = expert_rows(tokens, experts)
        self.check(jax.jit(lambda a: combine_experts(**a, eps=EPS, implementation=named))(arrays), arrays)

    @pytest.mark.parametrize("size", [256, 768, 2048])
    def test_sizes(self, size: int, named: str):
        arrays = expert_rows(5, 8, size)
        self.check(combine_experts(**arrays, eps=EPS, implementation=named), arrays)

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
    def test_other_dtypes(self, dtype: Any):
        arrays = expert_rows(3, 4, 24, dtype)
        self.check(combine_experts(**arrays, eps=EPS, implementation=None), arrays)

    def test_places_out_of_range_are_the_nearest_in_range(self, named: str):
        arrays = expert_rows(2, 4)
        bad = jnp.array([[-1, 8, 3, 2**31 - 1], [-(2**31), 0, 7, 5]], jnp.int32)
        how: dict[str, Any] = {"eps": EPS, "implementation": named}
        got, wanted = (combine_experts(**{**arrays, "row_of": row_of}, **how) for row_of in (bad, bad.clip(0, 7)))
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(wide(one), wide(other))

    def test_gradients(self):
        arrays = expert_rows(2, 3, dtype=jnp.float32)

        def total(rows: jax.Array, weights: jax.Array, x: jax.Array) -> jax.Array:
            y, normed = combine_experts(rows, arrays["row_of"], weights, x, arrays["norm"], eps=EPS)
            return y.sum() + normed.sum()

        found = jax.grad(total, argnums=(0, 1, 2))(*(arrays[name] for name in ("rows", "weights", "x")))
        assert all(np.abs(wide(x)).max() > 0 for x in found)

    def test_what_does_not_fit(self):
        arrays = expert_rows(2, 4)
        for changed, message in (
            (
                {"rows": arrays["rows"][:-1]},
                r"rows has 7 rows; it must have tokens \* k = 2 \* 4, as many as row_of has",
            ),
            ({"rows": arrays["rows"].astype(jnp.float32)}, "rows is float32; it must be bfloat16, as x is"),
            ({"norm": arrays["norm"][1:]}, r"norm has shape \[511\]; it must be \[in\] with in = 512, as rows has"),
            ({"weights": arrays["weights"][:, 1:]}, r"weights has shape \[2, 3\]; it must be \[tokens, k\] with k = 4"),
            ({"weights": arrays["weights"].astype(jnp.bfloat16)}, "weights is bfloat16; it must be float32"),
            ({"row_of": arrays["weights"]}, "row_of is float32; it must be of integers"),
            ({"x": arrays["x"][:1]}, r"x has shape \[1, 512\]; it must be \[tokens, in\] with tokens = 2"),
            ({"eps": "small"}, "eps is 'small'; it must be a finite number"),
        ):
            how: dict[str, Any] = {"eps": EPS, **arrays, **changed}
            with pytest.raises(ArgumentError, match=f"combine_experts: {message}"):
                combine_experts(**how)

    def test_what_the_kernel_does_not_take(self):
        for arrays, message in (
            (expert_rows(65, 2), "takes up to 64 tokens of a multiple of 256 inputs up to 2048"),
            (expert_rows(2, 2, 384), "takes up to 64 tokens of a multiple of 256 inputs up to 2048"),
            (expert_rows(2, 33), "takes up to 32 rows of a token, not 33"),
            (expert_rows(2, 2, dtype=jnp.float32), "only bfloat16, not float32"),
        ):
            with pytest.raises(UnsupportedError, match=message):
                combine_experts(**arrays, eps=EPS, implementation="mosaic_gpu")
