"""Sparse attention for Hopper GPUs (Pallas Mosaic GPU): gathers the selected rows of keys and values into tiles.

Prefill (`union_attention`). The query heads that share a KV head fill only 8 of the 64 rows of a tensor-core tile, so
one query alone would waste most of the work and read all of its keys for itself. Sixteen neighbouring queries are
therefore handled together: they walk over the union of their keys, and a word per key says which of the 16 selected it.
One thread block (CTA) handles one (group, KV head): 16 queries x 8 heads = 128 rows, two compute warpgroups of 64 rows.
A third warpgroup, the producer, copies the listed rows of the pool into shared memory, 64 keys and values at a time, in
the swizzled form the tensor cores read: 16 threads copy one key (256 bytes), each 16 bytes with cp.async, and a barrier
per stage counts the arrivals of those copies. The compute warpgroups do S = Q K^T, mask, online softmax over 128 keys
at a time, and O += P V; the softmax of one runs while the matmuls of the other do. The mask is a matmul too, which
costs the softmax nothing: the producer writes a [64 keys, 16 queries] block of zeros (members) and -1e30 beside the
keys, and its product with a row of zeros and a one that picks the query is added to S.

Decode (`sparse_attention`). The same kernel with one query a group, 8 of 64 rows used (the work is bound by memory),
and the keys of a query split over several CTAs; their partial results are combined by log-sum-exp.

Copies of 16 bytes into chosen addresses and arrivals on their completion have no Pallas operation; `_gather_tile` and
the five functions before it are the only parts that write instructions themselves.
"""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from pallas_kernels import paging

GROUP = 16
"""Neighbouring queries that share a list of keys in `union_attention`."""

_DIM = 128
_TILE = 64  # keys of one stage
_ROWS = 64  # rows of one compute warpgroup: the M of a warpgroup matmul
_MASKED = 0xF149  # -1e30 in bfloat16
_LOG2E = math.log2(math.e)
_SM_COUNT = 132
_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_MASK_TRANSFORMS = (plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(32))
_IDS = plgpu.Layout.WG_STRIDED((8 * 128,), vec_size=4)
_WORDS = plgpu.Layout.WG_STRIDED((128,), vec_size=1)
_SCALAR = plgpu.Layout.WG_SPLAT
_REF = plgpu.RefType()


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning of the kernel.

    Attributes:
      tiles: tiles of 64 keys in one step of the softmax: 1 or 2.
      stages: tiles of keys and values in shared memory (34 KB each), at least `tiles + 1`.
      producer_registers: registers of a producer thread; with 40 it may spill, which costs half of the speed.
    """

    tiles: int = 2
    stages: int = 5
    producer_registers: int = 56


def union_attention(
    q: jax.Array,
    kv: jax.Array,
    slots: jax.Array,
    members: jax.Array,
    counts: jax.Array,
    *,
    scale: float,
    config: Config = Config(),
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of groups of 16 neighbouring queries over the union of their selected keys.

    Args:
      q: bfloat16 `[t, n, 128]`; queries `16 * g` to `16 * g + 15` are group g, the last group may be short.
      kv: bfloat16 `[p, page_size, 2 * k, 128]` pages; a row holds the keys of all k heads, then their values.
        n / k is at most 64.
      slots: int32 `[ceil(t / 16), u]` rows of the flattened pages; an entry below 0 is no key.
        Best u is a multiple of 128: others cost a copy.
      members: int32 `[ceil(t / 16), u]`: bit i is set if query i of the group attends to this key.
      counts: int32 `[ceil(t / 16)]` entries in use; what lies behind them is not read.
      scale: factor on the dot products, above 0.
      config: tuning.

    Returns:
      bfloat16 `[t, n, 128]` and the log-sum-exp of the scaled dot products, float32 `[t, n]`. A query without keys gets
      zeros and -inf.
    """
    queries, heads, _ = q.shape
    kv_heads = _check(q, kv, scale)
    groups = -(-queries // GROUP)
    if slots.shape != members.shape or slots.shape[0] != groups or counts.shape != (groups,):
        raise ValueError(f"{slots.shape=}, {members.shape=}, {counts.shape=} do not fit {groups} groups")
    share = heads // kv_heads
    packed = q.reshape(queries, kv_heads, share, _DIM) if share in (8, 16, 32, 64) else _pack(q, kv_heads)
    padding = ((0, 0), (0, -slots.shape[1] % (config.tiles * _TILE)))
    slots, members = jnp.pad(slots, padding), jnp.pad(members, padding)
    out, lse = _attend(
        packed, kv, slots, members, counts, share=share, group=GROUP, splits=1, scale=scale, config=config
    )
    if packed.shape[2] != share:
        out, lse = (_unpack(x, queries, share) for x in (out, lse))
    return out.reshape(q.shape), lse.reshape(queries, heads)


def sparse_attention(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    page_table: jax.Array,
    *,
    scale: float,
    splits: int | None = None,
    config: Config = Config(tiles=1, stages=3),
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the selected positions, one query at a time: for decode, and where queries share no keys.

    Args:
      q: bfloat16 `[b, t, n, 128]`.
      kv: bfloat16 `[p, page_size, 2 * k, 128]` pages; a row holds the keys of all k heads, then their values.
        n / k is at most 64.
      indices: int32 `[b, t, top_k]` positions each query attends to, all its heads alike; -1 is ignored.
      page_table: int32 `[b, m]`.
      scale: factor on the dot products, above 0.
      splits: CTAs that share the keys of one query and KV head; None chooses.
      config: tuning.

    Returns:
      bfloat16 `[b, t, n, 128]`, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`. A query with no
      selected position gets zeros and -inf.
    """
    batch, length, heads, _ = q.shape
    kv_heads = _check(q, kv, scale)
    queries, share = batch * length, heads // kv_heads
    rows = next(r for r in (8, 16, 32, 64) if r >= share)
    slots = jnp.where(indices >= 0, paging.slots(page_table, jnp.maximum(indices, 0), kv.shape[1]), -1)
    slots = slots.reshape(queries, -1)
    slots = jnp.pad(slots, ((0, 0), (0, -slots.shape[1] % (config.tiles * _TILE))), constant_values=-1)
    packed = jnp.pad(q.reshape(queries, kv_heads, share, _DIM), ((0, 0), (0, 0), (0, rows - share), (0, 0)))
    if splits is None:
        splits = max(1, min(slots.shape[1] // (2 * _TILE), 2 * _SM_COUNT // (queries * kv_heads)))
    out, lse = _attend(
        packed,
        kv,
        slots,
        (slots >= 0).astype(jnp.int32),
        jnp.full((queries,), slots.shape[1], jnp.int32),
        share=share,
        group=1,
        splits=splits,
        scale=scale,
        config=config,
    )
    if splits > 1:
        highest = jnp.max(lse, axis=0)
        weights = jnp.exp(lse - jnp.where(jnp.isfinite(highest), highest, 0.0))
        total = jnp.sum(weights, axis=0)
        out = jnp.sum(out * weights[..., None], axis=0) / jnp.where(total > 0, total, 1.0)[..., None]
        out, lse = out.astype(q.dtype), highest + jnp.log(total)
    return out[:, :, :share].reshape(q.shape), lse[:, :, :share].reshape(q.shape[:3])


def _check(q: jax.Array, kv: jax.Array, scale: float) -> int:
    """Returns the number of KV heads, or refuses."""
    heads, dim = q.shape[-2:]
    kv_heads = kv.shape[2] // 2
    if dim != _DIM or kv.shape[3] != _DIM:
        raise NotImplementedError(f"head_dim must be {_DIM}, not {dim}")
    if q.dtype != jnp.bfloat16 or kv.dtype != jnp.bfloat16:
        raise NotImplementedError(f"only bfloat16, not {q.dtype} and {kv.dtype}")
    if heads % kv_heads or heads // kv_heads > _ROWS:
        raise NotImplementedError(f"{heads} query heads on {kv_heads} KV heads")
    if not scale > 0:
        raise NotImplementedError("scale must be above 0")
    return kv_heads


def _pack(q: jax.Array, kv_heads: int) -> jax.Array:
    """`[t, n, d]` to blocks of 64 rows `[groups * blocks, k, 64, d]`, the rows of a group ordered by (query, head)."""
    queries, heads, dim = q.shape
    share = heads // kv_heads
    q = jnp.pad(q, ((0, -queries % GROUP), (0, 0), (0, 0)))
    q = q.reshape(-1, GROUP, kv_heads, share, dim).swapaxes(1, 2).reshape(-1, kv_heads, GROUP * share, dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -q.shape[2] % _ROWS), (0, 0)))
    return q.reshape(q.shape[0], kv_heads, -1, _ROWS, dim).swapaxes(1, 2).reshape(-1, kv_heads, _ROWS, dim)


def _unpack(x: jax.Array, queries: int, share: int) -> jax.Array:
    """Undoes `_pack`: `[groups * blocks, k, 64, ...]` to `[t, k, share, ...]`."""
    blocks = -(-GROUP * share // _ROWS)
    kv_heads, tail = x.shape[1], x.shape[3:]
    x = x.reshape(-1, blocks, kv_heads, _ROWS, *tail).swapaxes(1, 2).reshape(-1, kv_heads, blocks * _ROWS, *tail)
    x = x[:, :, : GROUP * share].reshape(-1, kv_heads, GROUP, share, *tail).swapaxes(1, 2)
    return x.reshape(-1, kv_heads, share, *tail)[:queries]


@functools.partial(jax.jit, static_argnames=("share", "group", "splits", "scale", "config"))
def _attend(
    q: jax.Array,
    kv: jax.Array,
    slots: jax.Array,
    members: jax.Array,
    counts: jax.Array,
    *,
    share: int,
    group: int,
    splits: int,
    scale: float,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    """The kernel.

    Args:
      q: bfloat16 `[t, k, r, 128]`, r in 8, 16, 32, 64: pieces of r rows.
      kv: bfloat16 `[p, page_size, 2 * k, 128]`.
      slots, members: int32 `[groups, u]`.
      counts: int32 `[groups]`.
      share: rows that belong to one query: row i of a group takes bit i // share of the membership words.
      group: queries of a group.
      splits: CTAs the keys are split over.

    Returns:
      `[t, k, r, 128]` in bfloat16 and float32 `[t, k, r]`; for splits above 1 both in float32 with a leading axis.
    """
    _, kv_heads, piece_rows, _ = q.shape
    groups = counts.shape[0]
    stages = config.stages
    group_pieces = -(-group * share // piece_rows)  # pieces of one group
    warpgroup_pieces = min(_ROWS // piece_rows, group_pieces)  # pieces of one warpgroup
    compute = 1 if group_pieces * piece_rows <= _ROWS else 2
    blocks = -(-group_pieces * piece_rows // (compute * _ROWS))  # CTAs the rows of a group are split over
    partial = splits > 1
    out_dtype = jnp.float32 if partial else q.dtype
    factor = scale * _LOG2E
    n = config.tiles
    rows_layout = plgpu.Layout.WGMMA.reduce(1)

    def body(q_ref, pool, slots_ref, members_ref, counts_ref, out_ref, lse_ref, scratch, barriers):
        q_smem, k_smem, v_smem, mask_smem, out_smem, lse_smem, full = scratch
        q_barrier, empty, start = barriers
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
        # Heads slowest: the CTAs that run at one time sweep the same slices of the pool and share them in the L2.
        head, cta = lax.div(cta, groups * blocks * splits), lax.rem(cta, groups * blocks * splits)
        split, cta = lax.rem(cta, splits), lax.div(cta, splits)
        block, group_index = lax.rem(cta, blocks), lax.div(cta, blocks)
        count = counts_ref[group_index]
        all_steps = lax.div(count + (n * _TILE - 1), n * _TILE)
        per_split = lax.div(all_steps + (splits - 1), splits)
        first = split * per_split
        steps = jnp.maximum(jnp.minimum(all_steps - first, per_split), 0)

        _init_barriers(full, stages)
        plgpu.barrier_arrive(start)
        plgpu.barrier_wait(start)

        @pl.when(warpgroup == compute)
        def _produce():
            if compute > 1:
                plgpu.set_max_registers(config.producer_registers, action="decrease")

            first_tile = first * n

            def read_lists(tile):
                tile = jnp.minimum(first_tile + tile, slots.shape[1] // _TILE - 1)
                return _read_lists(slots_ref, members_ref, group_index, tile, count)

            def produce(tile, lists):
                ids, words = lists
                stage = lax.rem(tile, stages)
                following = read_lists(tile + 1)

                @pl.when(tile >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[stage])

                _write_mask(words, mask_smem, full, stage)
                _gather_tile(pool, ids, k_smem, v_smem, full, head, first_tile + tile, stage, count)
                return following

            lax.fori_loop(0, steps * n, produce, read_lists(jnp.int32(0)))
            _finish_copies()

        @pl.when(warpgroup < compute)
        def _compute():
            if compute > 1:
                registers = (504 - config.producer_registers) // 2 // 8 * 8
                plgpu.set_max_registers(registers, action="increase")
            first_row = (block * compute + warpgroup) * _ROWS
            first_piece = group_index * group_pieces + lax.div(first_row, piece_rows)
            for i in range(warpgroup_pieces):
                plgpu.copy_gmem_to_smem(
                    q_ref.at[first_piece + i, head],
                    q_smem.at[warpgroup, pl.ds(i * piece_rows, piece_rows)],
                    q_barrier.at[warpgroup],
                )
            row = plgpu.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=rows_layout) + first_row
            column = plgpu.broadcasted_iota(jnp.int32, (_ROWS, GROUP), 1, layout=plgpu.Layout.WGMMA)
            query = lax.broadcast_in_dim(lax.div(row, share), column.shape, [0])
            selector = jnp.where(query == column, 1.0, 0.0).astype(q.dtype)
            plgpu.barrier_wait(q_barrier.at[warpgroup])
            q_registers = plgpu.load(q_smem.at[warpgroup], layout=plgpu.Layout.WGMMA)

            def tiles_and_stages(step):
                return [(step * n + i, lax.rem(step * n + i, stages)) for i in range(n)]

            def scores_of(step):
                def matmul(*s_refs):
                    for s_ref, (_, stage) in zip(s_refs, tiles_and_stages(step), strict=True):
                        plgpu.wgmma(s_ref, q_registers, k_smem.at[stage].transpose((1, 0)))
                        plgpu.wgmma(s_ref, selector, mask_smem.at[stage].transpose((1, 0)))
                    return tuple(s_ref[...] for s_ref in s_refs)

                return pl.run_scoped(matmul, *[plgpu.ACC((_ROWS, _TILE), jnp.float32)] * n)

            def softmax(scores, highest, total):
                # In units of log2, so that the exponent is one multiply-add; finite from the start, so without NaNs.
                new_highest = jnp.maximum(highest, functools.reduce(jnp.maximum, scores).max(axis=1) * factor)
                rescale = jnp.exp2(highest - new_highest)
                subtract = lax.broadcast_in_dim(new_highest, scores[0].shape, [0])
                ps = [jnp.exp2(s * factor - subtract) for s in scores]
                total = total * rescale + functools.reduce(jnp.add, ps).sum(axis=1)
                return ps, rescale, new_highest, total

            def attend(step, carry):
                acc, highest, total = carry
                for tile, stage in tiles_and_stages(step):
                    _wait_full(full, stage, lax.rem(lax.div(tile, stages), 2))
                ps, rescale, highest, total = softmax(scores_of(step), highest, total)
                acc *= lax.broadcast_in_dim(rescale, acc.shape, [0])

                def add_values(acc_ref):
                    for p, (_, stage) in zip(ps, tiles_and_stages(step), strict=True):
                        plgpu.wgmma(acc_ref, p.astype(q.dtype), v_smem.at[stage])

                acc = pl.run_state(add_values)(plgpu.ACC.init(acc))
                for _, stage in tiles_and_stages(step):
                    plgpu.barrier_arrive(empty.at[stage])
                return acc, highest, total

            acc = plgpu.layout_cast(jnp.zeros((_ROWS, _DIM), jnp.float32), plgpu.Layout.WGMMA)
            highest = plgpu.layout_cast(jnp.full((_ROWS,), -1e20, jnp.float32), rows_layout)
            total = plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), rows_layout)

            acc, highest, total = lax.fori_loop(0, steps, attend, (acc, highest, total))

            inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), 0.0)
            out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
            target = out_smem.at[warpgroup] if partial else q_smem.at[warpgroup]
            target[...] = out.astype(out_dtype)
            lse_smem[warpgroup] = jnp.where(total > 0, (highest + jnp.log2(total)) * (1 / _LOG2E), -jnp.inf)
            plgpu.commit_smem()
            for i in range(warpgroup_pieces):
                at = (first_piece + i, head)
                rows = pl.ds(i * piece_rows, piece_rows)
                plgpu.copy_smem_to_gmem(target.at[rows], out_ref.at[(split, *at) if partial else at])
                plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup, rows], lse_ref.at[(split, *at) if partial else at])
            plgpu.wait_smem_to_gmem(0)

    def entry(q_ref, pool, slots_ref, members_ref, counts_ref, out_ref, lse_ref):
        pl.run_scoped(
            lambda *scoped: body(q_ref, pool, slots_ref, members_ref, counts_ref, out_ref, lse_ref, *scoped),
            (
                plgpu.SMEM((compute, _ROWS, _DIM), q.dtype, transforms=_TRANSFORMS),
                plgpu.SMEM((stages, _TILE, _DIM), kv.dtype, transforms=_TRANSFORMS),
                plgpu.SMEM((stages, _TILE, _DIM), kv.dtype, transforms=_TRANSFORMS),
                plgpu.SMEM((stages, _TILE, GROUP), q.dtype, transforms=_MASK_TRANSFORMS),
                plgpu.SMEM(
                    (compute, _ROWS, _DIM),
                    jnp.float32,
                    transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
                )
                if partial
                else None,
                plgpu.SMEM((compute, _ROWS), jnp.float32),
                plgpu.SMEM((stages, 2), jnp.int32),  # the barriers of full stages, 8 bytes each
            ),
            (
                plgpu.Barrier(num_arrivals=warpgroup_pieces, num_barriers=compute),
                plgpu.Barrier(num_arrivals=compute, num_barriers=stages),
                plgpu.Barrier(num_arrivals=compute + 1),
            ),
            collective_axes="warpgroup",
        )

    lead = (splits,) if partial else ()
    return plgpu.kernel(
        entry,
        out_type=(
            jax.ShapeDtypeStruct((*lead, *q.shape), out_dtype),
            jax.ShapeDtypeStruct((*lead, *q.shape[:3]), jnp.float32),
        ),
        grid=(groups * blocks * splits * kv_heads,),
        grid_names=("cta",),
        num_threads=compute + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, kv.reshape(-1, 2 * kv_heads, _DIM), slots, members, counts)


def _const(value: int, bits: int = 32) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(bits), value)


def _at(pointer: ir.Value, offset: ir.Value) -> ir.Value:
    return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def _global(ref: ir.Value) -> ir.Value:
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(ref))


def _full_barrier(full: ir.Value, stage: ir.Value) -> ir.Value:
    return _at(utils.memref_ptr(full), arith.muli(stage, _const(8)))


def _init_barriers(full, stages: int) -> None:
    """Sets the barriers in `full` up for two arrivals of each producer thread: its part of the mask, its copies."""

    @plgpu.inline_mgpu(arg_types=(_REF,))
    def init(_, full):
        first = utils.single_thread_predicate(utils.ThreadSubset.BLOCK)
        for stage in range(stages):
            nvvm.mbarrier_init(_full_barrier(full, _const(stage)), _const(256), predicate=first)

    init(full)


def _wait_full(full, stage, parity) -> None:
    """Waits until the copies into a stage have arrived, and orders them before the tensor cores' reads."""

    @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR, _SCALAR))
    def wait(_, full, stage, parity):
        barrier = _full_barrier(full, stage.registers.item())
        nvvm.mbarrier_try_wait_parity(barrier, parity.registers.item(), _const(10_000_000))
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    wait(full, stage, parity)


def _finish_copies() -> None:
    """Waits for all copies of this thread, which must not end before them."""

    @plgpu.inline_mgpu()
    def finish(_):
        nvvm.cp_async_commit_group()
        nvvm.cp_async_wait_group(0)

    finish()


def _read_lists(slots, members, group, tile, count):
    """Reads row numbers (8 keys a thread) and membership words (a key for two threads) of a tile; 0 for no key."""

    @plgpu.inline_mgpu(
        arg_types=(_REF, _REF, _SCALAR, _SCALAR, _SCALAR),
        return_type=(
            plgpu.ShapeDtypeStruct((8 * 128,), jnp.int32, layout=_IDS),
            plgpu.ShapeDtypeStruct((128,), jnp.int32, layout=_WORDS),
        ),
    )
    def read(_, slots, members, group, tile, count):
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        group, tile, count = (x.registers.item() for x in (group, tile, count))
        per_group = ir.MemRefType(slots.type).shape[1]
        thread = arith.remui(utils.thread_idx(), _const(128))
        tile_start = arith.muli(tile, _const(_TILE))
        list_start = arith.addi(
            arith.muli(arith.extui(i64, group), _const(per_group, 64)), arith.extui(i64, tile_start)
        )

        def pointer(ref, key):
            return _at(_global(ref), arith.muli(arith.addi(list_start, arith.extui(i64, key)), _const(4, 64)))

        first_key = arith.muli(arith.divui(thread, _const(16)), _const(8))
        four, one = ir.VectorType.get((4,), i32), ir.VectorType.get((1,), i32)
        ids = [llvm.load(four, _at(pointer(slots, first_key), _const(16 * half)), alignment=16) for half in range(2)]
        key = arith.divui(thread, _const(2))
        word = llvm.load(i32, pointer(members, key), alignment=4)
        exists = arith.cmpi(arith.CmpIPredicate.sgt, count, arith.addi(tile_start, key))
        word = arith.select(exists, word, _const(0))
        word = vector.broadcast(one, word)
        return (
            fa.FragmentedArray(_registers=np.array(ids, dtype=object), _layout=_IDS.to_mgpu(), _is_signed=True),
            fa.FragmentedArray(_registers=np.array([word], dtype=object), _layout=_WORDS.to_mgpu(), _is_signed=True),
        )

    return read(slots, members, group, tile, count)


def _write_mask(words, mask_smem, full, stage) -> None:
    """Writes the addends `[64 keys, 16 queries]` of a tile, 0 for members and -1e30 for others; then arrives.

    Thread t writes queries 8 * (t % 2) to 8 * (t % 2) + 7 of key t // 2.
    """

    @plgpu.inline_mgpu(arg_types=(_WORDS, plgpu.RefType(_MASK_TRANSFORMS), _REF, _SCALAR))
    def write(_, words, mask_smem, full, stage):
        i32 = ir.IntegerType.get_signless(32)
        stage = stage.registers.item()
        thread = arith.remui(utils.thread_idx(), _const(128))
        key, half = arith.divui(thread, _const(2)), arith.remui(thread, _const(2))
        word = vector.extract(words.registers.item(), [], [0])
        word = arith.shrui(word, arith.muli(half, _const(8)))
        pairs = []
        for i in range(0, 8, 2):
            low, high = (
                arith.select(
                    arith.cmpi(arith.CmpIPredicate.eq, arith.andi(word, _const(1 << (i + j))), _const(0)),
                    _const(_MASKED << (16 * j)),
                    _const(0),
                )
                for j in range(2)
            )
            pairs.append(arith.ori(low, high))
        chunk = arith.xori(half, arith.andi(arith.divui(key, _const(4)), _const(1)))
        offset = arith.addi(
            arith.muli(stage, _const(_TILE * GROUP * 2)),
            arith.addi(arith.muli(key, _const(GROUP * 2)), arith.muli(chunk, _const(16))),
        )
        value = vector.from_elements(ir.VectorType.get((4,), i32), pairs)
        llvm.store(value, _at(utils.memref_ptr(mask_smem), offset), alignment=16)
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)
        utils.inline_ptx(
            "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];", _full_barrier(full, stage), has_side_effects=True
        )

    write(words, mask_smem, full, stage)


def _gather_tile(pool, ids, k_smem, v_smem, full, head, tile, stage, count) -> None:
    """Starts the copies of a tile of 64 keys and values into a stage, by 128 threads; they arrive when done.

    Thread t copies 16-byte chunk t % 16 of keys 8 * (t // 16) to 8 * (t // 16) + 7, and of their values. Where there is
    no key (a slot below 0, or at `count` and later) the copy writes zeros. Row r, chunk c of a tile lies at
    ((r / 8) * 2 + c / 8) * 1024 + (r % 8) * 128 + ((c % 8) ^ (r % 8)) * 16.
    """

    @plgpu.inline_mgpu(
        arg_types=(_REF, _IDS, plgpu.RefType(_TRANSFORMS), plgpu.RefType(_TRANSFORMS), _REF) + (_SCALAR,) * 4
    )
    def gather(_, pool, ids, k_smem, v_smem, full, head, tile, stage, count):
        i64 = ir.IntegerType.get_signless(64)
        head, tile, stage, count = (x.registers.item() for x in (head, tile, stage, count))
        row_bytes = math.prod(ir.MemRefType(pool.type).shape[1:]) * 2
        thread = arith.remui(utils.thread_idx(), _const(128))
        chunk, eighth = arith.remui(thread, _const(16)), arith.divui(thread, _const(16))
        chunk_in_half = arith.remui(chunk, _const(8))
        ids = [vector.extract(v, [], [i]) for v in ids.registers for i in range(4)]
        source_base = _at(_global(pool), arith.addi(arith.muli(head, _const(_DIM * 2)), arith.muli(chunk, _const(16))))
        target_base = arith.addi(
            arith.muli(stage, _const(_TILE * _DIM * 2)),
            arith.addi(arith.muli(eighth, _const(2048)), arith.muli(arith.divui(chunk, _const(8)), _const(1024))),
        )
        first_key = arith.addi(arith.muli(tile, _const(_TILE)), arith.muli(eighth, _const(8)))
        left = arith.subi(count, first_key)
        for i, row in enumerate(ids):
            exists = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sgt, left, _const(i)),
                arith.cmpi(arith.CmpIPredicate.sge, row, _const(0)),
            )
            size = arith.select(exists, _const(16), _const(0))
            row = arith.select(exists, row, _const(0))
            source = _at(source_base, arith.muli(arith.extui(i64, row), _const(row_bytes, 64)))
            swizzled = arith.muli(arith.xori(chunk_in_half, _const(i)), _const(16))
            offset = arith.addi(arith.addi(target_base, _const(i * 128)), swizzled)
            for smem, vector_source in ((k_smem, source), (v_smem, _at(source, _const(row_bytes // 2)))):
                nvvm.cp_async_shared_global(
                    _at(utils.memref_ptr(smem), offset), vector_source, 16, nvvm.LoadCacheModifierKind.CG, cp_size=size
                )
        nvvm.cp_async_mbarrier_arrive(_full_barrier(full, stage), noinc=True)

    gather(pool, ids, k_smem, v_smem, full, head, tile, stage, count)
