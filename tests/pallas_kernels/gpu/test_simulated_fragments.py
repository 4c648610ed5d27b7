"""A NumPy machine reads tiles of weights of fewer bits as the Hopper kernel of experts does, bit by bit."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.grouped_matmul.activations import quantize_rows
from pallas_kernels.grouped_matmul.mosaic_gpu.fragments import (
    FLOAT8_PARTS,
    PARTS,
    STEP,
    Float8Reader,
    ThreadColumns,
    WeightReader,
    spread_columns,
)
from pallas_kernels.quantized import INT4_ZERO, unpack_nibbles
from tests.pallas_kernels.gpu.numpy_machine import NumpyTensorMachine

DTYPES = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "int8": np.int8, "uint8": np.uint8}


def tile_of(kind: str, width: int) -> np.ndarray:
    """Random bytes `[half, rows, width]` with every byte among them."""
    size = (2, STEP // 2 if kind == "uint8" else STEP, width)
    rng = np.random.default_rng(width)
    values = rng.integers(0, 256, size, dtype=np.uint8)
    values.reshape(-1)[rng.permutation(values.size)[:256]] = np.arange(256)
    return values


def swizzled(tile: np.ndarray) -> np.ndarray:
    """The bytes in the order of a copy whose swizzle is the width of a row: 16 bytes move within 128-byte lines."""
    _, _, width = tile.shape
    address = np.arange(tile.size)
    moved = address ^ (address >> 7 & width // 16 - 1) << 4
    out = np.empty(tile.size, np.uint8)
    out[moved] = tile.reshape(-1)
    return out


def numbers_of(tile: np.ndarray, kind: str) -> np.ndarray:
    """What the bytes stand for, float32 `[half, STEP, width]`."""
    if kind == "uint8":
        return unpack_nibbles(tile).astype(np.float32) - INT4_ZERO
    numbers = tile.view(DTYPES[kind]).astype(np.float32)
    return np.where(np.isnan(numbers), np.where(tile & 128, -480, 480), numbers).astype(np.float32)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kind", DTYPES)
def test_registers_hold_the_numbers(kind, width):
    tile = tile_of(kind, width)
    words, numbers = swizzled(tile).view(np.uint32), numbers_of(tile, kind)
    thread = np.arange(128)
    warp, lane = thread // 32, thread % 32
    g, c = lane // 4, lane % 4
    seen = np.zeros(numbers.shape, int)
    for warpgroup in range(width // 64):
        machine = NumpyTensorMachine(128, 1, words.size)
        machine.memory[0] = words
        reader = WeightReader(machine, kind, width, warpgroup)
        # As wgmma takes its left operand, [products, 64 rows, STEP].
        left = np.full((2, 64, STEP), np.nan, np.float32)
        for part in range(PARTS):
            loaded = reader.load(part)
            for product in range(2):
                for i, register in enumerate(reader.registers(loaded, product)):
                    pair = np.ascontiguousarray(register.raw).view(ml_dtypes.bfloat16).reshape(128, 2)
                    for j in range(2):
                        inputs = 16 * part + 8 * (i // 2) + 2 * c + j
                        left[product, 16 * warp + g + 8 * (i % 2), inputs] = pair[:, j]
        # The kernel's sums of a thread: row g + 8 * i of product p is column 2 * p + i of its four.
        half, column = reader.half.raw.astype(int), reader.column.raw.astype(int)
        for product in range(2):
            for i in range(2):
                wanted = numbers[half, :, column + 2 * product + i]
                np.testing.assert_array_equal(left[product, 16 * warp + g + 8 * i], wanted)
                seen[half, :, column + 2 * product + i] += 1
        np.testing.assert_array_equal(reader.row.raw, 2 * c)
        np.testing.assert_array_equal(reader.output(256, 768).raw, 256 + 768 * half + column)
    # Four threads, those of a quad, have the sums of different rows of one column.
    assert (seen == seen[0, 0, 0]).all()
    assert seen.min() > 0


@pytest.mark.parametrize("width", [64, 128])
def test_registers_hold_the_bytes_for_products_in_float8(width):
    """Every byte of a tile, where wgmma takes its left operand in float8."""
    tile = tile_of("float8_e4m3fn", width)
    words = swizzled(tile).view(np.uint32)
    thread = np.arange(128)
    warp, g, c = thread // 32, thread % 32 // 4, thread % 4
    seen = np.zeros(tile.shape, int)
    for warpgroup in range(width // 64):
        machine = NumpyTensorMachine(128, 1, words.size)
        machine.memory[0] = words
        reader = Float8Reader(machine, width, warpgroup)
        half, column = reader.half.raw.astype(int), reader.column.raw.astype(int)
        for part in range(FLOAT8_PARTS):
            for product, registers in enumerate(reader.registers(reader.load(part))):
                for i, register in enumerate(registers):
                    four = np.ascontiguousarray(register.raw).view(np.uint8).reshape(128, 4)
                    # Register i has row g + 8 * (i % 2) of its product, which is this of the thread's columns.
                    own = column + 2 * product + i % 2
                    for j in range(4):
                        inputs = 32 * part + 16 * (i // 2) + 4 * c + j
                        np.testing.assert_array_equal(four[:, j], tile[half, inputs, own])
                        seen[half, inputs, own] += 1
        # The columns of wgmma's rows 16 * warp + g and + 8 are the same for all four threads of a quad.
        np.testing.assert_array_equal(half, g // 4)
        np.testing.assert_array_equal(column, 64 * warpgroup + 16 * warp + g % 4 * 4)
    assert (seen == 1).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_results_are_stored_where_they_belong(width, fused):
    """Sums whose values tell their column and row; scales of columns; every element is stored once."""
    rows = 16
    rng = np.random.default_rng(0)
    sums, factors = rng.normal(size=(2, width, rows)).astype(np.float32), rng.normal(size=(2, width)).astype(np.float32)
    thread = np.arange(128)
    warp, g, c = thread // 32, thread % 32 // 4, thread % 4
    out, stored = np.zeros((rows, width if fused else 2 * width)), np.zeros((rows, width if fused else 2 * width), int)
    for warpgroup in range(width // 64):
        machine = NumpyTensorMachine(128, 1, 1)
        reader = ThreadColumns(machine, width, warpgroup)
        half, column = reader.half.raw.astype(int), reader.column.raw.astype(int)
        # As wgmma gives its result, [products, 64, rows].
        result = np.full((2, 64, rows), np.nan, np.float32)
        for byte in range(4):
            result[byte // 2, 16 * warp + g + byte % 2 * 8] = sums[half, column + byte]
        four = [machine._value(factors[half, column + byte].view(np.uint32)) for byte in range(4)]
        totals = []
        for product in range(2):
            own = [
                np.ascontiguousarray(result[product, 16 * warp + g + i // 2 % 2 * 8, i // 4 * 8 + 2 * c + i % 2])
                for i in range(rows // 2)
            ]
            own = [machine._value(each.view(np.uint32)) for each in own]
            pairs = zip(own, spread_columns(four, rows, product), strict=True)
            totals.append([machine.float_op("mul", *pair) for pair in pairs])
        first, results = reader.results(totals, fused=fused)
        place = reader.output(0, 0 if fused else width).raw.astype(int)
        for offset, words in results:
            for i, word in enumerate(words):
                numbers = np.ascontiguousarray(word.raw).view(ml_dtypes.bfloat16).reshape(128, 2)
                for j in range(2):
                    at = first.raw.astype(int) + offset, place + 2 * i + j
                    np.add.at(stored, at, 1)
                    out[at] = numbers[:, j]
    wanted = (sums * factors[..., None]).astype(np.float64)
    gate, up = wanted
    wanted = (gate / (1 + np.exp(-gate)) * up).T if fused else np.concatenate([gate.T, up.T], axis=1)
    assert (stored == 1).all()
    np.testing.assert_allclose(out, wanted, rtol=5e-3)


def test_rows_are_rounded_to_float8():
    """Threads have four numbers each of rows of 128: those of `quantize_rows`, bit by bit."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(8, 128)) * 2.0 ** rng.integers(-30, 31, (8, 1))
    rows[0], rows[1, 5], rows[2, 7], rows[3] = 0, 448, -450, rows[3] * 1e-30
    rows[1, 6:], rows[2, 8:] = 1e-3, 447
    rows = rows.astype(ml_dtypes.bfloat16)
    machine = NumpyTensorMachine(256, 1, 8)
    machine.memory[:] = 0
    columns = ThreadColumns(machine, 128, 0)
    words = np.ascontiguousarray(rows).view(np.uint32).reshape(256, 2)
    words = [machine._value(words[:, i]) for i in range(2)]
    row = machine.thread >> 5
    machine.max_shared(row, columns.largest(words))
    value, scale = columns.to_float8(words, machine.load_shared(row))
    wanted = quantize_rows(jnp.asarray(rows))
    np.testing.assert_array_equal(value.raw.view(np.uint8).reshape(8, 128), np.asarray(wanted.values).view(np.uint8))
    scales = np.repeat(np.asarray(wanted.scales), 32)
    np.testing.assert_array_equal(np.ascontiguousarray(scale.raw).view(np.float32), scales)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kind", DTYPES)
def test_lanes_of_a_warp_read_different_banks(kind, width):
    words = swizzled(tile_of(kind, width)).view(np.uint32)
    for warpgroup in range(width // 64):
        reader = WeightReader(NumpyTensorMachine(128, 1, words.size), kind, width, warpgroup)
        for address in (reader.first, reader.second):
            banks = np.sort(address.raw.reshape(4, 32) % 32, axis=1)
            np.testing.assert_array_equal(banks, np.tile(np.arange(32), (4, 1)))


@pytest.mark.parametrize("width", [64, 128])
def test_lanes_of_a_warp_read_different_banks_of_float8(width):
    words = swizzled(tile_of("float8_e4m3fn", width)).view(np.uint32)
    for warpgroup in range(width // 64):
        for address in Float8Reader(NumpyTensorMachine(128, 1, words.size), width, warpgroup).addresses:
            banks = np.sort(address.raw.reshape(4, 32) % 32, axis=1)
            np.testing.assert_array_equal(banks, np.tile(np.arange(32), (4, 1)))
