"""Products of keys and queries as wgmma instructions."""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.gpu.mlir import const
from pallas_kernels.gpu.wgmma import FRAGMENT, ROWS, asm, fragment, group


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
        for number in range(k_groups):
            for i in range(k_group // k_step):
                at = count + len(operands)
                for base, step, stride in ((a, a_step, a_group), (b, b_step, b_group)):
                    offset = number * stride + i * step[0]
                    operands.append(arith.addi(base, const(offset >> 4, 64)) if offset else base)
                lines.append(
                    f"wgmma.mma_async.sync.aligned.m64n{columns}k{k_step}.f32.{types} {result}, ${at}, ${at + 1}, "
                    f"{'p' if len(lines) else 'q'}, 1, 1{transposes};"
                )
        constraints = ",".join(["=f"] * count + ["l"] * len(operands))
        return fragment(asm(count, operands, group(lines), constraints), columns)

    return start(keys, queries)


def sync_warpgroup():
    """Barrier of the threads of this warpgroup."""

    @plgpu.inline_mgpu()
    def sync(ctx):
        del ctx
        utils.warpgroup_barrier()

    sync()
