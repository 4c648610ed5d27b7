"""Experts of fewer bits on a Hopper GPU: ragged groups, tilings, bits of a row, the released shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.quantization.schemes import FORMATS, Format, standard
from keye_jax.quantization.weights import random_arrays
from pallas_kernels import QuantizedMatrices, expert_mlp, grouped_matmul, quantize_rows, quantized_expert_mlp
from pallas_kernels.grouped_matmul.mosaic_gpu.quantized import QuantizedConfig, quantized_grouped_matmul

KINDS: dict[str, tuple[Format, bool]] = {**{format: (format, False) for format in FORMATS}, "fp8 by fp8": ("fp8", True)}
"""Formats of the matrices, and whether rows are in float8 too."""
ALONE = [QuantizedConfig(n, rows) for n in (1, 2) for rows in (8, 16, 32, 64)]
SHARED = [QuantizedConfig(n, rows, parts) for n, parts in ((1, 2), (1, 4), (2, 2)) for rows in (8, 16)]
FLOAT8 = [QuantizedConfig(n, 128) for n in (1, 2)]
TILINGS = {kind: ALONE + (FLOAT8 if float8 else SHARED) for kind, (_, float8) in KINDS.items()}
EVERY_VALUE = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8, "int4": jnp.uint8}


def matrices(kind, experts, inputs, outputs, parts=1):
    """Random matrices whose scales differ, and their numbers in bfloat16."""
    format = KINDS[kind][0]
    scheme = standard(format)
    block = scheme.block(inputs, outputs, parts=parts)
    stored = (experts, inputs // 2 if format == "int4" else inputs, outputs)
    grid = (experts, -(-inputs // block[0]), -(-outputs // block[1]))
    arrays = random_arrays(jax.random.key(inputs), scheme, stored, grid)
    factors = jax.random.uniform(jax.random.key(1), grid, minval=0.5, maxval=2.0)
    made = QuantizedMatrices(arrays["values"], (arrays["scales"] * factors).astype(arrays["scales"].dtype), None, block)
    return made, made.take(jnp.arange(experts), jnp.bfloat16)


def product(kind, lhs, rhs, sizes, config=None):
    sizes, how = jnp.asarray(sizes, jnp.int32), {"block": rhs.block, "dtype": lhs.dtype, "config": config}
    lhs_scales = None
    if KINDS[kind][1]:
        small = quantize_rows(lhs)
        lhs, lhs_scales = small.values, small.scales
    return quantized_grouped_matmul(lhs, lhs_scales, rhs.values, rhs.scales, None, sizes, **how)


def given(kind, rows):
    """The numbers that are multiplied."""
    return quantize_rows(rows).numbers().astype(rows.dtype) if KINDS[kind][1] else rows


def rows_of(count, width, seed=0):
    return jax.random.normal(jax.random.key(seed), (count, width)).astype(jnp.bfloat16)


def check_rows(got, want, limit=1e-2):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    assert (np.linalg.norm(got - want, axis=1) <= limit * np.linalg.norm(want, axis=1) + 1e-6).all()


@pytest.mark.parametrize(("kind", "config"), [(kind, each) for kind in KINDS for each in TILINGS[kind]], ids=str)
def test_ragged(kind, config):
    sizes = [3, 0, 130, 64, 1, 200, 8, 9]
    rhs, numbers = matrices(kind, 8, 384, 512)
    # Rows of no group must not be used.
    lhs = rows_of(sum(sizes) + 50, 384).at[sum(sizes) :].set(jnp.nan)
    got = product(kind, lhs, rhs, sizes, config)
    want = grouped_matmul(
        given(kind, jnp.nan_to_num(lhs)), numbers, jnp.asarray(sizes, jnp.int32), implementation="xla"
    )
    check_rows(got, want)
    assert (got[sum(sizes) :] == 0).all()


@pytest.mark.parametrize("format", FORMATS)
def test_every_value(format):
    """The identity times all 256 bytes: exact but for what is no number."""
    stored = np.arange(64 * 128 if format == "int4" else 128 * 128).astype(np.uint8)
    kind = EVERY_VALUE[format]
    values = jax.lax.bitcast_convert_type(jnp.asarray(stored.reshape(1, -1, 128)), kind)
    rhs = QuantizedMatrices(values, jnp.ones((1, 1, 128)), None, (128, 1))
    got = product(format, jnp.eye(128, dtype=jnp.bfloat16), rhs, [128])
    want = np.asarray(rhs.take(jnp.arange(1), jnp.float32)[0])
    signs = np.where(stored.reshape(want.shape) & 128, -480, 480) if format == "fp8" else 0
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.where(np.isnan(want), signs, want))


@pytest.mark.parametrize("kind", KINDS)
def test_tilings_and_places_change_no_bit(kind):
    rhs, _ = matrices(kind, 4, 512, 512)
    sizes, lhs = [70, 5, 0, 1], rows_of(76, 512)
    want = np.asarray(product(kind, lhs, rhs, sizes, TILINGS[kind][0]).astype(jnp.float32))
    for config in TILINGS[kind][1:]:
        np.testing.assert_array_equal(np.asarray(product(kind, lhs, rhs, sizes, config).astype(jnp.float32)), want)
    for row, group in ((0, 0), (69, 0), (72, 1), (75, 3)):
        alone = product(kind, lhs[row : row + 1], rhs, np.eye(4, dtype=int)[group])
        np.testing.assert_array_equal(np.asarray(alone[0].astype(jnp.float32)), want[row])


@pytest.mark.parametrize("inputs", [128, 256, 384, 640, 2048])
@pytest.mark.parametrize("format", FORMATS)
def test_parts_change_no_bit(format, inputs):
    """Blocks have many units, whose steps begin at every part. Races would show in some of the calls."""
    rhs, _ = matrices(format, 16, inputs, 4096)
    sizes, lhs = [40, 1, 0, 9] * 4, rows_of(210, inputs)
    want = np.asarray(product(format, lhs, rhs, sizes, ALONE[0]).astype(jnp.float32))
    for config in SHARED:
        for _ in range(10):
            got = np.asarray(product(format, lhs, rhs, sizes, config).astype(jnp.float32))
            np.testing.assert_array_equal(got, want, str(config))


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_a_batch_have_the_bits_they_have_alone(format):
    gate_up, down = matrices(format, 32, 2048, 1536, 2)[0], matrices(format, 32, 768, 2048)[0]
    run = jax.jit(functools.partial(quantized_expert_mlp, implementation="mosaic_gpu"))
    for tokens in (2, 8, 9, 16, 17, 64, 300):
        chosen = np.random.default_rng(tokens).integers(0, 32, 8 * tokens)
        sizes, lhs = np.bincount(chosen, minlength=32).astype(np.int32), rows_of(8 * tokens, 2048, tokens)
        batch = np.asarray(run(lhs, gate_up, down, jnp.asarray(sizes)).astype(jnp.float32))
        # The last row of each of eight groups, all in one call.
        groups = np.flatnonzero(sizes)[-8:]
        rows = np.cumsum(sizes)[groups] - 1
        alone = run(lhs[rows], gate_up, down, jnp.zeros(32, jnp.int32).at[groups].set(1))
        np.testing.assert_array_equal(np.asarray(alone.astype(jnp.float32)), batch[rows], str(tokens))


def test_every_value_in_float8():
    """The identity times all bytes of float8 that are numbers: exact."""
    stored = np.arange(128 * 128).astype(np.uint8)
    stored[stored & 127 == 127] = 0
    values = jax.lax.bitcast_convert_type(jnp.asarray(stored.reshape(1, 128, 128)), jnp.float8_e4m3fn)
    rhs = QuantizedMatrices(values, jnp.full((1, 1, 1), 0.5), None, (128, 128))
    got = product("fp8 by fp8", jnp.eye(128, dtype=jnp.bfloat16), rhs, [128])
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(values[0], np.float32) / 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 16, 64, 2048])
def test_model_shapes(kind, tokens):
    rng = np.random.default_rng(0)
    chosen = np.argpartition(rng.gumbel(size=(tokens, 128)), 8, axis=1)[:, :8]
    sizes = jnp.asarray(np.bincount(chosen.ravel(), minlength=128), jnp.int32)
    (gate_up, gate_up_numbers), (down, down_numbers) = (
        matrices(kind, 128, 2048, 1536, 2),
        matrices(kind, 128, 768, 2048),
    )
    lhs = rows_of(tokens * 8, 2048)
    rows = quantize_rows(lhs) if KINDS[kind][1] else lhs
    run = jax.jit(functools.partial(quantized_expert_mlp, implementation="mosaic_gpu"))
    got = run(rows, gate_up, down, sizes)
    if KINDS[kind][1]:
        want = quantized_expert_mlp(rows, gate_up, down, sizes, implementation="xla")
    else:
        want = expert_mlp(lhs, gate_up_numbers, down_numbers, sizes)
    check_rows(got, want, 2e-2)
    assert (got == run(rows, gate_up, down, sizes)).all()
