"""A NumPy machine runs the kernels for single tokens of a decoder layer. It tests logic, not races, without a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import decode_projections, kernel_call, output_projection, route
from pallas_kernels.decode_layer import xla
from pallas_kernels.decode_layer.mosaic_gpu import output, projections, routing
from tests.pallas_kernels.gpu.numpy_machine import numpy_launch

BF16, PAGE_SIZE = ml_dtypes.bfloat16, 16
HEADS, KV_HEADS, INDEX_HEADS, EPS, INDEX_EPS = 2, 1, 3, 1e-6, 1e-5


@pytest.fixture(autouse=True)
def in_numpy(monkeypatch, quick_to_compile):
    """Lets the public functions run their kernels in a NumPy machine."""
    monkeypatch.setattr(kernel_call, "interpreted", lambda name: True)
    for module in (output, projections, routing):
        monkeypatch.setattr(module, "launch", numpy_launch)


def numbers(rng, *shape):
    return rng.standard_normal(shape).astype(BF16)


def near_one(rng, *shape):
    return (1 + rng.standard_normal(shape) / 4).astype(BF16)


def projection_arguments(rows, size):
    rng = np.random.default_rng(rows)

    def weight(*shape):
        return (rng.standard_normal((*shape, size)) * size**-0.5).astype(BF16)

    angles, index_angles = rng.uniform(-9, 9, (rows, 64)), rng.uniform(-9, 9, (rows, 32))
    return {
        "x": 2 * numbers(rng, rows, size),
        "norm": near_one(rng, size),
        "q": weight(HEADS, 128),
        "k": weight(KV_HEADS, 128),
        "v": weight(KV_HEADS, 128),
        "index_q": weight(INDEX_HEADS * 65),
        "index_k": weight(64),
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


def projected(arrays, cache=None):
    """Queries, the indexer's, its gates, and rows of keys and values and of index keys, or pages with them."""
    how = {"index_heads": INDEX_HEADS, "eps": EPS, "index_eps": INDEX_EPS}
    out = decode_projections(**arrays, **(cache or {}), **how, implementation="mosaic_gpu")
    return [np.asarray(x) for x in out]


def expected_projections(arrays):
    how = {"kv_pages": None, "index_pages": None, "slots": None, "index_heads": INDEX_HEADS}
    given = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    return xla.decode_projections(**given, **how, eps=EPS, index_eps=INDEX_EPS)


def assert_near(got, wanted, tolerance=2e-2):
    for one, other in zip(got, wanted, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())
        assert np.linalg.norm(one - other) < tolerance / 2 * np.linalg.norm(other)


@pytest.mark.parametrize(("rows", "size"), [(1, 512), (5, 256), (13, 256), (35, 256)])
def test_projections(rows, size):
    arrays = projection_arguments(rows, size)
    assert_near(projected(arrays), expected_projections(arrays))


def test_a_token_has_the_same_bits_in_every_group():
    arrays = projection_arguments(35, 512)
    together = projected(arrays)
    by_row = ("x", "cos", "sin", "index_cos", "index_sin")
    for count in (1, 9):
        part = {name: x[34 - count : 34].copy() if name in by_row else x for name, x in arrays.items()}
        for one, all_of_them in zip(projected(part), together, strict=True):
            np.testing.assert_array_equal(one, all_of_them[34 - count : 34])


def test_rows_go_to_their_places_in_pages():
    """Where a token has no place, nothing is written; all other places keep what they have."""
    rows, pages = 5, 3
    arrays = projection_arguments(rows, 256)
    rng = np.random.default_rng(1)
    before = numbers(rng, pages, PAGE_SIZE, 2 * KV_HEADS, 128), numbers(rng, pages, PAGE_SIZE, 64)
    places = np.array([PAGE_SIZE * pages, 7, PAGE_SIZE * pages - 1, -1, 0], np.int32)
    cache = {"kv_pages": before[0], "index_pages": before[1], "slots": places}
    *_, kv, index_keys = projected(arrays, cache)
    *_, new_kv, new_keys = projected(arrays)
    wanted = [x.reshape(-1, *x.shape[2:]).copy() for x in before]
    for row in (1, 2, 4):
        wanted[0][places[row]], wanted[1][places[row]] = new_kv[row], new_keys[row]
    np.testing.assert_array_equal(kv.reshape(wanted[0].shape), wanted[0])
    np.testing.assert_array_equal(index_keys.reshape(wanted[1].shape), wanted[1])


@pytest.mark.parametrize("rows", [1, 8, 13, 40])
def test_output_projection(rows):
    rng, size, outputs = np.random.default_rng(rows), 512, 48
    attended, weight = numbers(rng, rows, size), (numbers(rng, outputs, size) * size**-0.5).astype(BF16)
    residual = numbers(rng, rows, outputs)

    def project(first, count):
        part = slice(first, first + count)
        given = attended[part].reshape(count, 4, -1), weight.reshape(outputs, 4, -1), residual[part]
        return np.asarray(output_projection(*given, implementation="mosaic_gpu"))

    out = project(0, rows)
    wanted = residual.astype(np.float64) + attended.astype(np.float64) @ weight.astype(np.float64).T
    assert_near([out], [wanted], 1e-2)
    np.testing.assert_array_equal(project(rows - 1, 1), out[-1:])


@dataclasses.dataclass
class Routed:
    normed: np.ndarray
    experts: np.ndarray
    weights: np.ndarray


def routed(x, norm, router, top_k=5, normalise=True):
    out = route(x, norm, router, top_k=top_k, eps=EPS, normalise=normalise, implementation="mosaic_gpu")
    return Routed(*(np.asarray(x) for x in out))


class TestRoute:
    @pytest.mark.parametrize(("rows", "experts"), [(1, 128), (7, 16), (9, 64), (3, 32)])
    @pytest.mark.parametrize("normalise", [True, False])
    def test_experts(self, rows, experts, normalise):
        """A token's choice is that of its logits wherever these lead by more than rounding."""
        rng = np.random.default_rng(rows)
        x, norm, router = 2 * numbers(rng, rows, 256), near_one(rng, 256), numbers(rng, experts, 256)
        router = (router / 8).astype(BF16)
        out = routed(x, norm, router, normalise=normalise)
        arrays = (jnp.asarray(a, jnp.float32) for a in (x, norm, router))
        normed, _, _ = xla.route(*arrays, top_k=5, eps=EPS, normalise=normalise)
        assert_near([out.normed], [normed])
        logits = out.normed.astype(np.float64) @ router.astype(np.float64).T
        probabilities = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
        chosen = np.take_along_axis(probabilities, out.experts, axis=1)
        best = -np.sort(-probabilities, axis=1)[:, :5]
        np.testing.assert_allclose(chosen, best, rtol=1e-4)
        assert all(len(set(row)) == 5 for row in out.experts)
        wanted = chosen / chosen.sum(axis=1, keepdims=True) if normalise else chosen
        np.testing.assert_allclose(out.weights, wanted, rtol=1e-4)

    def test_of_equal_experts_the_lower_come_first(self):
        rng = np.random.default_rng(0)
        x, norm, router = numbers(rng, 2, 256), near_one(rng, 256), numbers(rng, 128, 256)
        router[[3, 17, 40, 90, 127]] = router[99]
        router = np.where(np.isin(np.arange(128), [3, 17, 40, 90, 99, 127])[:, None], router, 0).astype(BF16)
        out = routed(x, norm, router, top_k=8)
        for own in out.experts:
            like = [3, 17, 40, 90, 99, 127]
            others = [0, 1, 2, 4, 5, 6, 7, 8]
            assert own.tolist() in ([*like, *others[:2]], others)

    def test_probabilities_of_zero_are_chosen_last_and_in_order(self):
        """Far below the best, all probabilities are 0."""
        x, norm = np.ones((1, 256), BF16), np.ones(256, BF16)
        router = np.full((16, 256), -4, BF16)
        router[[2, 9]] = [[1], [0.99]]
        out = routed(x, norm, router, top_k=4)
        assert out.experts.tolist() == [[2, 9, 0, 1]]
        np.testing.assert_array_equal(out.weights[0, 2:], 0)

    def test_a_token_has_the_same_bits_alone(self):
        rng = np.random.default_rng(5)
        x, norm, router = numbers(rng, 11, 512), near_one(rng, 512), numbers(rng, 64, 512)
        together = routed(x, norm, router)
        for row in (0, 7, 10):
            alone = routed(x[row : row + 1].copy(), norm, router)
            for name in ("normed", "experts", "weights"):
                np.testing.assert_array_equal(getattr(alone, name)[0], getattr(together, name)[row])
