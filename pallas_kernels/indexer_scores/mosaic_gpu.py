"""Indexer scores on Hopper GPUs, in Pallas Mosaic GPU.

Prefill (several queries a sequence). A persistent grid: every CTA gets an equal, contiguous share of the (block of 16
queries, step of 256 keys) pairs, so it loads queries and gates once or twice and then streams keys. A producer
warpgroup fetches key pages through the page table with TMA; two consumer warpgroups read the same keys, each for 8
queries of its own.

* One wgmma tile is 64 keys (M) x [head, query] (N, 16 heads x 8 queries = 128) x dim (K). Heads are the slow index of
  N, so the 16 terms of one score lie in one thread's registers and their sum needs no exchange between threads.
* relu and gate are one max and one fma a term, in fp32. The gates are constant for a block and stay in registers.
* A warpgroup keeps two products in flight: while the tensor cores multiply one tile, it sums the heads of the other.
* The scores of a step go through swizzled shared memory to a TMA store; where the number of queries is no multiple of 8
  (TMA could not clip there), threads store them directly.
* Steps that no query of a block sees are not computed; TMA fills them with -inf.

Decode (one query a sequence). N is the heads alone, the warpgroups share a step's keys, and each key is read once. Four
terms of a score are in one thread and a quad of lanes holds the rest: two shuffles finish the sum.

Interpret mode cannot run this module: products, epilogues and stores are `inline_mgpu` bodies.
"""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

_FRAGMENT = plgpu.Layout._WGMMA_ACC_32BIT
"""A [64, n] array as wgmma leaves it, one fp32 register an element: pairs would make ptxas serialise wgmma."""
_SPLAT = plgpu.Layout.WG_SPLAT
_STAGE_TRANSFORMS = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
_ROWS = 64  # keys on the M side of one wgmma
_WIDTH = 8  # queries of one warpgroup
_COLUMNS = 128  # largest N of one product
_CTAS = 132
_SHARED_BYTES = 225 * 1024


def indexer_scores(
    q: jax.Array, weights: jax.Array, keys: jax.Array, page_table: jax.Array, query_start: jax.Array, *, scale: float
) -> jax.Array:
    """`scale * sum_n weights[b,t,n] * relu(q[b,t,n] . keys[b,s])`, causal; see `api.indexer_scores`.

    Args:
      q: bf16 `[b, t, n, d]`.
      weights: bf16 or fp32 `[b, t, n]`.
      keys: bf16 `[p, page_size, d]`.
      page_table: int32 `[b, m]`.
      query_start: int32 `[b]`.
      scale: factor on the sum.

    Returns:
      float32 `[b, t, m * page_size]`; -inf after a query's own position.

    Raises:
      NotImplementedError: dtypes or sizes this kernel is not made for (it does not look at the device).
    """
    return _dispatch(q, weights, keys, page_table, query_start, scale=scale, fill=True)


def indexer_scores_unfilled(
    q: jax.Array, weights: jax.Array, keys: jax.Array, page_table: jax.Array, query_start: jax.Array, *, scale: float
) -> jax.Array:
    """`indexer_scores` for a caller that reads only positions up to each query's own; the others are undefined.

    Worth it where the page table reaches far beyond the queries: nothing is written there.
    """
    return _dispatch(q, weights, keys, page_table, query_start, scale=scale, fill=False)


def _dispatch(q, weights, keys, page_table, query_start, *, scale, fill):
    _, queries, heads, dim = q.shape
    page_size = keys.shape[1]
    length = page_table.shape[1] * page_size
    if q.dtype != jnp.bfloat16 or keys.dtype != jnp.bfloat16 or weights.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"takes bf16 queries and keys, not {q.dtype} and {keys.dtype}, gates {weights.dtype}")
    if not 8 <= heads <= 64 or not 32 <= dim <= 128 or dim % 16:
        raise NotImplementedError(f"takes 8 to 64 heads of 32 to 128 elements (a multiple of 16), not {heads} of {dim}")
    if length % _ROWS or (page_size % _ROWS and _ROWS % page_size) or page_size % 8:
        raise NotImplementedError(
            f"takes pages that divide 64 or are multiples of it, and whole tiles, not {page_size}"
        )
    run = _decode_scores if queries == 1 and heads % 8 == 0 else _prefill_scores
    return run(
        q, weights, keys, page_table.astype(jnp.int32), query_start.astype(jnp.int32), scale=float(scale), fill=fill
    )


def _cdiv(a, b):
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class _Config:
    groups: int  # consumer warpgroups
    tiles: int  # 64-key tiles of one step
    stages: int  # steps of keys in shared memory
    depth: int  # products in flight in a warpgroup


def _choose(heads: int, dim: int, length: int) -> _Config:
    depth = 2 if heads <= 16 else 1
    for groups, tiles, stages in ((2, 4, 3), (2, 4, 2), (2, 2, 4), (2, 2, 2), (2, 1, 4), (1, 2, 2), (1, 1, 2)):
        step = tiles * _ROWS
        shared = groups * heads * _WIDTH * dim * 2 + stages * step * dim * 2 + (2 * groups + 1) * _WIDTH * step * 4
        if length % step == 0 and shared <= _SHARED_BYTES:
            return _Config(groups, tiles, stages, depth)
    raise NotImplementedError(f"{heads} heads of {dim} do not fit shared memory")


@functools.partial(jax.jit, static_argnames=("scale", "fill"))
def _prefill_scores(q, weights, keys, page_table, query_start, *, scale, fill):
    batch, queries, heads, dim = q.shape
    _, page_size, _ = keys.shape
    length = page_table.shape[1] * page_size
    c = _choose(heads, dim, length)
    staged = queries % 8 == 0
    q = jnp.pad(
        q, ((0, 0), (0, -queries % 8), (0, 0), (0, 0))
    )  # TMA wants whole groups of 8; gates and stores are clipped
    step = c.tiles * _ROWS
    steps = length // step
    most_heads = _COLUMNS // _WIDTH
    head_parts = [(h, min(most_heads, heads - h)) for h in range(0, heads, most_heads)]
    block = c.groups * _WIDTH
    blocks = _cdiv(queries, block)
    swizzle = plgpu.find_swizzle(dim * 16)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    copy_rows = min(page_size, step)
    copies = step // copy_rows
    int32 = jnp.int32

    def kernel(
        q_ref,
        weights_ref,
        keys_ref,
        table_ref,
        start_ref,
        out_ref,
        q_smem,
        k_smem,
        stage_smem,
        inf_smem,
        q_barrier,
        full,
        empty,
    ):
        cta = lax.axis_index("cta")
        wg = lax.axis_index("wg")

        def reach(b):
            """Steps that some query of sequence b sees."""
            return jnp.clip((start_ref[b] + (queries + step - 1)) // step, 0, steps)

        def segments(body, steps_of):
            """Calls body(sequence, block, first step, end, carry) for each block this CTA has a part of."""
            total = lax.fori_loop(0, batch, lambda b, n: n + steps_of(b), int32(0)) * blocks
            share, rest = total // _CTAS, lax.rem(total, int32(_CTAS))
            first = cta * share + jnp.minimum(cta, rest)
            end = first + share + (cta < rest).astype(int32)

            def sequence(b, carry):
                origin, done = carry
                count = steps_of(b)
                own_first, own_end = (
                    jnp.clip(first - origin, 0, blocks * count),
                    jnp.clip(end - origin, 0, blocks * count),
                )
                divisor = jnp.maximum(count, 1)
                block_first, block_end = own_first // divisor, (own_end + divisor - 1) // divisor

                def one(i, done):
                    lo = jnp.maximum(own_first - i * count, 0)
                    hi = jnp.minimum(own_end - i * count, count)
                    return body(b, i, lo, hi, done)

                return origin + blocks * count, lax.fori_loop(
                    block_first, jnp.where(own_end > own_first, block_end, block_first), one, done
                )

            lax.fori_loop(0, batch, sequence, (int32(0), int32(0)))

        def seen_steps(b, i):
            """Steps that some query of block i sees."""
            return jnp.clip((start_ref[b] + jnp.minimum((i + 1) * block, queries) + (step - 1)) // step, 0, steps)

        @pl.when(wg == c.groups)
        def _producer():
            if c.groups == 2:
                plgpu.set_max_registers(40, action="decrease")

            def load_segment(b, i, lo, hi, done):
                hi = jnp.maximum(jnp.minimum(hi, seen_steps(b, i)), lo)

                def addresses(s):
                    return tuple(table_ref[b, (s * step + i * copy_rows) // page_size] for i in range(copies))

                def load(s, pages):
                    at = done + s - lo
                    slot = lax.rem(at, int32(c.stages))
                    following = addresses(jnp.minimum(s + 1, hi - 1))

                    @pl.when(at >= c.stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    for i, page in enumerate(pages):
                        row = lax.rem(s * step + i * copy_rows, int32(page_size)) if page_size > copy_rows else 0
                        plgpu.copy_gmem_to_smem(
                            keys_ref.at[page, pl.ds(row, copy_rows)],
                            k_smem.at[slot, pl.ds(i * copy_rows, copy_rows)],
                            full.at[slot],
                        )
                    return following

                lax.fori_loop(lo, hi, load, addresses(jnp.minimum(lo, steps - 1)))
                return done + hi - lo

            segments(load_segment, reach)
            if fill:
                inf_smem[...] = jnp.full(inf_smem.shape, -jnp.inf, jnp.float32)
                plgpu.commit_smem()

                def fill_steps(b, i, lo, hi):
                    def fill_step(s, _):
                        for j in range(block // _WIDTH):
                            plgpu.copy_smem_to_gmem(
                                inf_smem, out_ref.at[b, pl.ds(i * block + j * _WIDTH, _WIDTH), pl.ds(s * step, step)]
                            )

                    lax.fori_loop(lo, hi, fill_step, None)

                def fill_near(b, i, lo, hi, done):
                    fill_steps(b, i, jnp.maximum(lo, seen_steps(b, i)), hi)
                    return done

                def fill_far(b, i, lo, hi, done):
                    fill_steps(b, i, lo + reach(b), hi + reach(b))
                    return done

                segments(fill_near, reach)
                segments(fill_far, lambda b: steps - reach(b))
                plgpu.wait_smem_to_gmem(0)

        @pl.when(wg < c.groups)
        def _consumer():
            if c.groups == 2:
                plgpu.set_max_registers(232, action="increase")

            def score_segment(b, i, lo, hi, done):
                hi = jnp.maximum(jnp.minimum(hi, seen_steps(b, i)), lo)
                first_query = i * block + wg * _WIDTH
                first_position = start_ref[b] + first_query
                _sync_warpgroup()  # no warp may still be reading the last segment's queries
                for h in range(heads):
                    plgpu.copy_gmem_to_smem(
                        q_ref.at[b, pl.ds(first_query, _WIDTH), h],
                        q_smem.at[wg, pl.ds(h * _WIDTH, _WIDTH)],
                        q_barrier.at[wg],
                    )
                gates = [_load_gates(weights_ref.at[b], first_query, *part, _WIDTH, scale) for part in head_parts]
                plgpu.barrier_wait(q_barrier.at[wg])

                def score(s, _, *, masked):
                    at = done + s - lo
                    slot = lax.rem(at, int32(c.stages))
                    out_slot = lax.rem(at, int32(2))
                    plgpu.barrier_wait(full.at[slot])
                    work = [(tile, part) for tile in range(c.tiles) for part in range(len(head_parts))]
                    running = []
                    sums = None

                    def finish_one(last):
                        nonlocal sums
                        (tile, part), dots = running.pop(0)
                        dots = _finish_dots(dots, len(running))
                        if last:
                            plgpu.barrier_arrive(empty.at[slot])
                        sums = _sum_heads(dots, gates[part], _WIDTH, sums if part else None)
                        if part == len(head_parts) - 1:
                            first_key = s * step + tile * _ROWS
                            if staged:
                                if tile == 0:
                                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                                _stage(
                                    stage_smem.at[wg, out_slot], sums, tile, first_key, first_position, masked=masked
                                )
                            else:
                                _store(out_ref.at[b], sums, first_query, first_key, first_position, masked=masked)

                    for item in work:
                        tile, part = item
                        head, count = head_parts[part]
                        dots = _start_dots(
                            k_smem.at[slot, pl.ds(tile * _ROWS, _ROWS)],
                            q_smem.at[wg, pl.ds(head * _WIDTH, count * _WIDTH)],
                            transforms,
                            count * _WIDTH,
                            swizzle,
                        )
                        running.append((item, dots))
                        if len(running) == c.depth:
                            finish_one(last=item == work[-1] and len(running) == 1)
                    while running:
                        finish_one(last=len(running) == 1)
                    if staged:
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(
                            stage_smem.at[wg, out_slot],
                            out_ref.at[b, pl.ds(first_query, _WIDTH), pl.ds(s * step, step)],
                        )

                unmasked = jnp.clip((first_position + 1) // step, lo, hi)
                lax.fori_loop(lo, unmasked, functools.partial(score, masked=False), None)
                lax.fori_loop(unmasked, hi, functools.partial(score, masked=True), None)
                return done + hi - lo

            segments(score_segment, reach)
            if staged:
                plgpu.wait_smem_to_gmem(0)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, queries, length), jnp.float32),
        grid=(_CTAS,),
        grid_names=("cta",),
        num_threads=c.groups + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((c.groups, heads * _WIDTH, dim), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((c.stages, step, dim), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((c.groups, 2, _WIDTH, step), jnp.float32, transforms=_STAGE_TRANSFORMS),
            plgpu.SMEM((_WIDTH, step), jnp.float32),
            plgpu.Barrier(num_arrivals=heads, num_barriers=c.groups),
            plgpu.Barrier(num_arrivals=copies, num_barriers=c.stages),
            plgpu.Barrier(num_arrivals=c.groups, num_barriers=c.stages),
        ],
    )
    return call(q, weights, keys, page_table, query_start)


@functools.partial(jax.jit, static_argnames=("scale", "fill"))
def _decode_scores(q, weights, keys, page_table, query_start, *, scale, fill):
    batch, _, heads, dim = q.shape
    _, page_size, _ = keys.shape
    length = page_table.shape[1] * page_size
    groups = 2 if length % (2 * _ROWS) == 0 else 1
    step = groups * _ROWS
    stages = 128 * 1024 // (step * dim * 2)
    steps = length // step
    swizzle = plgpu.find_swizzle(dim * 16)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    copy_rows = min(page_size, step)
    copies = step // copy_rows
    int32 = jnp.int32

    def kernel(
        q_ref, gates_ref, keys_ref, table_ref, start_ref, out_ref, q_smem, k_smem, inf_smem, q_barrier, full, empty
    ):
        cta = lax.axis_index("cta")
        wg = lax.axis_index("wg")

        def reach(b):
            return jnp.clip((start_ref[b] + step) // step, 0, steps)

        def segments(body, steps_of):
            total = lax.fori_loop(0, batch, lambda b, n: n + steps_of(b), int32(0))
            share, rest = total // _CTAS, lax.rem(total, int32(_CTAS))
            first = cta * share + jnp.minimum(cta, rest)
            end = first + share + (cta < rest).astype(int32)

            def sequence(b, carry):
                origin, done = carry
                count = steps_of(b)
                lo, hi = jnp.clip(first - origin, 0, count), jnp.clip(end - origin, 0, count)
                pl.when(hi > lo)(lambda: body(b, lo, hi, done))
                return origin + count, done + hi - lo

            lax.fori_loop(0, batch, sequence, (int32(0), int32(0)))

        @pl.when(wg == groups)
        def _producer():
            plgpu.set_max_registers(40, action="decrease")

            lanes = min(copies, 4)  # warps that copy
            turns = copies // lanes

            def load_pages(warp):
                def load_segment(b, lo, hi, done):
                    def addresses(s):
                        return tuple(
                            table_ref[b, (s * step + (j * lanes + warp) * copy_rows) // page_size] for j in range(turns)
                        )

                    def load(s, pages):
                        at = done + s - lo
                        slot = lax.rem(at, int32(stages))
                        following = addresses(jnp.minimum(s + 1, hi - 1))

                        @pl.when(at >= stages)
                        def _():
                            plgpu.barrier_wait(empty.at[slot])

                        for j, page in enumerate(pages):
                            first = (j * lanes + warp) * copy_rows
                            row = lax.rem(s * step + first, int32(page_size)) if page_size > copy_rows else 0
                            plgpu.copy_gmem_to_smem(
                                keys_ref.at[page, pl.ds(row, copy_rows)],
                                k_smem.at[slot, pl.ds(first, copy_rows)],
                                full.at[slot],
                            )
                        return following

                    lax.fori_loop(lo, hi, load, addresses(lo))

                pl.when(warp < lanes)(lambda: segments(load_segment, reach))

            plgpu.warp_map(load_pages)
            if fill:
                inf_smem[...] = jnp.full(inf_smem.shape, -jnp.inf, jnp.float32)
                plgpu.commit_smem()

                def fill_segment(b, lo, hi, done):
                    first = reach(b)
                    lax.fori_loop(
                        first + lo,
                        first + hi,
                        lambda s, _: plgpu.copy_smem_to_gmem(
                            inf_smem.at[pl.ds(0, step)], out_ref.at[b, 0, pl.ds(s * step, step)]
                        ),
                        None,
                    )

                segments(fill_segment, lambda b: steps - reach(b))
                plgpu.wait_smem_to_gmem(0)

        @pl.when(wg < groups)
        def _consumer():
            def score_segment(b, lo, hi, done):
                _sync_warpgroup()
                plgpu.copy_gmem_to_smem(q_ref.at[b, 0], q_smem.at[wg], q_barrier.at[wg])
                gates = _load_row(gates_ref.at[b, 0], heads, scale)
                plgpu.barrier_wait(q_barrier.at[wg])
                position = start_ref[b]

                def score(s, _, *, masked):
                    slot = lax.rem(done + s - lo, int32(stages))
                    plgpu.barrier_wait(full.at[slot])
                    dots = _start_dots(
                        k_smem.at[slot, pl.ds(wg * _ROWS, _ROWS)], q_smem.at[wg], transforms, heads, swizzle
                    )
                    dots = _finish_dots(dots, 0)
                    plgpu.barrier_arrive(empty.at[slot])
                    _store_row(
                        out_ref.at[b, 0],
                        _sum_heads_in_quad(dots, gates),
                        s * step + wg * _ROWS,
                        position,
                        masked=masked,
                    )

                unmasked = jnp.clip((position + 1) // step, lo, hi)
                lax.fori_loop(lo, unmasked, functools.partial(score, masked=False), None)
                lax.fori_loop(unmasked, hi, functools.partial(score, masked=True), None)

            segments(score_segment, reach)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, 1, length), jnp.float32),
        grid=(_CTAS,),
        grid_names=("cta",),
        num_threads=groups + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((groups, heads, dim), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((stages, step, dim), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((2 * _ROWS,), jnp.float32),
            plgpu.Barrier(num_barriers=groups),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        ],
    )
    return call(q, weights, keys, page_table, query_start)


def _const(value, bits=32):
    return arith.constant(ir.IntegerType.get_signless(bits), value)


def _scalars(array):
    """The f32 scalars a thread holds, in wgmma's order: 8-column group, row half, pair."""
    return [
        vector.extract(r, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))
        for r in array.registers.flat
    ]


def _fragment(scalars, columns):
    layout = _FRAGMENT.to_mgpu()
    one = ir.VectorType.get((1,), ir.F32Type.get())
    registers = np.empty(len(scalars), dtype=object)
    registers[:] = [vector.broadcast(one, s) for s in scalars]
    registers = registers.reshape(layout.registers_shape((_ROWS, columns)))
    return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _asm(results, operands, text, constraints):
    """Volatile inline PTX with `results` f32 outputs."""
    f32 = ir.F32Type.get()
    struct = llvm.StructType.get_literal([f32] * results)
    out = llvm.inline_asm(struct, operands, text, constraints, asm_dialect=0, has_side_effects=True)
    return [llvm.extractvalue(f32, out, [i]) for i in range(results)]


def _position():
    """This thread's first row and first column in the wgmma accumulator, as i32 values."""
    thread = arith.remui(utils.thread_idx(), _const(128))
    lane = arith.remui(thread, _const(32))
    warp = arith.divui(thread, _const(32))
    row = arith.addi(arith.muli(warp, _const(16)), arith.divui(lane, _const(4)))
    column = arith.muli(arith.remui(lane, _const(4)), _const(2))
    return row, column


def _start_dots(keys, queries, transforms, columns, swizzle):
    """Starts keys[64, d] @ queries[columns, d].T; the result may be used after `_finish_dots`."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms),) * 2,
        return_type=plgpu.ShapeDtypeStruct((_ROWS, columns), jnp.float32, _FRAGMENT),
    )
    def start(ctx, keys, queries):
        del ctx
        queries = utils.memref_transpose(queries, (1, 0, 3, 2))
        k_group = swizzle // 2
        (a, (_, a_step)), (_, a_group), _ = mma_utils.create_descriptor(
            keys, swizzle=swizzle, large_tile=(_ROWS, k_group), group_size=(_ROWS, k_group), logical_k_major=False
        )
        (b, (_, b_step)), (_, b_group), _ = mma_utils.create_descriptor(
            queries, swizzle=swizzle, large_tile=(k_group, k_group), group_size=(k_group, columns), logical_k_major=True
        )
        count = columns // 2
        k_groups = ir.MemRefType(keys.type).shape[1]
        result = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
        operands, lines = [], []
        for group in range(k_groups):
            for i in range(k_group // 16):
                at = count + len(operands)
                for base, step, stride in ((a, a_step, a_group), (b, b_step, b_group)):
                    offset = group * stride + i * step[0]
                    operands.append(arith.addi(base, _const(offset >> 4, 64)) if offset else base)
                lines.append(
                    f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {result}, ${at}, ${at + 1}, "
                    f"{'p' if len(lines) else 'q'}, 1, 1, 0, 0;"
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
        return _fragment(_asm(count, operands, text, constraints), columns)

    return start(keys, queries)


def _finish_dots(dots, in_flight):
    """`dots`, ready once no more than `in_flight` later products are running."""

    @plgpu.inline_mgpu(arg_types=(_FRAGMENT,), return_type=plgpu.ShapeDtypeStruct(dots.shape, jnp.float32, _FRAGMENT))
    def finish(ctx, dots):
        del ctx
        values = _scalars(dots)
        constraints = ",".join(["=f"] * len(values) + [str(i) for i in range(len(values))])
        text = f"wgmma.wait_group.sync.aligned {in_flight};"
        return _fragment(_asm(len(values), values, text, constraints), dots.shape[1])

    return finish(dots)


def _sync_warpgroup():
    @plgpu.inline_mgpu()
    def sync(ctx):
        del ctx
        utils.warpgroup_barrier()

    sync()


def _load_gates(weights, first_query, first_head, heads, width, scale):
    """scale * weights[queries, heads] of a block as a [64, heads * width] fragment with equal rows."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _SPLAT),
        return_type=plgpu.ShapeDtypeStruct((_ROWS, heads * width), jnp.float32, _FRAGMENT),
    )
    def load(ctx, weights, first_query):
        del ctx
        f32, kind = ir.F32Type.get(), ir.MemRefType(weights.type).element_type
        queries, all_heads = ir.MemRefType(weights.type).shape
        _, column = _position()
        values, factor = [], arith.constant(f32, scale)
        for head in range(first_head, first_head + heads):
            for group in range(width // 8):
                pair = []
                for i in range(2):
                    query = arith.addi(first_query.registers.item(), arith.addi(column, _const(8 * group + i)))
                    query = arith.minsi(query, _const(queries - 1))
                    at = arith.addi(arith.muli(query, _const(all_heads)), _const(head))
                    value = llvm.load(kind, utils.getelementptr(utils.memref_ptr(weights), [at], kind))
                    value = value if kind == f32 else arith.extf(f32, value)
                    pair.append(arith.mulf(value, factor))
                values += pair * 2
        return _fragment(values, heads * width)

    return load(weights, first_query)


def _sum_heads(dots, gates, width, before):
    """Sums gate * relu(dot) over heads: columns are [head, query], so every term of a sum is in the same thread."""
    has_before = before is not None

    @plgpu.inline_mgpu(
        arg_types=(_FRAGMENT,) * (2 + has_before),
        return_type=plgpu.ShapeDtypeStruct((_ROWS, width), jnp.float32, _FRAGMENT),
    )
    def head_sum(ctx, dots, gates, *before):
        del ctx
        dots, gates = _scalars(dots), _scalars(gates)
        each = width // 2
        zero = arith.constant(ir.F32Type.get(), 0.0)
        sums = _scalars(before[0]) if before else [None] * each
        for i, (dot, gate) in enumerate(zip(dots, gates, strict=True)):
            term = fragmented_array.mulf(arith.maximumf(dot, zero), gate)
            sums[i % each] = term if sums[i % each] is None else fragmented_array.addf(sums[i % each], term)
        return _fragment(sums, width)

    return head_sum(dots, gates, *((before,) if has_before else ()))


def _store(out, scores, first_query, first_key, first_position, *, masked):
    """Writes scores[64 keys, queries] to out[queries, keys] in GMEM, rows beyond its end left out."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _FRAGMENT) + (_SPLAT,) * 3)
    def store(ctx, out, scores, first_query, first_key, first_position):
        del ctx
        i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
        first_query, first_key, first_position = (v.registers.item() for v in (first_query, first_key, first_position))
        queries, length = ir.MemRefType(out.type).shape
        row, column = _position()
        key = arith.addi(first_key, row)

        def wide(v):
            return arith.extui(i64, v)

        base = llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(out))
        lane_offset = arith.addi(arith.muli(wide(arith.addi(first_query, column)), _const(length, 64)), wide(row))
        pointer = utils.getelementptr(utils.getelementptr(base, [lane_offset], f32), [wide(first_key)], f32)
        infinity = arith.constant(f32, float("-inf"))
        # last visible key of this thread's first query, relative to its first key
        reach = arith.subi(arith.addi(first_position, column), key) if masked else None
        room = arith.subi(_const(queries), arith.addi(first_query, column))
        for i, value in enumerate(_scalars(scores)):
            group, half, pair = i // 4, i // 2 % 2, i % 2
            if masked:
                visible = arith.cmpi(arith.CmpIPredicate.sge, reach, _const(8 * half - 8 * group - pair))
                value = arith.select(visible, value, infinity)
            offset = ((8 * group + pair) * length + 8 * half) * 4
            inside = arith.extui(
                ir.IntegerType.get_signless(32),
                arith.cmpi(arith.CmpIPredicate.sgt, room, _const(8 * group + pair)),
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


def _stage(stage, scores, tile, first_key, first_position, *, masked):
    """Writes scores[64 keys, queries] to stage[queries, keys], tiled (8, 32) and swizzled for the copy engine."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(_STAGE_TRANSFORMS), _FRAGMENT) + (_SPLAT,) * 2)
    def store(ctx, stage, scores, first_key, first_position):
        del ctx
        f32 = ir.F32Type.get()
        first_key, first_position = (v.registers.item() for v in (first_key, first_position))
        _, key_tiles, _, _ = ir.MemRefType(stage.type).shape
        row, column = _position()
        base = utils.memref_ptr(stage)
        infinity = arith.constant(f32, float("-inf"))
        reach = arith.subi(arith.addi(first_position, column), arith.addi(first_key, row)) if masked else None
        # 16-byte chunk c of the 128-byte row of query q lies at chunk c ^ q
        chunk = arith.divui(arith.remui(row, _const(32)), _const(4))
        start = arith.addi(
            arith.muli(arith.divui(row, _const(32)), _const(256)),
            arith.addi(arith.muli(column, _const(32)), arith.remui(row, _const(4))),
        )
        for i, value in enumerate(_scalars(scores)):
            group, half, pair = i // 4, i // 2 % 2, i % 2
            if masked:
                visible = arith.cmpi(arith.CmpIPredicate.sge, reach, _const(8 * half - 8 * group - pair))
                value = arith.select(visible, value, infinity)
            place = arith.xori(arith.xori(chunk, column), _const(2 * half + pair))
            at = arith.addi(
                arith.addi(start, arith.muli(place, _const(4))),
                _const((group * key_tiles + tile * 2) * 256 + 32 * pair),
            )
            llvm.store(value, utils.getelementptr(base, [at], f32))

    store(stage, scores, first_key, first_position)


def _load_row(weights, heads, scale):
    """scale * weights[heads] as a [64, heads] fragment with equal rows."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((_ROWS, heads), jnp.float32, _FRAGMENT)
    )
    def load(ctx, weights):
        del ctx
        f32, kind = ir.F32Type.get(), ir.MemRefType(weights.type).element_type
        _, column = _position()
        base = utils.getelementptr(utils.memref_ptr(weights), [column], kind)
        values, factor = [], arith.constant(f32, scale)
        for group in range(heads // 8):
            pair = [llvm.load(kind, utils.getelementptr(base, [8 * group + i], kind)) for i in range(2)]
            values += [arith.mulf(v if kind == f32 else arith.extf(f32, v), factor) for v in pair] * 2
        return _fragment(values, heads)

    return load(weights)


def _sum_heads_in_quad(dots, gates):
    """Sums gate * relu(dot) over all columns: every lane of a quad ends with the quad's row sums."""

    @plgpu.inline_mgpu(
        arg_types=(_FRAGMENT,) * 2, return_type=plgpu.ShapeDtypeStruct((_ROWS, 8), jnp.float32, _FRAGMENT)
    )
    def head_sum(ctx, dots, gates):
        del ctx
        zero = arith.constant(ir.F32Type.get(), 0.0)
        sums = [None, None]
        for i, (dot, gate) in enumerate(zip(_scalars(dots), _scalars(gates), strict=True)):
            half = i // 2 % 2
            term = fragmented_array.mulf(arith.maximumf(dot, zero), gate)
            sums[half] = term if sums[half] is None else fragmented_array.addf(sums[half], term)
        for distance in (1, 2):
            sums = [arith.addf(x, utils.shfl_bfly(x, distance)) for x in sums]
        return _fragment([sums[0], sums[0], sums[1], sums[1]], 8)

    return head_sum(dots, gates)


def _store_row(out, scores, first_key, position, *, masked):
    """Writes one query's scores[64 keys] to out[keys]; lanes 0 and 1 of a quad write one row each."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _FRAGMENT) + (_SPLAT,) * 2)
    def store(ctx, out, scores, first_key, position):
        del ctx
        i32, i64, f32 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64), ir.F32Type.get()
        row, column = _position()
        upper = arith.cmpi(arith.CmpIPredicate.ne, column, _const(0))
        values = _scalars(scores)
        value = arith.select(upper, values[2], values[0])
        key = arith.addi(first_key.registers.item(), arith.addi(row, arith.select(upper, _const(8), _const(0))))
        if masked:
            visible = arith.cmpi(arith.CmpIPredicate.sle, key, position.registers.item())
            value = arith.select(visible, value, arith.constant(f32, float("-inf")))
        base = llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(out))
        writes = arith.extui(i32, arith.cmpi(arith.CmpIPredicate.sle, column, _const(2)))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [utils.getelementptr(base, [arith.extui(i64, key)], f32), value, writes],
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0], $1; }",
            "l,f,r",
            has_side_effects=True,
            asm_dialect=0,
        )

    store(out, scores, first_key, position)
