"""The kernel of union attention for Hopper GPUs (Pallas Mosaic GPU).

The query heads of one KV head fill only 8 of the 64 rows of a tensor-core tile. One query alone would waste most of the
work, and read all of its keys for itself. So sixteen neighbouring queries work together: they process the union of
their keys, and a word per key says which of the 16 selected it.

A thread block (CTA) handles one group and one KV head: 16 queries x 8 heads = 128 rows, in two compute warpgroups of 64
rows. A third warpgroup, the producer, copies the listed rows of the pool to shared memory, 64 keys and values at a
time, in the swizzled form that the tensor cores read. 16 threads copy one key (256 bytes), 16 bytes each with cp.async,
and a barrier per stage counts the arrivals of the copies.

With 8 query heads on a KV head, each compute warpgroup has 8 queries, and skips keys that only the other one's queries
selected. Such keys are parts of their own of the list, in whole steps of the softmax. Beside each step the producer
writes who takes the next one, so that a warpgroup knows it before it waits.

The compute warpgroups do S = Q K^T, the mask, an online softmax over 128 keys at a time, and O += P V. The softmax of
one runs during the matmuls of the other. The mask is a matmul too, so it costs the softmax nothing. Beside the keys the
producer writes a [64 keys, 16 queries] block of 0 (members) and -1e30 (others). Its product with a row of zeros and a
single one, which picks the query, is added to S.
"""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.wgmma import ROWS, finish_dots, start_row_dots
from pallas_kernels.sparse_attention.mosaic_gpu.gather import (
    DIM,
    GROUP,
    MASK_TRANSFORMS,
    STEP,
    TILE,
    TRANSFORMS,
    finish_copies,
    gather_tile,
    init_barriers,
    read_lists,
    read_takers,
    wait_full,
    write_mask,
)

_LOG2E = math.log2(math.e)
_STAGES = 3
"""Steps of keys and values in shared memory, 68 KB each."""
_PRODUCER_REGISTERS = 56
"""Registers of a producer thread. With 40 it may spill, which halves the speed."""
_TILES = STEP // TILE


def check(q: jax.Array, kv: jax.Array, scale: float, kv_dtype: Any = jnp.bfloat16) -> int:
    """Returns the number of KV heads, whose pages must have a dtype.

    Raises:
      NotImplementedError: dtypes, heads or a scale that the kernels do not take.
    """
    heads, dim = q.shape[-2:]
    kv_heads = kv.shape[2] // 2
    if dim != DIM or kv.shape[3] != DIM:
        raise NotImplementedError(f"head_dim must be {DIM}, not {dim}")
    if q.dtype != jnp.bfloat16 or kv.dtype != kv_dtype:
        raise NotImplementedError(f"only bfloat16 with {jnp.dtype(kv_dtype)} pages, not {q.dtype} with {kv.dtype}")
    if heads % kv_heads or heads // kv_heads > ROWS:
        raise NotImplementedError(f"{heads} query heads on {kv_heads} KV heads")
    if not scale > 0:
        raise NotImplementedError("scale must be above 0")
    return kv_heads


def choose_step(step, first_done, other_done, first, other, both) -> tuple[jax.Array, ...]:
    """Which part of its list a group takes in a step. Steps of halves come in pairs, and evenly among the others.

    Both warpgroups then have work at most times, and the copies of two steps for one of each do not come all at once.

    Args:
      step: number of the step; all of these are int32 scalars.
      first_done, other_done: steps before it that were of the first 8 queries alone, and of the other 8 alone.
      first, other, both: how many steps there are of the first 8 queries, of the other 8 and of both. The list has
        them in this order.

    Returns:
      The step's number in the list, the warpgroups that take it (bit i is set for warpgroup i), and `first_done` and
      `other_done` after it.
    """
    both_done, pairs = step - first_done - other_done, jnp.maximum(first, other)
    pairs_begun = jnp.maximum(first_done, other_done)
    completes = jnp.logical_and(other_done < first_done, other_done < other)
    begins = jnp.logical_and(pairs_begun < pairs, pairs_begun * both <= both_done * pairs)
    is_first = jnp.logical_and(jnp.logical_and(begins, first_done < first), jnp.logical_not(completes))
    is_other = jnp.logical_and(jnp.logical_or(begins, completes), jnp.logical_not(is_first))
    in_list = jnp.where(is_first, first_done, first + jnp.where(is_other, other_done, other + both_done))
    takers = jnp.where(is_first, 1, jnp.where(is_other, 2, 3))
    return in_list, takers, first_done + is_first.astype(jnp.int32), other_done + is_other.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("q_per_kv", "group", "scale"))
def attend(
    q: jax.Array,
    kv: jax.Array,
    slots: jax.Array,
    members: jax.Array,
    counts: jax.Array,
    *,
    q_per_kv: int,
    group: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention of groups of queries to their lists of keys.

    Args:
      q: bfloat16 `[t, k, r, 128]`, pieces of r rows; r is 8, 16, 32 or 64.
      kv: bfloat16 `[p, page_size, 2 * k, 128]`.
      slots, members: int32 `[groups, u]`.
      counts: int32 `[groups, 3]`, see `build_unions`. Parts of halves of a group need warpgroups that are such halves.
      q_per_kv: rows of one query. Row i of a group takes bit i // q_per_kv of the membership words.
      group: queries of a group.

    Returns:
      bfloat16 `[t, k, r, 128]` and float32 `[t, k, r]`.
    """
    _, kv_heads, piece_rows, _ = q.shape
    groups = counts.shape[0]
    group_pieces = -(-group * q_per_kv // piece_rows)  # pieces of one group
    warpgroup_pieces = min(ROWS // piece_rows, group_pieces)  # pieces of one warpgroup
    compute = 1 if group_pieces * piece_rows <= ROWS else 2
    blocks = -(-group_pieces * piece_rows // (compute * ROWS))  # CTAs the rows of a group are split over
    assert blocks * compute * warpgroup_pieces == group_pieces, "a warpgroup would take the next group's rows"
    factor = scale * _LOG2E
    rows_layout = plgpu.Layout.WGMMA.reduce(1)

    def next_stage(stage):
        return jnp.where(stage == _STAGES - 1, 0, stage + 1)

    def body(q_ref, pool, slots_ref, members_ref, counts_ref, out_ref, lse_ref, scratch, barriers):
        k_smem, v_smem, mask_smem, lse_smem, takers_smem, full = scratch
        q_barrier, empty, together = barriers
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
        # Heads vary slowest, so CTAs that run at the same time read the same slices of the pool, through the L2 cache.
        head, cta = lax.div(cta, groups * blocks), lax.rem(cta, groups * blocks)
        # The last queries of a prompt see most keys. They begin, so that no block is left alone in the end.
        block, group_index = lax.rem(cta, blocks), (groups - 1) - lax.div(cta, blocks)
        first, other, both = (counts_ref[group_index, part] for part in range(3))
        count = first + other + both
        first, other, both = (lax.div(part + (STEP - 1), STEP) for part in (first, other, both))
        steps = first + other + both

        init_barriers(full, _STAGES)
        plgpu.barrier_arrive(together)
        plgpu.barrier_wait(together)

        @pl.when(warpgroup == compute)
        def _produce():
            if compute > 1:
                plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

            def lists_of(tile):
                tile = jnp.minimum(tile, slots.shape[1] // TILE - 1)
                return read_lists(slots_ref, members_ref, group_index, tile, count)

            def produce(step, carry):
                stage, in_list, *done, ids, words = carry
                following, takers, *done = choose_step(step + 1, *done, first, other, both)

                @pl.when(step >= _STAGES - 1)
                def _():
                    plgpu.barrier_wait(empty.at[stage])

                for i in range(_TILES):
                    tile, place = in_list * _TILES + i, stage * _TILES + i
                    next_lists = lists_of(tile + 1 if i + 1 < _TILES else following * _TILES)
                    write_mask(words, takers, mask_smem, takers_smem, full, place)
                    gather_tile(pool, ids, k_smem, v_smem, full, head, tile, place, count)
                    ids, words = next_lists
                return next_stage(stage), following, *done, ids, words

            start, _, *done = choose_step(*map(jnp.int32, (0, 0, 0)), first, other, both)
            lax.fori_loop(0, steps, produce, (jnp.int32(0), start, *done, *lists_of(start * _TILES)))
            finish_copies()
            plgpu.barrier_arrive(together)

        @pl.when(warpgroup < compute)
        def _compute():
            if compute > 1:
                registers = (504 - _PRODUCER_REGISTERS) // 2 // 8 * 8
                plgpu.set_max_registers(registers, action="increase")
            first_row = (block * compute + warpgroup) * ROWS
            first_piece = group_index * group_pieces + lax.div(first_row, piece_rows)
            # Queries pass through the last stage.
            q_smem = k_smem.at[(_STAGES - 1) * _TILES + warpgroup]
            for i in range(warpgroup_pieces):
                plgpu.copy_gmem_to_smem(
                    q_ref.at[first_piece + i, head],
                    q_smem.at[pl.ds(i * piece_rows, piece_rows)],
                    q_barrier.at[warpgroup],
                )
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=rows_layout) + first_row
            column = plgpu.broadcasted_iota(jnp.int32, (ROWS, GROUP), 1, layout=plgpu.Layout.WGMMA)
            query = lax.broadcast_in_dim(lax.div(row, q_per_kv), column.shape, [0])
            selector = jnp.where(query == column, 1.0, 0.0).astype(q.dtype)
            plgpu.barrier_wait(q_barrier.at[warpgroup])
            q_registers = plgpu.load(q_smem, layout=plgpu.Layout.WGMMA)
            plgpu.barrier_arrive(empty.at[_STAGES - 1])

            def places(stage):
                return [stage * _TILES + i for i in range(_TILES)]

            def start_scores(stage):
                return [
                    start_row_dots((q_registers, k_smem.at[place]), (selector, mask_smem.at[place]), swizzles=(128, 32))
                    for place in places(stage)
                ]

            def finish_scores(dots):
                return [finish_dots(dot, _TILES - 1 - i, plgpu.Layout.WGMMA) for i, dot in enumerate(dots)]

            def softmax(scores, highest, total):
                # In units of log2, the exponent is one multiply-add. `highest` starts finite, so no NaN can arise.
                new_highest = jnp.maximum(highest, functools.reduce(jnp.maximum, scores).max(axis=1) * factor)
                rescale = jnp.exp2(highest - new_highest)
                subtract = lax.broadcast_in_dim(new_highest, scores[0].shape, [0])
                ps = [jnp.exp2(s * factor - subtract) for s in scores]
                total = total * rescale + functools.reduce(jnp.add, ps).sum(axis=1)
                return ps, rescale, new_highest, total

            def multiply(stage, parity, acc, highest, total):
                wait_full(full, stage, parity)
                dots = start_scores(stage)
                takers = read_takers(takers_smem, stage)
                ps, rescale, highest, total = softmax(finish_scores(dots), highest, total)
                acc *= lax.broadcast_in_dim(rescale, acc.shape, [0])

                def add_values(acc_ref):
                    for p, place in zip(ps, places(stage), strict=True):
                        plgpu.wgmma(acc_ref, p.astype(q.dtype), v_smem.at[place])

                return takers, pl.run_state(add_values)(plgpu.ACC.init(acc)), highest, total

            def skip(stage, parity, *carry):
                # It waits too: else it could take a later step's barrier that is a phase behind for one that is passed.
                wait_full(full, stage, parity)
                return read_takers(takers_smem, stage), *carry

            def attend_step(_, carry):
                stage, parity, takers, *carry = carry
                takes = lax.shift_right_logical(takers, warpgroup) % 2 == 1
                takers, *carry = lax.cond(takes, multiply, skip, stage, parity, *carry)
                plgpu.barrier_arrive(empty.at[stage])
                parity = jnp.where(stage == _STAGES - 1, 1 - parity, parity)
                return next_stage(stage), parity, takers, *carry

            acc = plgpu.layout_cast(jnp.zeros((ROWS, DIM), jnp.float32), plgpu.Layout.WGMMA)
            highest = plgpu.layout_cast(jnp.full((ROWS,), -1e20, jnp.float32), rows_layout)
            total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), rows_layout)

            zero = jnp.int32(0)
            _, takers, *_ = choose_step(zero, zero, zero, first, other, both)
            *_, acc, highest, total = lax.fori_loop(0, steps, attend_step, (zero, zero, takers, acc, highest, total))

            inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), 0.0)
            out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
            # The result goes where keys were, which no warpgroup may read any more.
            plgpu.barrier_arrive(together)
            plgpu.barrier_wait(together)
            target = k_smem.at[warpgroup]
            target[...] = out.astype(q.dtype)
            lse_smem[warpgroup] = jnp.where(total > 0, (highest + jnp.log2(total)) * (1 / _LOG2E), -jnp.inf)
            plgpu.commit_smem()
            for i in range(warpgroup_pieces):
                at = (first_piece + i, head)
                rows = pl.ds(i * piece_rows, piece_rows)
                plgpu.copy_smem_to_gmem(target.at[rows], out_ref.at[at])
                plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup, rows], lse_ref.at[at])
            plgpu.wait_smem_to_gmem(0)

    def entry(q_ref, pool, slots_ref, members_ref, counts_ref, out_ref, lse_ref):
        pl.run_scoped(
            lambda *scoped: body(q_ref, pool, slots_ref, members_ref, counts_ref, out_ref, lse_ref, *scoped),
            (
                plgpu.SMEM((_STAGES * _TILES, TILE, DIM), kv.dtype, transforms=TRANSFORMS),
                plgpu.SMEM((_STAGES * _TILES, TILE, DIM), kv.dtype, transforms=TRANSFORMS),
                plgpu.SMEM((_STAGES * _TILES, TILE, GROUP), q.dtype, transforms=MASK_TRANSFORMS),
                plgpu.SMEM((compute, ROWS), jnp.float32),
                plgpu.SMEM((_STAGES,), jnp.int32),
                plgpu.SMEM((_STAGES, 2), jnp.int32),  # the barriers of full stages, 8 bytes each
            ),
            (
                plgpu.Barrier(num_arrivals=warpgroup_pieces, num_barriers=compute),
                plgpu.Barrier(num_arrivals=compute, num_barriers=_STAGES),
                plgpu.Barrier(num_arrivals=compute + 1),
            ),
            collective_axes="warpgroup",
        )

    return plgpu.kernel(
        entry,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ),
        grid=(groups * blocks * kv_heads,),
        grid_names=("cta",),
        num_threads=compute + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, kv.reshape(-1, 2 * kv_heads, DIM), slots, members, counts)
