"""The operations between attention and experts of single tokens: against their formulas in float64, and their refusals.

The sizes are such that the kernels for Hopper GPUs take them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ArgumentError, UnsupportedError, decode_projections, dispatch, output_projection, route

SIZE, HEADS, KV_HEADS, INDEX_HEADS, DIM, INDEX_DIM, PAGE_SIZE, PAGES = 512, 4, 2, 5, 128, 64, 16, 4
EPS, INDEX_EPS = 1e-5, 1e-6
HOW = {"index_heads": INDEX_HEADS, "eps": EPS, "index_eps": INDEX_EPS}


@pytest.fixture(params=[name for name in dispatch.OPERATIONS["route"].implementations if name in dispatch.available()])
def named(request) -> str:
    return request.param


def numbers(seed: int, *shape: int, scale: float = 1.0, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def arguments(tokens: int, dtype: Any = jnp.bfloat16) -> dict[str, jax.Array]:
    def weight(seed: int, *shape: int) -> jax.Array:
        return numbers(seed, *shape, SIZE, scale=SIZE**-0.5, dtype=dtype)

    def factors(seed: int, size: int) -> jax.Array:
        return (1 + numbers(seed, size, scale=0.2, dtype=jnp.float32)).astype(dtype)

    angles, index_angles = (
        np.random.default_rng(tokens).uniform(-9, 9, (tokens, size)) for size in (DIM // 2, INDEX_DIM // 2)
    )
    of_angles = [jnp.asarray(f(x), jnp.float32) for x in (angles, index_angles) for f in (np.cos, np.sin)]
    return {
        "x": numbers(0, tokens, SIZE, dtype=dtype),
        "norm": factors(1, SIZE),
        "q": weight(2, HEADS, DIM),
        "k": weight(3, KV_HEADS, DIM),
        "v": weight(4, KV_HEADS, DIM),
        "index_q": weight(5, INDEX_HEADS * (INDEX_DIM + 1)),
        "index_k": weight(6, INDEX_DIM),
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
    x = rms(a["x"], a["norm"], EPS)
    q, k, v = (np.einsum("ti,ndi->tnd", x, a[name]) for name in ("q", "k", "v"))
    q, k = (turned(rms(each, a[f"{n}_norm"], EPS), a["cos"], a["sin"]) for each, n in ((q, "q"), (k, "k")))
    rows, angles = x @ a["index_q"].T, (a["index_cos"], a["index_sin"])
    queries = rows[:, : INDEX_HEADS * INDEX_DIM].reshape(-1, INDEX_HEADS, INDEX_DIM)
    queries = turned(rms(queries, a["index_q_norm"], INDEX_EPS), *angles)
    keys = x @ a["index_k"].T
    keys = rms(keys - keys.mean(axis=-1, keepdims=True), a["index_k_norm"], INDEX_EPS) + a["index_k_bias"]
    keys = turned(keys[:, None], *angles)[:, 0]
    return [q, queries, rows[:, INDEX_HEADS * INDEX_DIM :], np.concatenate([k, v], axis=1), keys]


def assert_near(got: Any, wanted: Any, tolerance: float = 2e-2) -> None:
    """Each number to a part of the largest, and all together closer: bfloat16 rounds several times."""
    for one, other in zip(got, wanted, strict=True):
        one = wide(one)
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())
        assert np.linalg.norm(one - other) < tolerance / 2 * np.linalg.norm(other)


class TestDecodeProjections:
    @pytest.mark.parametrize("tokens", [1, 4, 16, 40, 64])
    def test_rows(self, tokens: int, named: str):
        arrays = arguments(tokens)
        got = jax.jit(lambda arrays: decode_projections(**arrays, **HOW, implementation=named))(arrays)
        assert [x.dtype.name for x in got] == ["bfloat16", "bfloat16", "float32", "bfloat16", "bfloat16"]
        assert_near(got, formula(arrays))

    def test_in_float32(self):
        arrays = arguments(3, jnp.float32)
        with jax.default_matmul_precision("highest"):
            assert_near(decode_projections(**arrays, **HOW), formula(arrays), 1e-5)

    def test_pages(self, named: str):
        """Rows are where their slots say; a slot that is not there is dropped; nothing else changes."""
        arrays, slots = arguments(5), jnp.array([PAGES * PAGE_SIZE, 7, PAGES * PAGE_SIZE - 1, -1, 0])
        before = numbers(12, PAGES, PAGE_SIZE, 2 * KV_HEADS, DIM), numbers(13, PAGES, PAGE_SIZE, INDEX_DIM)
        pages = {"kv_pages": before[0], "index_pages": before[1], "slots": slots}
        run = jax.jit(lambda arrays: decode_projections(**arrays, **HOW, implementation=named))
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
        run = jax.grad(lambda q, x: decode_projections(**arrays | {"q": q, "x": x}, **HOW)[0].sum(), argnums=(0, 1))
        assert all(np.abs(wide(x)).max() > 0 for x in run(arrays["q"], arrays["x"]))

    def test_what_does_not_fit(self):
        arrays = arguments(2)
        for changed, message in (
            (
                {"index_q": arrays["index_q"][:-1]},
                "index_q has 324 rows; it must have 5 \\* 64 of queries and 5 of ",
            ),
            ({"q": arrays["q"].astype(jnp.float32)}, "q is float32; it must be bfloat16, as x is"),
            ({"slots": jnp.zeros(2, jnp.int32)}, "slots given alone; kv_pages, index_pages, slots go together"),
            ({"cos": arrays["cos"][:, 1:]}, r"cos has shape \[2, 63\]; it must be \[tokens, d\] with d = 64, as q has"),
        ):
            with pytest.raises(ArgumentError, match=message):
                decode_projections(**arrays | changed, **HOW)

    def test_what_the_kernel_does_not_take(self):
        for arrays, message in (
            (arguments(65), "takes up to 64 tokens of a multiple of 256 inputs up to 2048"),
            (arguments(2, jnp.float32), "only bfloat16, not float32"),
        ):
            with pytest.raises(UnsupportedError, match=message):
                decode_projections(**arrays, **HOW, implementation="mosaic_gpu")


class TestOutputProjection:
    @pytest.mark.parametrize("tokens", [1, 4, 16, 40, 64])
    def test_sums(self, tokens: int, named: str):
        attended, weight = numbers(0, tokens, 4, 128), numbers(1, 48, 4, 128, scale=0.05)
        residual = numbers(2, tokens, 48)
        wanted = wide(residual) + np.einsum("tnd,ond->to", wide(attended), wide(weight))
        got = output_projection(attended, weight, residual, implementation=named)
        assert got.dtype == jnp.bfloat16
        assert_near([got], [wanted], 1e-2)


class TestRoute:
    @pytest.mark.parametrize("normalise", [True, False])
    @pytest.mark.parametrize("tokens", [1, 4, 16, 40, 64])
    def test_experts(self, tokens: int, normalise: bool, named: str):
        """The chosen are the best of the logits that follow from the rounded norm."""
        x, norm, router = numbers(0, tokens, SIZE), 1 + numbers(1, SIZE, scale=0.2), numbers(2, 128, SIZE, scale=0.1)
        run = jax.jit(lambda *arrays: route(*arrays, top_k=8, eps=EPS, normalise=normalise, implementation=named))
        normed, experts, weights = run(x, norm, router)
        assert experts.dtype == jnp.int32 and weights.dtype == jnp.float32
        assert_near([normed], [rms(wide(x), wide(norm), EPS)])
        logits = wide(normed) @ wide(router).T
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        assert all(len(set(row)) == 8 for row in np.asarray(experts).tolist())
        chosen = np.take_along_axis(probabilities, np.asarray(experts), axis=1)
        np.testing.assert_allclose(chosen, -np.sort(-probabilities, axis=1)[:, :8], rtol=1e-3)
        wanted = chosen / chosen.sum(axis=1, keepdims=True) if normalise else chosen
        np.testing.assert_allclose(weights, wanted, rtol=1e-3)

    def test_of_equal_experts_the_lower_come_first(self, named: str):
        x, norm = numbers(0, 3, SIZE), jnp.ones(SIZE, jnp.bfloat16)
        router = jnp.tile(numbers(1, 2, SIZE), (16, 1))
        _, experts, _ = route(x, norm, router, top_k=5, eps=EPS, implementation=named)
        for own in np.asarray(experts).tolist():
            assert own in ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])

    def test_more_than_there_are(self):
        x, norm, router = numbers(0, 2, SIZE), numbers(1, SIZE), numbers(2, 16, SIZE)
        with pytest.raises(ArgumentError, match="route: top_k is 17; it must be at most e = 16 of router"):
            route(x, norm, router, top_k=17, eps=EPS)
