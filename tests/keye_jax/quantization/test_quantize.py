"""Weights of fewer bits against their definition, number by number."""

import ml_dtypes
import numpy as np
import pytest

from keye_jax.quantization import layouts
from keye_jax.quantization.quantize import FP8, quantize
from keye_jax.quantization.schemes import FORMATS, Quantization, Scheme, standard
from pallas_kernels.quantized import dequantize, pack_nibbles, unpack_nibbles

BF16 = ml_dtypes.bfloat16


def matrix(rows: int, columns: int) -> np.ndarray:
    """Normal numbers, with a column of zeros and a row of large numbers."""
    made = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    made[:, 1], made[3] = 0, 40 * made[3]
    return made


def expected(numbers: np.ndarray, scheme: Scheme, block: tuple[int, int]) -> np.ndarray:
    """What the nearest values stand for, block by block."""
    out = np.empty_like(numbers)
    for row in range(0, numbers.shape[0], block[0]):
        for column in range(0, numbers.shape[1], block[1]):
            at = slice(row, row + block[0]), slice(column, column + block[1])
            largest = np.abs(numbers[at]).max()
            limit = {"fp8": 448, "int8": 127, "int4": 7.5}[scheme.format]
            scale = np.float32(largest / np.float32(limit) if largest else 1)
            if scheme.format == "int4":
                scale = np.float32(BF16(scale))
            scaled = numbers[at] / scale
            if scheme.format == "fp8":
                value = np.clip(scaled, -448, 448).astype(FP8).astype(np.float32)
            else:
                value = np.clip(np.rint(scaled), -127 if scheme.format == "int8" else -8, np.floor(limit))
            out[at] = value * scale
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns", "parts"), [(64, 40, 1), (200, 384, 2), (300, 260, 1)])
def test_values_are_the_nearest_ones(format, rows, columns, parts):
    """Also where the last block or group is cut off, and where gate and up do not end with a block."""
    numbers, scheme = matrix(rows, columns), standard(format)
    made = quantize(numbers, scheme, parts=parts)
    block = scheme.block(rows, columns, parts=parts)
    assert (made.block == block and not columns // parts % block[1]) or parts == 1
    np.testing.assert_array_equal(made.numbers(), expected(numbers, scheme, block))


def test_int4_uses_all_sixteen_values():
    made = quantize(np.linspace(-7.5, 7.5, 256, dtype=np.float32)[:, None], Scheme("int4"))
    assert set(unpack_nibbles(made.values).reshape(-1)) == set(range(16))


@pytest.mark.parametrize("format", FORMATS)
def test_calibrated_scales_change_outputs_least(format):
    """Of seven scales for each block, against a search block by block; uncalibrated ones change outputs more."""
    numbers, scheme = matrix(70, 12), Scheme(format, 32, 4)
    squares = np.exp(np.random.default_rng(1).normal(size=70) * 3).astype(np.float32)
    made, plain = quantize(numbers, scheme, input_squares=squares), quantize(numbers, scheme)
    block = scheme.block(*numbers.shape)
    tried = [numbers.copy() for _ in range(7)]
    for cut, each in zip((1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), tried, strict=True):
        for row in range(0, 70, 32):
            for column in range(0, 12, 4):
                at = slice(row, row + 32), slice(column, column + 4)
                largest = np.abs(numbers[at]).max()
                each[at] = np.clip(numbers[at], -np.float32(cut) * largest, np.float32(cut) * largest)
                # The block's largest number is the cut one, so the definition gives the scale of the cut.
                each[at] = expected(each[at], Scheme(format), (32, 4))
    differs = False
    for row in range(0, 70, 32):
        for column in range(0, 12, 4):
            at = slice(row, row + 32), slice(column, column + 4)

            def cost(values, at=at):
                return float(np.sum(np.square(values[at] - numbers[at], dtype=np.float64) * squares[at[0], None]))

            least = min(map(cost, tried))
            assert cost(made.numbers()) <= least * (1 + 1e-5)
            differs |= cost(made.numbers()) < cost(plain.numbers()) * (1 - 1e-3)
    assert made.block == block == (32, 4) and differs


def test_zero_points_are_taken_off_before_the_scale():
    nibbles = np.arange(16, dtype=np.uint8).reshape(8, 2)
    scales, zeros = np.array([[0.5, 2], [1, 4]], np.float32), np.array([[3, 0], [8, 15]], np.int8)
    got = dequantize(pack_nibbles(nibbles), scales, zeros, (4, 1), np.float32)
    spread = np.repeat(scales, 4, axis=0), np.repeat(zeros, 4, axis=0)
    np.testing.assert_array_equal(got, (nibbles.astype(np.float32) - spread[1]) * spread[0])


SCHEMES = [
    *(standard(each) for each in FORMATS),
    Scheme("int8", 128, 1, zero_points=True),
    Scheme("int4", None, 1, zero_points=True),
    Scheme("fp8", None, 1),
    Scheme("fp8", None, None),
    Scheme("fp8", 64, 32),
]


@pytest.mark.parametrize("experts", [None, *SCHEMES], ids=str)
@pytest.mark.parametrize("attention", [None, SCHEMES[0], SCHEMES[1], SCHEMES[3]], ids=str)
def test_what_is_written_is_read_as_the_same_schemes(experts, attention):
    quantization = Quantization(experts, attention)
    if quantization:
        read, notes = layouts.resolve(layouts.parse(layouts.write(quantization)), layers=3)
        assert read == quantization and not notes
        stored = layouts.parse(layouts.write(quantization))
        assert not any(
            map(stored.of, ("lm_head", "model.layers.0.mlp.gate", "model.layers.0.self_attn.sa_indexer.q_proj"))
        )


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("values", "quantization"),
    [
        (AWQ, Quantization(*2 * [Scheme("int4", 128, 1, True)])),
        (AWQ | {"modules_to_not_convert": ["self_attn"]}, Quantization(Scheme("int4", 128, 1, True))),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True}, Quantization(*2 * [Scheme("int8")])),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["model.layers.0.self_attn"]},
            Quantization(Scheme("fp8", 128, 128)),
        ),
        (
            CT | {"config_groups": {"a": {"targets": ["Linear"], "weights": INT4}}, "ignore": ["re:.*self_attn.*"]},
            Quantization(Scheme("int4", 32)),
        ),
        (
            CT | {"config_groups": {"a": {"targets": ["Linear"], "weights": INT4 | {"actorder": "group"}}}},
            Quantization(),
        ),
        (CT | {"config_groups": {"a": {"targets": [r"re:.*layers\.0\..*"], "weights": INT4}}}, Quantization()),
    ],
)
def test_other_writers_schemes_are_read(values, quantization):
    """What differs between layers, or has groups in any order, is not held as it is."""
    read, notes = layouts.resolve(layouts.parse(values), layers=2)
    assert read == quantization
    assert bool(notes) == (not quantization or "ignored_layers" in values)
