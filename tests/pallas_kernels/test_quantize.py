"""The fp8 form of index queries and keys, against recorded values and against the formula."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.bench.float8 import agreement
from pallas_kernels.indexer_scores import hadamard, quantize


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden / "indexer_fp8.npz")


@pytest.mark.parametrize("what", ["q", "k"])
def test_recorded_values_are_met_bit_by_bit(arrays, what):
    rotated = hadamard(jnp.asarray(arrays[f"{what}_bf16"].view(ml_dtypes.bfloat16)))
    np.testing.assert_array_equal(np.asarray(rotated).view(np.uint16), arrays[f"{what}_hadamard_bf16"])
    values, scales = quantize(rotated)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), arrays[f"{what}_fp8"])
    np.testing.assert_array_equal(np.asarray(scales), arrays[f"{what}_scale"])


@pytest.mark.parametrize("dim", [1, 2, 16, 128])
def test_rotation_is_orthogonal(rng, dim):
    a, b = rng.normal(size=(2, 5, dim)).astype(np.float32)
    rotated_a, rotated_b = (np.asarray(hadamard(jnp.asarray(x))) for x in (a, b))
    np.testing.assert_allclose(rotated_a @ rotated_b.T, a @ b.T, atol=1e-4)


def test_a_dimension_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="96 elements"):
        hadamard(jnp.zeros((2, 96)))


def test_scales_at_and_beside_powers_of_two():
    """448 times a power of two still fits; the next number above does not."""
    fits = 448 * 2.0 ** np.arange(-20, 20)
    largest = np.concatenate([fits, np.nextafter(np.float32(fits), np.inf), [0.0, 1e-4, 1e-5, 3e38]]).astype(np.float32)
    values, scales = quantize(jnp.asarray(largest)[:, None])
    expected = 2.0 ** np.ceil(np.log2(np.maximum(largest, np.float32(1e-4)).astype(np.float64) / 448))
    np.testing.assert_array_equal(np.asarray(scales), expected.astype(np.float32))
    assert np.isfinite(np.asarray(values, np.float32)).all()


def test_values_are_within_half_a_step(rng):
    x = rng.normal(size=(100, 64)).astype(np.float32)
    values, scales = quantize(jnp.asarray(x))
    restored = np.asarray(values, np.float32) * np.asarray(scales)[:, None]
    # Three bits of mantissa; below 2 ** -6 steps are 2 ** -9.
    assert (np.abs(restored - x) <= np.maximum(np.abs(x) * 2.0**-4, 2.0**-10 * np.asarray(scales)[:, None])).all()


def test_most_selected_positions_are_those_of_a_bfloat16_indexer():
    overlap, error = agreement(0, queries=64, context=4096, top_k=256)
    print(f"{overlap.mean():.2%} in common, least {overlap.min():.2%}; scores differ by {error:.2%}")
    assert overlap.mean() > 0.9
    assert overlap.min() > 0.8
    assert error < 0.06
