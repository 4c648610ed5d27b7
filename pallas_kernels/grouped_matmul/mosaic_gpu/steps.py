"""What a consumer warpgroup of the kernel `quantized` does: products, scales and stores, per thread."""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels.gpu.mlir import byte_offset, const, global_pointer
from pallas_kernels.gpu.simt import Value
from pallas_kernels.gpu.tensor_machine import TensorMachine
from pallas_kernels.gpu.wgmma import FRAGMENT, ROWS, asm, fragment, group, scalars, wait
from pallas_kernels.grouped_matmul.mosaic_gpu.fragments import (
    FLOAT8_PARTS,
    PARTS,
    Float8Reader,
    ThreadColumns,
    WeightReader,
    spread_columns,
)

SCALES_START = 4
"""Copies of rows' scales begin at a multiple of this row, 16 bytes: at others TMA fails as an illegal instruction."""
_SPLAT = plgpu.Layout.WG_SPLAT


class _Thread(TensorMachine):
    """A machine for threads that know their number alone."""

    def __init__(self, memory):
        self.i32, self.i64, self.f32 = (
            ir.IntegerType.get_signless(32),
            ir.IntegerType.get_signless(64),
            ir.F32Type.get(),
        )
        self.shared, self.thread = utils.memref_ptr(memory), Value(self, utils.thread_idx())


def start_products(weights, lhs, warpgroup, weight_transforms, lhs_transforms, rows):
    """Starts both products of a step, one group of wgmma each; `finish_dots` makes the float32 results usable.

    Args:
      weights: `[2, inputs as stored, width]`, a tile as `fragments` says.
      lhs: bfloat16 `[slabs, rows, 64]`.
      warpgroup: number of the 64 columns of each half.

    Returns:
      Twice `[64, rows]`, in the layout `FRAGMENT`.
    """
    kind, width = str(weights.dtype), weights.shape[-1]
    result = plgpu.ShapeDtypeStruct((ROWS, rows), jnp.float32, FRAGMENT)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(weight_transforms), plgpu.RefType(lhs_transforms), _SPLAT),
        return_type=(result, result),
    )
    def start(_, weights, lhs, warpgroup):
        machine = _Thread(weights)
        reader = WeightReader(machine, kind, width, Value(machine, warpgroup.registers.item()))
        descriptors = _descriptors(lhs, rows)
        words = [reader.load(part) for part in range(PARTS)]
        return tuple(
            fragment(_products([reader.registers(each, product) for each in words], descriptors, rows, "bf16"), rows)
            for product in range(2)
        )

    return start(weights, lhs, jnp.asarray(warpgroup, jnp.int32))


def add_float8_products(
    totals, factors, weights, lhs, row_scales, row, warpgroup, weight_transforms, lhs_transforms, rows
):
    """Adds both products of a step, in float8, times the scales of weights and rows to the totals.

    The second product starts when the first one has been added: registers hold one float32 sum beside the totals.

    Args:
      totals: two `[64, rows]` in the layout `FRAGMENT`.
      factors: the scales of the weights, of the same shapes and layout; the same for all that a thread has.
      weights: float8_e4m3fn `[2, STEP, width]`, a tile as `fragments` says.
      lhs: float8_e4m3fn `[1, rows, STEP]`.
      row_scales: float32 `[rows or more]`, from the last multiple of `SCALES_START` up to `row` on.
      row: the tile's first row.
      warpgroup: number of the 64 columns of each half.
    """
    width = weights.shape[-1]
    result = plgpu.ShapeDtypeStruct((ROWS, rows), jnp.float32, FRAGMENT)
    references = (plgpu.RefType(weight_transforms), plgpu.RefType(lhs_transforms), plgpu.RefType())

    @plgpu.inline_mgpu(arg_types=(*references, _SPLAT, _SPLAT) + (FRAGMENT,) * 4, return_type=(result, result))
    def add(_, weights, lhs, row_scales, *others):
        machine, f32 = _Thread(weights), ir.F32Type.get()
        (row, warpgroup), arrays = (Value(machine, x.registers.item()) for x in others[:2]), others[2:]
        reader = Float8Reader(machine, width, warpgroup)
        descriptors = _descriptors(lhs, rows)
        left = [reader.registers(reader.load(part)) for part in range(FLOAT8_PARTS)]
        own_scales = utils.getelementptr(
            utils.memref_ptr(row_scales), [(reader.row + (row & SCALES_START - 1)).raw], f32
        )
        new = []
        for product, (before, factor) in enumerate(zip(arrays[:2], arrays[2:], strict=True)):
            sums = wait(_products([each[product] for each in left], descriptors, rows, "e4m3"), 0)
            factor, added = scalars(factor)[0], []
            for eight, four in enumerate(zip(*[iter(zip(scalars(before), sums, strict=True))] * 4, strict=True)):
                places = [byte_offset(own_scales, const(32 * eight + 4 * i)) for i in range(2)]
                scales = [arith.mulf(factor, llvm.load(f32, place)) for place in places]
                added += [mlir_math.fma(s, scales[i % 2], t) for i, (t, s) in enumerate(four)]
            new.append(fragment(added, rows))
        return tuple(new)

    numbers = (jnp.asarray(x, jnp.int32) for x in (row, warpgroup))
    return add(weights, lhs, row_scales, *numbers, *totals, *factors)


def _descriptors(lhs, rows):
    """wgmma's descriptors of the right operand `[slabs, rows, 128 bytes]`, for each 32 bytes of a row."""
    slabs, *_, width = ir.MemRefType(lhs.type).shape
    found = []
    for slab in range(slabs):
        (base, (_, stride)), _, _ = mma_utils.create_descriptor(
            utils.memref_transpose(utils.memref_slice(lhs, slab), (1, 0, 3, 2)),
            swizzle=128,
            large_tile=(width, width),
            group_size=(width, rows),
            logical_k_major=True,
        )
        found += [arith.addi(base, const(i * stride[0] >> 4, 64)) if i else base for i in range(4)]
    return found


def _products(registers, descriptors, rows, kind):
    """The sum of products of left operands in registers, four words each, and right operands in shared memory.

    Args:
      kind: of the numbers, as PTX names it: "bf16" or "e4m3".
    """
    depth, transposed = (16, ", 0") if kind == "bf16" else (32, "")
    count = rows // 2
    result = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
    operands, kinds, lines = [], [], []
    for words, descriptor in zip(registers, descriptors, strict=True):
        at = count + len(operands)
        operands += [word.raw for word in words] + [descriptor]
        kinds += ["r"] * 4 + ["l"]
        names = ", ".join(f"${at + i}" for i in range(4))
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{rows}k{depth}.f32.{kind}.{kind} {result}, {{{names}}}, ${at + 4}, "
            f"{'p' if lines else 'q'}, 1, 1{transposed};"
        )
    return asm(count, operands, group(lines), ",".join(["=f"] * count + kinds))


def add_scaled(totals, sums, factors):
    """`totals + sums * factors`; of factors None, `totals + sums`."""
    shape = plgpu.ShapeDtypeStruct(totals.shape, jnp.float32, FRAGMENT)

    @plgpu.inline_mgpu(arg_types=(FRAGMENT,) * (2 if factors is None else 3), return_type=shape)
    def add(_, totals, sums, *factors):
        columns = totals.shape[1]
        totals, sums = scalars(totals), scalars(sums)
        if factors:
            new = [mlir_math.fma(s, f, t) for t, s, f in zip(totals, sums, scalars(factors[0]), strict=True)]
        else:
            new = [arith.addf(t, s) for t, s in zip(totals, sums, strict=True)]
        return fragment(new, columns)

    return add(totals, sums, *(() if factors is None else (factors,)))


def add_in_turn(totals, products, factors, warpgroup, continues, waits, passes, warpgroups, consumers):
    """Adds the products of a step to totals in shared memory, after the step before it and before the next one.

    The warpgroups of a consumer are every `consumers`-th, and the next step is the next one's. Thread i of each has the
    same sums, so a thread reads what one thread wrote.

    Args:
      totals: float32 `[rows / 4, 128, 4]`, of all warpgroups of the consumer.
      products: two `[64, rows]` in the layout `FRAGMENT`.
      factors: two of the same shape; None for 1.
      warpgroup: its number.
      continues: whether there are totals to add to. If not, they begin at zero.
      waits: whether a step was before this one, maybe of another tile.
      passes: whether a step follows, maybe of another tile.
      warpgroups: number of warpgroups of all consumers.

    Returns:
      The new totals, as the products.
    """
    rows = products[0].shape[1]
    result = plgpu.ShapeDtypeStruct((ROWS, rows), jnp.float32, FRAGMENT)
    arrays = (*products, *(factors or ()))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) + (_SPLAT,) * 4 + (FRAGMENT,) * len(arrays), return_type=(result, result)
    )
    def add(_, totals, *others):
        machine, f32 = _Thread(totals), ir.F32Type.get()
        four = ir.VectorType.get((4,), f32)
        warpgroup, *conditions = (Value(machine, x.registers.item()) for x in others[:4])
        continues, waits, passes = (condition.ne(0).raw for condition in conditions)
        sums = [x for product in others[4:6] for x in scalars(product)]
        scales = [x for factor in others[6:] for x in scalars(factor)]
        after = warpgroup + consumers
        after = machine.select(after < warpgroups, after, after - warpgroups)
        base, zero = utils.getelementptr(machine.shared, [(machine.thread & 127).raw], four), _float(0.0)
        _turn("sync", warpgroup, waits)
        new = []
        for place in range(rows // 4):
            pointer = byte_offset(base, const(2048 * place))
            before = llvm.load(four, pointer, alignment=16)
            for i in range(4):
                at = 4 * place + i
                total = arith.select(continues, llvm.extractelement(before, const(i)), zero)
                if scales:
                    new.append(mlir_math.fma(sums[at], scales[at], total))
                else:
                    new.append(arith.addf(total, sums[at]))
            packed = llvm.mlir_undef(four)
            for i in range(4):
                packed = llvm.insertelement(packed, new[4 * place + i], const(i))
            llvm.store(packed, pointer, alignment=16)
        _turn("arrive", after, passes)
        return fragment(new[: rows // 2], rows), fragment(new[rows // 2 :], rows)

    numbers = (jnp.asarray(x, jnp.int32) for x in (warpgroup, continues, waits, passes))
    return add(totals, *numbers, *arrays)


def release():
    """Waits until all threads of the warpgroup have read a stage."""

    @plgpu.inline_mgpu()
    def sync(_):
        utils.warpgroup_barrier()

    sync()


def load_scales(scales, warpgroup, group, block, column, half_step, outputs, width, rows):
    """The factors of the sums of both products, twice a `[64, rows]` whose rows are equal numbers.

    Args:
      scales: `[e, row blocks, column blocks]` in global memory, bfloat16, float16 or float32.
      block: which row of blocks.
      column: the first column of the first half of the tile, and `half_step` that of the second half behind it.
      outputs: columns that share a scale: 1, or a multiple of 64.
    """
    result = plgpu.ShapeDtypeStruct((ROWS, rows), jnp.float32, FRAGMENT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) + (_SPLAT,) * 4, return_type=(result, result))
    def load(_, scales, *numbers):
        machine = _Thread(scales)
        warpgroup, group, block, column = (Value(machine, x.registers.item()) for x in numbers)
        reader = ThreadColumns(machine, width, warpgroup)
        _, row_blocks, column_blocks = ir.MemRefType(scales.type).shape
        kind, f32 = ir.MemRefType(scales.type).element_type, ir.F32Type.get()
        at = (group * row_blocks + block) * column_blocks + reader.output(column, half_step) // outputs
        pointer = utils.getelementptr(global_pointer(scales), [at.raw], kind)
        if outputs == 1:
            size = utils.bytewidth(kind)
            four = llvm.load(ir.VectorType.get((4,), kind), pointer, alignment=4 * size, invariant=True)
            found = [llvm.extractelement(four, const(i)) for i in range(4)]
        else:
            found = [llvm.load(kind, pointer, invariant=True)] * 4
        found = [each if kind == f32 else arith.extf(f32, each) for each in found]
        return tuple(fragment(spread_columns(found, rows, product), rows) for product in range(2))

    return load(scales, *(jnp.asarray(x, jnp.int32) for x in (warpgroup, group, block, column)))


def store(out, totals, warpgroup, row, count, column, half_step, width, fused):
    """Writes the totals of both products to `out`, bfloat16 `[all rows, columns]`, from `row` on `count` rows at most.

    With `fused` the first half is a gate g and the second half is up u of the same columns; `silu(g) * u` is written.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), FRAGMENT, FRAGMENT) + (_SPLAT,) * 4)
    def run(_, out, first, second, *numbers):
        machine = _Thread(out)
        warpgroup, row, count, column = (Value(machine, x.registers.item()) for x in numbers)
        reader = ThreadColumns(machine, width, warpgroup)
        own_row, results = reader.results(_words(machine, first, second), fused=fused)
        base, pitch = _own_place(out, row + own_row, reader.output(column, 0 if fused else half_step))
        for offset, words in results:
            fits = arith.cmpi(arith.CmpIPredicate.sgt, (count - own_row).raw, const(offset))
            _store_words(byte_offset(base, const(offset * pitch, 64)), words, fits)

    run(out, *totals, *(jnp.asarray(x, jnp.int32) for x in (warpgroup, row, count, column)))


def store_float8(out, scales, maxima, totals, warpgroup, row, count, column, width):
    """As a fused `store`, rounded to float8 as `quantize_rows` rounds what `store` writes; by two warpgroups together.

    Args:
      out: float8_e4m3fn `[all rows, columns]`; `column` is a multiple of 128, and `width` is 128.
      scales: float32 `[columns / 128, all rows or more]`.
      maxima: int32 `[rows of a tile]` in shared memory.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3 + (FRAGMENT, FRAGMENT) + (_SPLAT,) * 4)
    def run(_, out, scales, maxima, first, second, *numbers):
        machine = _Thread(maxima)
        warpgroup, row, count, column = (Value(machine, x.registers.item()) for x in numbers)
        reader = ThreadColumns(machine, width, warpgroup)
        own_row, results = reader.results(_words(machine, first, second), fused=True)
        _sync_consumers()  # All have read the maxima of the tile before.
        rows = ir.MemRefType(maxima.type).shape[0]
        with machine.when(machine.thread < rows):
            machine.store_shared(machine.thread, 0)
        _sync_consumers()
        for offset, words in results:
            machine.max_shared(own_row + offset, reader.largest(words))
        _sync_consumers()
        base, pitch = _own_place(out, row + own_row, reader.output(column, 0))
        scale_base, _ = _own_place(scales, column // width, row + own_row)
        leads = reader.column.eq(0)
        for offset, words in results:
            largest = machine.load_shared_behind(own_row, offset)
            value, scale = reader.to_float8(words, largest)
            fits = Value(machine, arith.cmpi(arith.CmpIPredicate.sgt, (count - own_row).raw, const(offset)))
            _store_words(byte_offset(base, const(offset * pitch, 64)), [value], fits.raw)
            _store_words(byte_offset(scale_base, const(4 * offset, 64)), [scale], (fits & leads).raw)

    run(out, scales, maxima, *totals, *(jnp.asarray(x, jnp.int32) for x in (warpgroup, row, count, column)))


def _words(machine, *products):
    """Float32 sums as words of a machine."""
    return [[Value(machine, arith.bitcast(machine.i32, x)) for x in scalars(each)] for each in products]


def _own_place(array, row, column):
    """A pointer to an element of an array `[rows, columns]` in global memory, and the bytes of a row."""
    kind = ir.MemRefType(array.type)
    size, i64 = utils.bytewidth(kind.element_type), ir.IntegerType.get_signless(64)
    pitch = size * kind.shape[1]
    row, column = (arith.extui(i64, x.raw) for x in (row, column))
    offset = arith.addi(arith.muli(row, const(pitch, 64)), arith.muli(column, const(size, 64)))
    return byte_offset(global_pointer(array), offset), pitch


def _store_words(pointer, words, predicate):
    places = [f"${i + 1}" for i in range(len(words))]
    form = "st.global.b32 [$0], $1;" if len(words) == 1 else f"st.global.v2.b32 [$0], {{{', '.join(places)}}};"
    utils.inline_ptx(form, pointer, *(word.raw for word in words), predicate=predicate, has_side_effects=True)


def _sync_consumers():
    """Barrier of two consumer warpgroups. Barriers below 9 are Mosaic's."""
    utils.inline_ptx("bar.sync 9, 256;", has_side_effects=True, convergent=True)


def _turn(action, warpgroup, predicate):
    """Waits for a warpgroup's turn ("sync") or gives it to it ("arrive"). Barriers below 9 are Mosaic's."""
    utils.inline_ptx(
        f"bar.{action} $0, 256;", (warpgroup + 9).raw, predicate=predicate, has_side_effects=True, convergent=True
    )


def _float(number):
    return arith.constant(ir.F32Type.get(), number)
