"""Products of keys and queries as wgmma instructions. `plgpu.wgmma` can neither start from zero nor overlap two."""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.gpu.mlir import const

FRAGMENT = plgpu.Layout._WGMMA_ACC_32BIT
"""A [64, n] array as wgmma writes it, with one fp32 register per element. Pairs would make ptxas serialise wgmma."""
ROWS = 64
"""Keys on the M side of one wgmma."""


def scalars(array):
    """The f32 scalars that a thread holds of an array, in wgmma's order: 8-column group, row half, pair."""
    return [
        vector.extract(r, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))
        for r in array.registers.flat
    ]


def fragment(scalars, columns):
    """The [64, columns] array of a thread's scalars; undoes `scalars`."""
    layout = FRAGMENT.to_mgpu()
    one = ir.VectorType.get((1,), ir.F32Type.get())
    registers = np.empty(len(scalars), dtype=object)
    registers[:] = [vector.broadcast(one, s) for s in scalars]
    registers = registers.reshape(layout.registers_shape((ROWS, columns)))
    return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def asm(results, operands, text, constraints):
    """Volatile inline PTX with `results` f32 outputs."""
    f32 = ir.F32Type.get()
    struct = llvm.StructType.get_literal([f32] * results)
    out = llvm.inline_asm(struct, operands, text, constraints, asm_dialect=0, has_side_effects=True)
    return [llvm.extractvalue(f32, out, [i]) for i in range(results)]


def thread_position():
    """This thread's first row and first column in the wgmma accumulator, as i32 values."""
    thread = arith.remui(utils.thread_idx(), const(128))
    lane = arith.remui(thread, const(32))
    warp = arith.divui(thread, const(32))
    row = arith.addi(arith.muli(warp, const(16)), arith.divui(lane, const(4)))
    column = arith.muli(arith.remui(lane, const(4)), const(2))
    return row, column


def start_dots(keys, queries, transforms, columns, swizzle):
    """Starts keys[64, d] @ queries[columns, d].T, bf16 or float8_e4m3fn. `finish_dots` makes the result usable."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms),) * 2,
        return_type=plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, FRAGMENT),
    )
    def start(ctx, keys, queries):
        del ctx
        queries = utils.memref_transpose(queries, (1, 0, 3, 2))
        kind = ir.MemRefType(keys.type).element_type
        itemsize = utils.bytewidth(kind)
        k_group, k_step = swizzle // itemsize, 32 // itemsize
        (a, (_, a_step)), (_, a_group), _ = mma_utils.create_descriptor(
            keys, swizzle=swizzle, large_tile=(ROWS, k_group), group_size=(ROWS, k_group), logical_k_major=False
        )
        (b, (_, b_step)), (_, b_group), _ = mma_utils.create_descriptor(
            queries, swizzle=swizzle, large_tile=(k_group, k_group), group_size=(k_group, columns), logical_k_major=True
        )
        count = columns // 2
        k_groups = ir.MemRefType(keys.type).shape[1]
        result = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
        types, transposes = ("bf16.bf16", ", 0, 0") if itemsize == 2 else ("e4m3.e4m3", "")
        operands, lines = [], []
        for group in range(k_groups):
            for i in range(k_group // k_step):
                at = count + len(operands)
                for base, step, stride in ((a, a_step, a_group), (b, b_step, b_group)):
                    offset = group * stride + i * step[0]
                    operands.append(arith.addi(base, const(offset >> 4, 64)) if offset else base)
                lines.append(
                    f"wgmma.mma_async.sync.aligned.m64n{columns}k{k_step}.f32.{types} {result}, ${at}, ${at + 1}, "
                    f"{'p' if len(lines) else 'q'}, 1, 1{transposes};"
                )
        text = "\n".join(
            [
                "{",
                ".reg .pred p, q;",
                "bar.warp.sync 0xffffffff;",
                "setp.ne.b32 p, 1, 0;",
                "setp.ne.b32 q, 0, 0;",
                "wgmma.fence.sync.aligned;",
                *lines,
                "wgmma.commit_group.sync.aligned;",
                "}",
            ]
        )
        constraints = ",".join(["=f"] * count + ["l"] * len(operands))
        return fragment(asm(count, operands, text, constraints), columns)

    return start(keys, queries)


def finish_dots(dots, in_flight):
    """Waits until at most `in_flight` later products are running, and returns `dots`."""

    @plgpu.inline_mgpu(arg_types=(FRAGMENT,), return_type=plgpu.ShapeDtypeStruct(dots.shape, jnp.float32, FRAGMENT))
    def finish(ctx, dots):
        del ctx
        values = scalars(dots)
        constraints = ",".join(["=f"] * len(values) + [str(i) for i in range(len(values))])
        text = f"wgmma.wait_group.sync.aligned {in_flight};"
        return fragment(asm(len(values), values, text, constraints), dots.shape[1])

    return finish(dots)


def sync_warpgroup():
    """Barrier of the threads of this warpgroup."""

    @plgpu.inline_mgpu()
    def sync(ctx):
        del ctx
        utils.warpgroup_barrier()

    sync()
