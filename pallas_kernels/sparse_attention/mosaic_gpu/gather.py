"""Gathers rows of keys and values into tensor-core tiles, with instructions that Pallas has no operation for.

These are copies of 16 bytes to chosen addresses, arrivals at barriers when copies complete, and the masks beside the
keys. The 128 threads of the producer warpgroup run these functions; the other warpgroups run `wait_full`.
"""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false

import math

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from pallas_kernels.gpu.mlir import byte_offset, const, global_pointer

DIM = 128
"""Elements of a head."""
GROUP = 16
"""Neighbouring queries that share a list of keys."""
TILE = 64
"""Keys that are copied together."""
STEP = 128
"""Keys of a stage, which one step of the softmax takes. Parts of a list begin at multiples of it."""
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
MASK_TRANSFORMS = (plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(32))

_MASKED = 0xF149  # -1e30 in bfloat16
_IDS = plgpu.Layout.WG_STRIDED((8 * 128,), vec_size=4)
_WORDS = plgpu.Layout.WG_STRIDED((128,), vec_size=1)
_SCALAR = plgpu.Layout.WG_SPLAT
_REF = plgpu.RefType()


def _full_barrier(full: ir.Value, stage: ir.Value) -> ir.Value:
    return byte_offset(utils.memref_ptr(full), arith.muli(stage, const(8)))


def _stage_of(place: ir.Value) -> ir.Value:
    return arith.divui(place, const(STEP // TILE))


def init_barriers(full, stages: int) -> None:
    """Prepares the barriers in `full`. For each tile a producer thread arrives twice: for its mask and its copies."""

    @plgpu.inline_mgpu(arg_types=(_REF,))
    def init(_, full):
        first = utils.single_thread_predicate(utils.ThreadSubset.BLOCK)
        for stage in range(stages):
            nvvm.mbarrier_init(_full_barrier(full, const(stage)), const(256 * STEP // TILE), predicate=first)

    init(full)


def wait_full(full, stage, parity) -> None:
    """Waits until the copies to a stage have arrived, and orders them before the tensor cores' reads."""

    @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR, _SCALAR))
    def wait(_, full, stage, parity):
        barrier = _full_barrier(full, stage.registers.item())
        nvvm.mbarrier_try_wait_parity(barrier, parity.registers.item(), const(10_000_000))
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    wait(full, stage, parity)


def read_takers(takers, stage):
    """The word beside a stage that is full: which warpgroups take the next one, bit i for warpgroup i."""

    @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR))
    def read(_, takers, stage):
        i32 = ir.IntegerType.get_signless(32)
        address = byte_offset(utils.memref_ptr(takers), arith.muli(stage.registers.item(), const(4)))
        word = utils.inline_ptx("ld.shared.b32 $0, [$1];", address, result_types=i32, has_side_effects=True)
        return fa.FragmentedArray.splat(word, (), is_signed=True)

    return read(takers, stage)


def finish_copies() -> None:
    """Waits for all copies of this thread. A thread must not end before its copies."""

    @plgpu.inline_mgpu()
    def finish(_):
        nvvm.cp_async_commit_group()
        nvvm.cp_async_wait_group(0)

    finish()


def read_lists(slots, members, group, tile, count):
    """Reads a tile's row numbers (8 keys per thread) and membership words (two threads per key; 0 where no key is)."""

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
        thread = arith.remui(utils.thread_idx(), const(128))
        tile_start = arith.muli(tile, const(TILE))
        list_start = arith.addi(arith.muli(arith.extui(i64, group), const(per_group, 64)), arith.extui(i64, tile_start))

        def pointer(ref, key):
            return byte_offset(
                global_pointer(ref), arith.muli(arith.addi(list_start, arith.extui(i64, key)), const(4, 64))
            )

        first_key = arith.muli(arith.divui(thread, const(16)), const(8))
        four, one = ir.VectorType.get((4,), i32), ir.VectorType.get((1,), i32)
        ids = [
            llvm.load(four, byte_offset(pointer(slots, first_key), const(16 * half)), alignment=16) for half in range(2)
        ]
        key = arith.divui(thread, const(2))
        word = llvm.load(i32, pointer(members, key), alignment=4)
        exists = arith.cmpi(arith.CmpIPredicate.sgt, count, arith.addi(tile_start, key))
        word = arith.select(exists, word, const(0))
        word = vector.broadcast(one, word)
        return (
            fa.FragmentedArray(_registers=np.array(ids, dtype=object), _layout=_IDS.to_mgpu(), _is_signed=True),
            fa.FragmentedArray(_registers=np.array([word], dtype=object), _layout=_WORDS.to_mgpu(), _is_signed=True),
        )

    return read(slots, members, group, tile, count)


def write_mask(words, takers, mask_smem, takers_smem, full, place) -> None:
    """Writes a tile's mask `[64 keys, 16 queries]`: 0 for members and -1e30 for others. Then arrives at the barrier.

    Thread t writes queries 8 * (t % 2) to 8 * (t % 2) + 7 of key t // 2, and the word `takers` beside the stage.
    `place` counts tiles from the first stage's.
    """

    @plgpu.inline_mgpu(arg_types=(_WORDS, _SCALAR, plgpu.RefType(MASK_TRANSFORMS), _REF, _REF, _SCALAR))
    def write(_, words, takers, mask_smem, takers_smem, full, place):
        i32 = ir.IntegerType.get_signless(32)
        place = place.registers.item()
        stage = _stage_of(place)
        thread = arith.remui(utils.thread_idx(), const(128))
        key, half = arith.divui(thread, const(2)), arith.remui(thread, const(2))
        word = vector.extract(words.registers.item(), [], [0])
        word = arith.shrui(word, arith.muli(half, const(8)))
        pairs = []
        for i in range(0, 8, 2):
            low, high = (
                arith.select(
                    arith.cmpi(arith.CmpIPredicate.eq, arith.andi(word, const(1 << (i + j))), const(0)),
                    const(_MASKED << (16 * j)),
                    const(0),
                )
                for j in range(2)
            )
            pairs.append(arith.ori(low, high))
        chunk = arith.xori(half, arith.andi(arith.divui(key, const(4)), const(1)))
        offset = arith.addi(
            arith.muli(place, const(TILE * GROUP * 2)),
            arith.addi(arith.muli(key, const(GROUP * 2)), arith.muli(chunk, const(16))),
        )
        value = vector.from_elements(ir.VectorType.get((4,), i32), pairs)
        llvm.store(value, byte_offset(utils.memref_ptr(mask_smem), offset), alignment=16)
        word_place = byte_offset(utils.memref_ptr(takers_smem), arith.muli(stage, const(4)))
        llvm.store(takers.registers.item(), word_place, alignment=4)
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)
        utils.inline_ptx(
            "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];", _full_barrier(full, stage), has_side_effects=True
        )

    write(words, takers, mask_smem, takers_smem, full, place)


def gather_tile(pool, ids, k_smem, v_smem, full, head, tile, place, count) -> None:
    """Starts the copies of a tile of 64 keys and values, by 128 threads. They arrive at the barrier of its stage.

    Thread t copies 16-byte chunk t % 16 of keys 8 * (t // 16) to 8 * (t // 16) + 7, and of their values. Where there is
    no key (a slot below 0, or entry `count` and later), the copy writes zeros. Chunk c of row r of a tile is at byte
    ((r / 8) * 2 + c / 8) * 1024 + (r % 8) * 128 + ((c % 8) ^ (r % 8)) * 16. `place` counts tiles from the
    first stage's.
    """

    @plgpu.inline_mgpu(
        arg_types=(_REF, _IDS, plgpu.RefType(TRANSFORMS), plgpu.RefType(TRANSFORMS), _REF) + (_SCALAR,) * 4
    )
    def gather(_, pool, ids, k_smem, v_smem, full, head, tile, place, count):
        i64 = ir.IntegerType.get_signless(64)
        head, tile, place, count = (x.registers.item() for x in (head, tile, place, count))
        row_bytes = math.prod(ir.MemRefType(pool.type).shape[1:]) * 2
        thread = arith.remui(utils.thread_idx(), const(128))
        chunk, eighth = arith.remui(thread, const(16)), arith.divui(thread, const(16))
        chunk_in_half = arith.remui(chunk, const(8))
        ids = [vector.extract(v, [], [i]) for v in ids.registers for i in range(4)]
        source_base = byte_offset(
            global_pointer(pool), arith.addi(arith.muli(head, const(DIM * 2)), arith.muli(chunk, const(16)))
        )
        target_base = arith.addi(
            arith.muli(place, const(TILE * DIM * 2)),
            arith.addi(arith.muli(eighth, const(2048)), arith.muli(arith.divui(chunk, const(8)), const(1024))),
        )
        first_key = arith.addi(arith.muli(tile, const(TILE)), arith.muli(eighth, const(8)))
        left = arith.subi(count, first_key)
        for i, row in enumerate(ids):
            exists = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sgt, left, const(i)),
                arith.cmpi(arith.CmpIPredicate.sge, row, const(0)),
            )
            size = arith.select(exists, const(16), const(0))
            row = arith.select(exists, row, const(0))
            source = byte_offset(source_base, arith.muli(arith.extui(i64, row), const(row_bytes, 64)))
            swizzled = arith.muli(arith.xori(chunk_in_half, const(i)), const(16))
            offset = arith.addi(arith.addi(target_base, const(i * 128)), swizzled)
            for smem, vector_source in ((k_smem, source), (v_smem, byte_offset(source, const(row_bytes // 2)))):
                nvvm.cp_async_shared_global(
                    byte_offset(utils.memref_ptr(smem), offset),
                    vector_source,
                    16,
                    nvvm.LoadCacheModifierKind.CG,
                    cp_size=size,
                )
        nvvm.cp_async_mbarrier_arrive(_full_barrier(full, _stage_of(place)), noinc=True)

    gather(pool, ids, k_smem, v_smem, full, head, tile, place, count)
