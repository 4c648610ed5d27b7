"""Experts of fewer bits on a Hopper GPU: ragged groups, tilings, bits of a row, the released shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.quantization.schemes import FORMATS, standard
from keye_jax.quantization.weights import random_arrays
from pallas_kernels import QuantizedMatrices, expert_mlp, grouped_matmul, quantized_expert_mlp
from pallas_kernels.grouped_matmul.mosaic_gpu.quantized import QuantizedConfig, quantized_grouped_matmul

TILINGS = [QuantizedConfig(consumers, rows) for consumers in (1, 2) for rows in (8, 16, 32, 64)]
EVERY_VALUE = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8, "int4": jnp.uint8}


def matrices(format, experts, inputs, outputs, parts=1):
    """Random matrices whose scales differ, and their numbers in bfloat16."""
    scheme = standard(format)
    block = scheme.block(inputs, outputs, parts=parts)
    stored = (experts, inputs // 2 if format == "int4" else inputs, outputs)
    grid = (experts, -(-inputs // block[0]), -(-outputs // block[1]))
    arrays = random_arrays(jax.random.key(inputs), scheme, stored, grid)
    factors = jax.random.uniform(jax.random.key(1), grid, minval=0.5, maxval=2.0)
    made = QuantizedMatrices(arrays["values"], (arrays["scales"] * factors).astype(arrays["scales"].dtype), None, block)
    return made, made.take(jnp.arange(experts), jnp.bfloat16)


def product(lhs, rhs, sizes, config=None):
    sizes = jnp.asarray(sizes, jnp.int32)
    return quantized_grouped_matmul(lhs, rhs.values, rhs.scales, None, sizes, block=rhs.block, config=config)


def rows_of(count, width, seed=0):
    return jax.random.normal(jax.random.key(seed), (count, width)).astype(jnp.bfloat16)


def check_rows(got, want, limit=1e-2):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    assert (np.linalg.norm(got - want, axis=1) <= limit * np.linalg.norm(want, axis=1) + 1e-6).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("config", TILINGS, ids=str)
def test_ragged(format, config):
    sizes = [3, 0, 130, 64, 1, 200, 8, 9]
    rhs, numbers = matrices(format, 8, 384, 512)
    # Rows of no group must not be used.
    lhs = rows_of(sum(sizes) + 50, 384).at[sum(sizes) :].set(jnp.nan)
    got = product(lhs, rhs, sizes, config)
    want = grouped_matmul(jnp.nan_to_num(lhs), numbers, jnp.asarray(sizes, jnp.int32), implementation="xla")
    check_rows(got, want)
    assert (got[sum(sizes) :] == 0).all()


@pytest.mark.parametrize("format", FORMATS)
def test_every_value(format):
    """The identity times all 256 bytes: exact but for what is no number."""
    stored = np.arange(64 * 128 if format == "int4" else 128 * 128).astype(np.uint8)
    kind = EVERY_VALUE[format]
    values = jax.lax.bitcast_convert_type(jnp.asarray(stored.reshape(1, -1, 128)), kind)
    rhs = QuantizedMatrices(values, jnp.ones((1, 1, 128)), None, (128, 1))
    got = product(jnp.eye(128, dtype=jnp.bfloat16), rhs, [128])
    want = np.asarray(rhs.take(jnp.arange(1), jnp.float32)[0])
    signs = np.where(stored.reshape(want.shape) & 128, -480, 480) if format == "fp8" else 0
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.where(np.isnan(want), signs, want))


@pytest.mark.parametrize("format", FORMATS)
def test_tilings_and_places_change_no_bit(format):
    rhs, _ = matrices(format, 4, 512, 512)
    sizes, lhs = [70, 5, 0, 1], rows_of(76, 512)
    want = np.asarray(product(lhs, rhs, sizes, TILINGS[0]).astype(jnp.float32))
    for config in TILINGS[1:]:
        np.testing.assert_array_equal(np.asarray(product(lhs, rhs, sizes, config).astype(jnp.float32)), want)
    for row, group in ((0, 0), (69, 0), (72, 1), (75, 3)):
        alone = product(lhs[row : row + 1], rhs, np.eye(4, dtype=int)[group])
        np.testing.assert_array_equal(np.asarray(alone[0].astype(jnp.float32)), want[row])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 16, 64, 2048])
def test_model_shapes(format, tokens):
    rng = np.random.default_rng(0)
    chosen = np.argpartition(rng.gumbel(size=(tokens, 128)), 8, axis=1)[:, :8]
    sizes = jnp.asarray(np.bincount(chosen.ravel(), minlength=128), jnp.int32)
    (gate_up, gate_up_numbers), (down, down_numbers) = (
        matrices(format, 128, 2048, 1536, 2),
        matrices(format, 128, 768, 2048),
    )
    lhs = rows_of(tokens * 8, 2048)
    run = functools.partial(quantized_expert_mlp, implementation="mosaic_gpu")
    got = jax.jit(run)(lhs, gate_up, down, sizes)
    check_rows(got, expert_mlp(lhs, gate_up_numbers, down_numbers, sizes), 2e-2)
    assert (got == jax.jit(run)(lhs, gate_up, down, sizes)).all()
