"""Warpgroup matrix products (wgmma) as inline PTX. `plgpu.wgmma` can neither start from zero nor overlap two.

What ptxas needs to let these instructions overlap: an accumulator is one register per element, and nothing touches it
before its product is waited for.
"""

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
"""Rows of one warpgroup's product, the M of wgmma."""


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


def group(products):
    """The PTX of products that form one group: the predicate p is true and q is false."""
    before = [".reg .pred p, q;", "bar.warp.sync 0xffffffff;", "setp.ne.b32 p, 1, 0;", "setp.ne.b32 q, 0, 0;"]
    wgmma = ["wgmma.fence.sync.aligned;", *products, "wgmma.commit_group.sync.aligned;"]
    return "\n".join(["{", *before, *wgmma, "}"])


def wait(values, in_flight):
    """Waits until at most `in_flight` later groups of products are running. Returns the results in `values`, usable."""
    constraints = ",".join(["=f"] * len(values) + [str(i) for i in range(len(values))])
    return asm(len(values), values, f"wgmma.wait_group.sync.aligned {in_flight};", constraints)


def finish_dots(dots, in_flight, layout=FRAGMENT):
    """Waits until at most `in_flight` later products are running, and returns `dots` in a layout."""

    @plgpu.inline_mgpu(arg_types=(FRAGMENT,), return_type=plgpu.ShapeDtypeStruct(dots.shape, jnp.float32, layout))
    def finish(ctx, dots):
        del ctx
        return fragment(wait(scalars(dots), in_flight), dots.shape[1]).to_layout(layout.to_mgpu())

    return finish(dots)


def start_row_dots(*products, swizzles):
    """Starts the sum of bf16 products `a[64, d] @ b[n, d].T`, each a in registers and each b in shared memory.

    `finish_dots` makes the float32 result `[64, n]` usable. `plgpu.wgmma` would copy a's registers for each call, since
    it hides from the compiler that they stay as they are.

    Args:
      products: pairs (a, b): a in the layout `plgpu.Layout.WGMMA`, b tiled by (8, swizzle / 2).
      swizzles: bytes of a row of b's tiles, for each pair.
    """
    columns = products[0][1].shape[0]
    transforms = [(plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)) for swizzle in swizzles]
    count = columns // 2

    @plgpu.inline_mgpu(
        arg_types=[kind for each in transforms for kind in (plgpu.Layout.WGMMA, plgpu.RefType(each))],
        return_type=plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, FRAGMENT),
    )
    def start(ctx, *arrays):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        result = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
        operands, kinds, lines = [], [], []

        def operand(value, kind):
            operands.append(value)
            kinds.append(kind)
            return f"${count + len(operands) - 1}"

        for a, b, swizzle in zip(arrays[::2], arrays[1::2], swizzles, strict=True):
            width = swizzle // 2
            (base, (_, stride)), (_, group_stride), _ = mma_utils.create_descriptor(
                utils.memref_transpose(b, (1, 0, 3, 2)),
                swizzle=swizzle,
                large_tile=(width, width),
                group_size=(width, columns),
                logical_k_major=True,
            )
            for first in range(0, a.shape[1], 16):
                part = a[:, first : first + 16].registers.flat
                words = [vector.extract(vector.bitcast(ir.VectorType.get((1,), i32), r), [], [0]) for r in part]
                names = ", ".join(operand(word, "r") for word in words)
                offset = first // width * group_stride + first % width // 16 * stride[0]
                at = operand(arith.addi(base, const(offset >> 4, 64)) if offset else base, "l")
                lines.append(
                    f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {result}, {{{names}}}, {at}, "
                    f"{'p' if lines else 'q'}, 1, 1, 0;"
                )
        return fragment(asm(count, operands, group(lines), ",".join(["=f"] * count + kinds)), columns)

    return start(*(array for pair in products for array in pair))
