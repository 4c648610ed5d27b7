"""Experts of fewer bits against those whose numbers they stand for."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from keye_jax.quantization.quantize import quantize
from keye_jax.quantization.schemes import FORMATS, Format, standard
from pallas_kernels import (
    ArgumentError,
    QuantizedMatrices,
    UnsupportedError,
    expert_mlp,
    grouped_matmul,
    quantize_rows,
    quantized_expert_mlp,
    quantized_grouped_matmul,
)

EXPERTS, HIDDEN, INNER = 5, 160, 48


def matrices(format: Format, rows: int, columns: int, parts: int = 1) -> tuple[QuantizedMatrices, jax.Array]:
    """Random matrices of fewer bits, and their numbers in bfloat16."""
    rng = np.random.default_rng(rows)
    made = [
        quantize(rng.normal(size=(rows, columns)).astype(np.float32), standard(format), parts=parts)
        for _ in range(EXPERTS)
    ]
    values, scales = (jnp.stack([getattr(each, name) for each in made]) for name in ("values", "scales"))
    numbers = jnp.stack([jnp.asarray(each.numbers(jnp.bfloat16)) for each in made])
    return QuantizedMatrices(values, scales, None, made[0].block), numbers


def compare(got: jax.Array, wanted: jax.Array) -> None:
    want = np.asarray(wanted, np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize("format", FORMATS)
class TestQuantizedExperts:
    # Hopper kernels take the first sizes; blocks of the others are cut off by the matrix's end.
    @pytest.mark.parametrize(("hidden", "inner"), [(256, 128), (HIDDEN, INNER)])
    @pytest.mark.parametrize("sizes", [(3, 0, 9, 1, 0), (70, 200, 0, 15, 5)])
    def test_products_are_those_of_the_numbers(self, format, sizes, hidden, inner, implementation):
        """A few rows, and blocks of rows; some experts have none, and the last rows belong to none."""
        gate_up, down = matrices(format, hidden, 2 * inner, parts=2), matrices(format, inner, hidden)
        lhs = jnp.asarray(np.random.default_rng(0).normal(size=(sum(sizes) + 2, hidden)), jnp.bfloat16)
        group_sizes = jnp.asarray(sizes, jnp.int32)
        run = functools.partial(quantized_grouped_matmul, implementation=implementation)
        compare(jax.jit(run)(lhs, gate_up[0], group_sizes), grouped_matmul(lhs, gate_up[1], group_sizes))
        run = functools.partial(quantized_expert_mlp, implementation=implementation)
        got = jax.jit(run)(lhs, gate_up[0], down[0], group_sizes)
        compare(got, expert_mlp(lhs, gate_up[1], down[1], group_sizes))
        assert not np.asarray(got[-2:], np.float32).any()


def in_float8(rows: np.ndarray) -> np.ndarray:
    """The numbers of rows in float8, by the definition: a power of two for each 128 inputs."""
    found = []
    for first in range(0, rows.shape[1], 128):
        part = rows[:, first : first + 128].astype(np.float64)
        scales = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(part).max(axis=1, keepdims=True), 1e-4) / 448))
        found.append((part / scales).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales)
    return np.concatenate(found, axis=1)


def numbers_of(stored: QuantizedMatrices) -> np.ndarray:
    """Not rounded, float64."""
    values, scales = np.asarray(stored.values, np.float64), np.asarray(stored.scales, np.float64)
    for axis in (1, 2):
        scales = np.repeat(scales, stored.block[axis - 1], axis=axis)
    return values * scales[:, : values.shape[1], : values.shape[2]]


def products(rows: np.ndarray, numbers: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    out, first = np.zeros((len(rows), numbers.shape[2])), 0
    for matrix, size in zip(numbers, sizes, strict=True):
        out[first : first + size] = rows[first : first + size] @ matrix
        first += size
    return out


def difference(got: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


class TestActivationsInFloat8:
    # Hopper kernels take the first sizes; blocks of the others are cut off by the matrix's end.
    @pytest.mark.parametrize(("hidden", "inner"), [(256, 128), (HIDDEN, INNER)])
    @pytest.mark.parametrize("sizes", [(3, 0, 9, 1, 0), (70, 200, 0, 15, 5)])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_products_are_those_of_rounded_rows(self, dtype, sizes, hidden, inner, implementation):
        """Rows of sizes from 2**-20 to 2**20, whose rounding alone would be seen."""
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(sum(sizes) + 2, hidden)) * 2.0 ** rng.integers(-12, 20, (sum(sizes) + 2, 1))
        lhs, rhs = jnp.asarray(rows, dtype), matrices("fp8", hidden, 2 * inner, parts=2)[0]
        run = functools.partial(quantized_grouped_matmul, implementation=implementation)
        got = jax.jit(run)(quantize_rows(lhs), rhs, jnp.asarray(sizes, jnp.int32))
        assert got.dtype == dtype
        got = np.asarray(got, np.float64)
        rows = np.asarray(lhs, np.float64)
        want, exact = (products(x, numbers_of(rhs), sizes) for x in (in_float8(rows), rows))
        size = np.linalg.norm(want, axis=1) + 1e-30
        errors = np.linalg.norm(got - want, axis=1) / size
        assert errors.max() < (4e-3 if dtype == "bfloat16" else 1e-5)
        assert (np.linalg.norm(want - exact, axis=1) / size)[: sum(sizes)].min() > 1e-2
        assert not got[sum(sizes) :].any()

    @pytest.mark.parametrize(("hidden", "inner"), [(256, 128), (HIDDEN, INNER)])
    @pytest.mark.parametrize("sizes", [(3, 0, 9, 1, 0), (70, 200, 0, 15, 5)])
    def test_what_down_multiplies_is_rounded_too(self, sizes, hidden, inner, implementation):
        """A few numbers between two of float8 may become either, so the limit is not the products'."""
        gate_up, down = matrices("fp8", hidden, 2 * inner, parts=2)[0], matrices("fp8", inner, hidden)[0]
        lhs = jnp.asarray(np.random.default_rng(0).normal(size=(sum(sizes) + 2, hidden)), jnp.bfloat16)
        run = functools.partial(quantized_expert_mlp, implementation=implementation)
        got = jax.jit(run)(quantize_rows(lhs), gate_up, down, jnp.asarray(sizes, jnp.int32))
        gate, up = np.split(products(in_float8(np.asarray(lhs)), numbers_of(gate_up), sizes), 2, axis=1)
        inner_rows = (gate / (1 + np.exp(-gate)) * up).astype(ml_dtypes.bfloat16).astype(np.float64)
        want, unrounded = (products(x, numbers_of(down), sizes) for x in (in_float8(inner_rows), inner_rows))
        assert difference(got, want) < 8e-3
        assert difference(unrounded, want) > 2e-2
        assert not np.asarray(got[-2:], np.float32).any()

    def test_values_and_scales(self):
        """448 and what is just above it; the last block is cut off; a row of zeros."""
        rows = jnp.zeros((3, 130)).at[0, 5].set(448.0).at[1, 5].set(448.5).at[1, 129].set(-3.0)
        small = quantize_rows(rows)
        values, scales = small.values, small.scales
        assert (values.dtype, values.shape, scales.shape) == (jnp.float8_e4m3fn, (3, 130), (3, 2))
        np.testing.assert_array_equal(np.asarray(scales[:2]), [[1, 2.0**-22], [2, 2.0**-7]])
        np.testing.assert_array_equal(np.asarray(values, np.float32)[:2, [5, 129]], [[448, 0], [224, -384]])
        assert not np.asarray(values[2], np.float32).any()
        np.testing.assert_array_equal(small.numbers()[1, [5, 129]], [448, -3])

    def test_rows_that_do_not_fit_are_refused(self):
        rhs, sizes = matrices("fp8", HIDDEN, 2 * INNER)[0], jnp.full(EXPERTS, 1, jnp.int32)
        rows = quantize_rows(jnp.ones((4, HIDDEN)))
        for wrong, message in (
            (dataclasses.replace(rows, scales=rows.scales[:, :1]), r"lhs has scales \[4, 1\]; they must be \[4, 2\]"),
            (
                dataclasses.replace(rows, values=rows.values.astype(jnp.float32)),
                "lhs is float32; it must be float8_e4m3fn",
            ),
            (rows.values, "lhs is float8_e4m3fn; it must be bfloat16 or float16 or float32"),
        ):
            with pytest.raises(ArgumentError, match=message):
                quantized_grouped_matmul(wrong, rhs, sizes)

    def test_no_rows(self):
        gate_up, down = matrices("fp8", HIDDEN, 2 * INNER, parts=2)[0], matrices("fp8", INNER, HIDDEN)[0]
        none = quantize_rows(jnp.ones((0, HIDDEN), jnp.bfloat16))
        out = quantized_expert_mlp(none, gate_up, down, jnp.zeros(EXPERTS, jnp.int32))
        assert (out.shape, out.dtype) == ((0, HIDDEN), jnp.bfloat16)


def test_no_program_holds_the_numbers_of_all_experts():
    """Of many rows: nothing that XLA computes has the shape of all matrices, but what they are stored in."""
    gate_up, down = matrices("int4", HIDDEN, 2 * INNER, parts=2)[0], matrices("int4", INNER, HIDDEN)[0]
    lhs, sizes = jnp.ones((300, HIDDEN), jnp.bfloat16), jnp.full(EXPERTS, 60, jnp.int32)
    text = jax.jit(quantized_expert_mlp).lower(lhs, gate_up, down, sizes).compile().as_text()
    assert text is not None
    for kind in ("bf16", "f32"):
        assert f"{kind}[{EXPERTS},{HIDDEN},{2 * INNER}]" not in text
        assert f"{kind}[{EXPERTS},{INNER},{HIDDEN}]" not in text


def test_scales_that_do_not_fit_are_refused():
    rhs = matrices("fp8", HIDDEN, 2 * INNER)[0]
    wrong = QuantizedMatrices(rhs.values, rhs.scales, None, (64, 64))
    with pytest.raises(ArgumentError, match=r"blocks of 64 x 64 they must be \[5, 3, 2\]"):
        quantized_grouped_matmul(jnp.ones((4, HIDDEN)), wrong, jnp.full(EXPERTS, 1, jnp.int32))
    with pytest.raises(ArgumentError, match=r"rhs has shape \[5, 160, 96\]; it must be \[5, 8, 96\]"):
        quantized_grouped_matmul(jnp.ones((4, 8)), rhs, jnp.full(EXPERTS, 1, jnp.int32))


def test_the_hopper_kernel_says_what_it_does_not_take():
    lhs, sizes = jnp.ones((4, 256), jnp.bfloat16), jnp.full(EXPERTS, 1, jnp.int32)
    rhs = matrices("int4", 256, 128)[0]
    zeros = jnp.zeros(rhs.scales.shape, jnp.int8)
    small = QuantizedMatrices(rhs.values, jnp.ones((EXPERTS, 8, 128)), None, (32, 1))
    narrow = QuantizedMatrices(rhs.values[..., :64], rhs.scales[..., :64], None, rhs.block)
    float8 = matrices("fp8", 256, 128)[0]
    rows_of_scales = QuantizedMatrices(float8.values, jnp.ones((EXPERTS, 2, 128)), None, (128, 1))
    float8_rows = quantize_rows(lhs)
    for rows, stored, message in (
        (lhs, QuantizedMatrices(rhs.values, rhs.scales, zeros, rhs.block), "no matrices with zero points"),
        (lhs.astype(jnp.float32), rhs, "only bfloat16 rows, not float32"),
        (lhs, small, "a multiple of 128, not for 32"),
        (lhs, narrow, r"columns \(64\) must be a multiple of 128"),
        (float8_rows, rhs, "need matrices in float8_e4m3fn with a scale for 64 outputs at least, not uint8"),
        (float8_rows, rows_of_scales, "not float8_e4m3fn with one for 1"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            quantized_grouped_matmul(rows, stored, sizes, implementation="mosaic_gpu")
