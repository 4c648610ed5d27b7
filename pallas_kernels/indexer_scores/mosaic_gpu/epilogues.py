"""Relu, gates, sums over heads, and stores of the products. Per thread, in fp32."""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.gpu.mlir import const, global_pointer
from pallas_kernels.gpu.wgmma import FRAGMENT, ROWS, fragment, scalars
from pallas_kernels.indexer_scores.mosaic_gpu.products import thread_position

SPLAT = plgpu.Layout.WG_SPLAT
STAGE_TRANSFORMS = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


def load_gates(weights, first_query, first_head, heads, width, scale):
    """scale * weights[queries, heads] of a block as a [64, heads * width] fragment with equal rows."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT),
        return_type=plgpu.ShapeDtypeStruct((ROWS, heads * width), jnp.float32, FRAGMENT),
    )
    def load(ctx, weights, first_query):
        del ctx
        f32, kind = ir.F32Type.get(), ir.MemRefType(weights.type).element_type
        queries, all_heads = ir.MemRefType(weights.type).shape
        _, column = thread_position()
        values, factor = [], arith.constant(f32, scale)
        for head in range(first_head, first_head + heads):
            for group in range(width // 8):
                pair = []
                for i in range(2):
                    query = arith.addi(first_query.registers.item(), arith.addi(column, const(8 * group + i)))
                    query = arith.minsi(query, const(queries - 1))
                    at = arith.addi(arith.muli(query, const(all_heads)), const(head))
                    value = llvm.load(kind, utils.getelementptr(utils.memref_ptr(weights), [at], kind))
                    value = value if kind == f32 else arith.extf(f32, value)
                    pair.append(arith.mulf(value, factor))
                values += pair * 2
        return fragment(values, heads * width)

    return load(weights, first_query)


def sum_heads(dots, gates, width, before):
    """Sums gate * relu(dot) over heads. Columns are [head, query], so all terms of a sum are in one thread."""
    has_before = before is not None

    @plgpu.inline_mgpu(
        arg_types=(FRAGMENT,) * (2 + has_before),
        return_type=plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, FRAGMENT),
    )
    def head_sum(ctx, dots, gates, *before):
        del ctx
        dots, gates = scalars(dots), scalars(gates)
        each = width // 2
        zero = arith.constant(ir.F32Type.get(), 0.0)
        sums = scalars(before[0]) if before else [None] * each
        for i, (dot, gate) in enumerate(zip(dots, gates, strict=True)):
            term = fragmented_array.mulf(arith.maximumf(dot, zero), gate)
            sums[i % each] = term if sums[i % each] is None else fragmented_array.addf(sums[i % each], term)
        return fragment(sums, width)

    return head_sum(dots, gates, *((before,) if has_before else ()))


def store(out, scores, first_query, first_key, first_position, *, masked):
    """Writes scores[64 keys, queries] to out[queries, keys] in GMEM, except for queries beyond its end."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), FRAGMENT) + (SPLAT,) * 3)
    def store(ctx, out, scores, first_query, first_key, first_position):
        del ctx
        i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
        first_query, first_key, first_position = (v.registers.item() for v in (first_query, first_key, first_position))
        queries, length = ir.MemRefType(out.type).shape
        row, column = thread_position()
        key = arith.addi(first_key, row)

        def wide(v):
            return arith.extui(i64, v)

        base = global_pointer(out)
        lane_offset = arith.addi(arith.muli(wide(arith.addi(first_query, column)), const(length, 64)), wide(row))
        pointer = utils.getelementptr(utils.getelementptr(base, [lane_offset], f32), [wide(first_key)], f32)
        infinity = arith.constant(f32, float("-inf"))
        # The last visible key of this thread's first query, relative to its first key.
        reach = arith.subi(arith.addi(first_position, column), key) if masked else None
        room = arith.subi(const(queries), arith.addi(first_query, column))
        for i, value in enumerate(scalars(scores)):
            group, half, pair = i // 4, i // 2 % 2, i % 2
            if masked:
                visible = arith.cmpi(arith.CmpIPredicate.sge, reach, const(8 * half - 8 * group - pair))
                value = arith.select(visible, value, infinity)
            offset = ((8 * group + pair) * length + 8 * half) * 4
            inside = arith.extui(
                ir.IntegerType.get_signless(32),
                arith.cmpi(arith.CmpIPredicate.sgt, room, const(8 * group + pair)),
            )
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [pointer, value, inside],
                f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0 + {offset}], $1; }}",
                "l,f,r",
                has_side_effects=True,
                asm_dialect=0,
            )

    store(out, scores, first_query, first_key, first_position)


def stage(stage, scores, tile, first_key, first_position, *, masked):
    """Writes scores[64 keys, queries] to stage[queries, keys], tiled (8, 32) and swizzled for the copy engine."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(STAGE_TRANSFORMS), FRAGMENT) + (SPLAT,) * 2)
    def store(ctx, stage, scores, first_key, first_position):
        del ctx
        f32 = ir.F32Type.get()
        first_key, first_position = (v.registers.item() for v in (first_key, first_position))
        _, key_tiles, _, _ = ir.MemRefType(stage.type).shape
        row, column = thread_position()
        base = utils.memref_ptr(stage)
        infinity = arith.constant(f32, float("-inf"))
        reach = arith.subi(arith.addi(first_position, column), arith.addi(first_key, row)) if masked else None
        # The 16-byte chunk c of the 128-byte row of query q is at chunk c ^ q.
        chunk = arith.divui(arith.remui(row, const(32)), const(4))
        start = arith.addi(
            arith.muli(arith.divui(row, const(32)), const(256)),
            arith.addi(arith.muli(column, const(32)), arith.remui(row, const(4))),
        )
        for i, value in enumerate(scalars(scores)):
            group, half, pair = i // 4, i // 2 % 2, i % 2
            if masked:
                visible = arith.cmpi(arith.CmpIPredicate.sge, reach, const(8 * half - 8 * group - pair))
                value = arith.select(visible, value, infinity)
            place = arith.xori(arith.xori(chunk, column), const(2 * half + pair))
            at = arith.addi(
                arith.addi(start, arith.muli(place, const(4))),
                const((group * key_tiles + tile * 2) * 256 + 32 * pair),
            )
            llvm.store(value, utils.getelementptr(base, [at], f32))

    store(stage, scores, first_key, first_position)


def load_scales(scales, tile):
    """scales[64 * tile:][:64] in SMEM as a [64, 8] fragment with equal columns."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT), return_type=plgpu.ShapeDtypeStruct((ROWS, 8), jnp.float32, FRAGMENT)
    )
    def load(ctx, scales, tile):
        del ctx
        f32 = ir.F32Type.get()
        row, _ = thread_position()
        at = arith.addi(row, arith.muli(tile.registers.item(), const(ROWS)))
        base = utils.getelementptr(utils.memref_ptr(scales), [at], f32)
        first, second = (llvm.load(f32, utils.getelementptr(base, [8 * half], f32)) for half in range(2))
        return fragment([first, first, second, second], 8)

    return load(scales, jnp.asarray(tile, jnp.int32))


def load_row(weights, heads, scale):
    """scale * weights[heads] as a [64, heads] fragment with equal rows."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((ROWS, heads), jnp.float32, FRAGMENT)
    )
    def load(ctx, weights):
        del ctx
        f32, kind = ir.F32Type.get(), ir.MemRefType(weights.type).element_type
        _, column = thread_position()
        base = utils.getelementptr(utils.memref_ptr(weights), [column], kind)
        values, factor = [], arith.constant(f32, scale)
        for group in range(heads // 8):
            pair = [llvm.load(kind, utils.getelementptr(base, [8 * group + i], kind)) for i in range(2)]
            values += [arith.mulf(v if kind == f32 else arith.extf(f32, v), factor) for v in pair] * 2
        return fragment(values, heads)

    return load(weights)


def sum_heads_in_quad(dots, gates):
    """Sums gate * relu(dot) over all columns. Every lane of a quad gets the quad's row sums."""

    @plgpu.inline_mgpu(arg_types=(FRAGMENT,) * 2, return_type=plgpu.ShapeDtypeStruct((ROWS, 8), jnp.float32, FRAGMENT))
    def head_sum(ctx, dots, gates):
        del ctx
        zero = arith.constant(ir.F32Type.get(), 0.0)
        sums = [None, None]
        for i, (dot, gate) in enumerate(zip(scalars(dots), scalars(gates), strict=True)):
            half = i // 2 % 2
            term = fragmented_array.mulf(arith.maximumf(dot, zero), gate)
            sums[half] = term if sums[half] is None else fragmented_array.addf(sums[half], term)
        for distance in (1, 2):
            sums = [arith.addf(x, utils.shfl_bfly(x, distance)) for x in sums]
        return fragment([sums[0], sums[0], sums[1], sums[1]], 8)

    return head_sum(dots, gates)


def store_row(out, scores, first_key, position, *, masked):
    """Writes one query's scores[64 keys] to out[keys]. Lanes 0 and 1 of a quad write one row each."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), FRAGMENT) + (SPLAT,) * 2)
    def store(ctx, out, scores, first_key, position):
        del ctx
        i32, i64, f32 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64), ir.F32Type.get()
        row, column = thread_position()
        upper = arith.cmpi(arith.CmpIPredicate.ne, column, const(0))
        values = scalars(scores)
        value = arith.select(upper, values[2], values[0])
        key = arith.addi(first_key.registers.item(), arith.addi(row, arith.select(upper, const(8), const(0))))
        if masked:
            visible = arith.cmpi(arith.CmpIPredicate.sle, key, position.registers.item())
            value = arith.select(visible, value, arith.constant(f32, float("-inf")))
        base = global_pointer(out)
        writes = arith.extui(i32, arith.cmpi(arith.CmpIPredicate.sle, column, const(2)))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [utils.getelementptr(base, [arith.extui(i64, key)], f32), value, writes],
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0], $1; }",
            "l,f,r",
            has_side_effects=True,
            asm_dialect=0,
        )

    store(out, scores, first_key, position)
