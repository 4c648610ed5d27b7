"""Experts of fewer bits against those whose numbers they stand for."""

import functools

import jax
import jax.numpy as jnp
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
    for rows, stored, message in (
        (lhs, QuantizedMatrices(rhs.values, rhs.scales, zeros, rhs.block), "no matrices with zero points"),
        (lhs.astype(jnp.float32), rhs, "only bfloat16 activations, not float32"),
        (lhs, small, "a multiple of 128, not for 32"),
        (lhs, narrow, r"columns \(64\) must be a multiple of 128"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            quantized_grouped_matmul(rows, stored, sizes, implementation="mosaic_gpu")
