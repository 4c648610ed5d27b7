"""Index scores of several queries per sequence.

The grid is persistent. Every CTA gets an equal, contiguous part of the (block of 16 queries, step of 256 keys) pairs in
which a query sees a key. So it loads the queries and gates of few blocks, and then streams keys. A producer warpgroup
fetches key pages through the page table with TMA. Two consumer warpgroups read the same keys, each for 8 queries of its
own.

* One wgmma tile is 64 keys (M) x [head, query] (N, 16 heads x 8 queries = 128) x dim (K). Heads are the slow index of
  N. So the 16 terms of one score are in one thread's registers, and their sum needs no exchange between threads.
* relu and gate are one max and one fma per term, in fp32. The gates are constant for a block and stay in registers.
* A warpgroup keeps two products in flight: while the tensor cores multiply one tile, it sums the heads of the other.
* Scales of keys, if there are any, come with the keys and multiply a key's sums.
* The scores of a step go through swizzled shared memory to a TMA store. If the number of queries is no multiple of 8,
  TMA could not clip them, and threads store them directly.
* Steps that no query of a block sees are not computed. TMA fills them with -inf.
"""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.hopper import MULTIPROCESSORS, SHARED_BYTES
from pallas_kernels.gpu.wgmma import ROWS, finish_dots
from pallas_kernels.indexer_scores.mosaic_gpu.epilogues import (
    STAGE_TRANSFORMS,
    load_gates,
    load_scales,
    stage,
    store,
    sum_heads,
)
from pallas_kernels.indexer_scores.mosaic_gpu.products import start_dots, sync_warpgroup
from pallas_kernels.indexer_scores.mosaic_gpu.shares import EqualSteps, SeenSteps

_WIDTH = 8  # Queries of one warpgroup.
_COLUMNS = 128  # Largest N of one product.
_FREE_BYTES = SHARED_BYTES - 2 * 1024
"""Shared memory for arrays; the rest is for barriers."""


def _cdiv(a, b):
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How the kernel is tiled.

    Attributes:
      groups: consumer warpgroups.
      tiles: tiles of 64 keys in one step.
      stages: steps of keys in shared memory.
      depth: products in flight in a warpgroup.
    """

    groups: int
    tiles: int
    stages: int
    depth: int


def _choose(queries: int, heads: int, row_bytes: int, length: int) -> _Tiling:
    depth = 2 if heads <= 16 else 1
    # At most one warpgroup per group of 8 queries: TMA drops an axis of one tile and so would not clip it.
    most = _cdiv(queries, _WIDTH)
    for groups, tiles, stages in ((2, 4, 3), (2, 4, 2), (2, 2, 4), (2, 2, 2), (2, 1, 4), (1, 2, 2), (1, 1, 2)):
        step = tiles * ROWS
        shared = (
            groups * heads * _WIDTH * row_bytes + stages * step * (row_bytes + 4) + (2 * groups + 1) * _WIDTH * step * 4
        )
        if groups <= most and length % step == 0 and shared <= _FREE_BYTES:
            return _Tiling(groups, tiles, stages, depth)
    raise NotImplementedError(f"{heads} heads of {row_bytes} bytes do not fit shared memory")


@functools.partial(jax.jit, static_argnames=("scale", "fill", "skip_below"))
def prefill_scores(q, weights, keys, page_table, query_start, key_scales, *, scale, fill, skip_below):
    batch, queries, heads, dim = q.shape
    _, page_size, _ = keys.shape
    length = page_table.shape[1] * page_size
    itemsize, scaled = keys.dtype.itemsize, key_scales is not None
    c = _choose(queries, heads, dim * itemsize, length)
    staged = queries % 8 == 0
    q = jnp.pad(
        q, ((0, 0), (0, -queries % 8), (0, 0), (0, 0))
    )  # TMA wants whole groups of 8; gates and stores are clipped
    step = c.tiles * ROWS
    steps = length // step
    most_heads = _COLUMNS // _WIDTH
    head_parts = [(h, min(most_heads, heads - h)) for h in range(0, heads, most_heads)]
    block = c.groups * _WIDTH
    blocks = _cdiv(queries, block)
    swizzle = plgpu.find_swizzle(dim * itemsize * 8)
    transforms = (plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))
    copy_rows = min(page_size, step)
    copies = step // copy_rows
    int32 = jnp.int32

    def kernel(q_ref, weights_ref, keys_ref, table_ref, start_ref, *refs):
        scales_ref = refs[0] if scaled else None
        out_ref, q_smem, k_smem, scale_smem, stage_smem, inf_smem, q_barrier, full, empty = refs[scaled:]
        cta = lax.axis_index("cta")
        wg = lax.axis_index("wg")

        def reach(b):
            """Steps that some query of sequence b sees."""
            return jnp.clip((start_ref[b] + (queries + step - 1)) // step, 0, steps)

        def seen(b):
            """The steps that must be scored of the blocks of sequence b."""
            return SeenSteps.of(start_ref[b], blocks, block, step=step, steps=steps, skip_below=skip_below)

        def segments(body, work_of):
            """Calls body(sequence, block, first step, end, carry) for each block of which this CTA has a part."""
            total = lax.fori_loop(0, batch, lambda b, n: n + work_of(b).total, int32(0))
            each, rest = total // MULTIPROCESSORS, lax.rem(total, int32(MULTIPROCESSORS))
            first = cta * each + jnp.minimum(cta, rest)
            end = first + each + (cta < rest).astype(int32)

            def sequence(b, carry):
                origin, done = carry
                work = work_of(b)
                own_first, own_end = (jnp.clip(at - origin, 0, work.total) for at in (first, end))
                block_first, block_end = work.blocks_of(own_first, own_end)

                def one(i, carry):
                    first, end, done = carry  # counted from the block's first step
                    count = work.count(i)
                    done = body(b, i, jnp.maximum(first, 0), jnp.minimum(end, count), done)
                    return first - count, end - count, done

                before = work.before(block_first)
                carry = own_first - before, own_end - before, done
                return origin + work.total, lax.fori_loop(block_first, block_end, one, carry)[-1]

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
                        if scales_ref is not None:
                            plgpu.copy_gmem_to_smem(
                                scales_ref.at[page, pl.ds(row, copy_rows)],
                                scale_smem.at[slot, pl.ds(i * copy_rows, copy_rows)],
                                full.at[slot],
                            )
                    return following

                lax.fori_loop(lo, hi, load, addresses(jnp.minimum(lo, steps - 1)))
                return done + hi - lo

            segments(load_segment, seen)
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

                segments(fill_near, lambda b: EqualSteps(blocks, reach(b)))
                segments(fill_far, lambda b: EqualSteps(blocks, steps - reach(b)))
                plgpu.wait_smem_to_gmem(0)

        @pl.when(wg < c.groups)
        def _consumer():
            if c.groups == 2:
                plgpu.set_max_registers(232, action="increase")

            def score_segment(b, i, lo, hi, done):
                hi = jnp.maximum(jnp.minimum(hi, seen_steps(b, i)), lo)
                first_query = i * block + wg * _WIDTH
                first_position = start_ref[b] + first_query
                sync_warpgroup()  # All warps have finished reading the last segment's queries.
                for h in range(heads):
                    plgpu.copy_gmem_to_smem(
                        q_ref.at[b, pl.ds(first_query, _WIDTH), h],
                        q_smem.at[wg, pl.ds(h * _WIDTH, _WIDTH)],
                        q_barrier.at[wg],
                    )
                gates = [load_gates(weights_ref.at[b], first_query, *part, _WIDTH, scale) for part in head_parts]
                plgpu.barrier_wait(q_barrier.at[wg])

                def score(s, _, *, masked):
                    at = done + s - lo
                    slot = lax.rem(at, int32(c.stages))
                    out_slot = lax.rem(at, int32(2))
                    plgpu.barrier_wait(full.at[slot])
                    work = [(tile, part) for tile in range(c.tiles) for part in range(len(head_parts))]
                    factors = [load_scales(scale_smem.at[slot], tile) if scaled else None for tile in range(c.tiles)]
                    running = []
                    sums = None

                    def finish_one(last):
                        nonlocal sums
                        (tile, part), dots = running.pop(0)
                        dots = finish_dots(dots, len(running))
                        if last:
                            plgpu.barrier_arrive(empty.at[slot])
                        sums = sum_heads(dots, gates[part], _WIDTH, sums if part else None)
                        if part == len(head_parts) - 1:
                            if scaled:
                                sums = sums * factors[tile]
                            first_key = s * step + tile * ROWS
                            if staged:
                                if tile == 0:
                                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                                stage(stage_smem.at[wg, out_slot], sums, tile, first_key, first_position, masked=masked)
                            else:
                                store(out_ref.at[b], sums, first_query, first_key, first_position, masked=masked)

                    for item in work:
                        tile, part = item
                        head, count = head_parts[part]
                        dots = start_dots(
                            k_smem.at[slot, pl.ds(tile * ROWS, ROWS)],
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

            segments(score_segment, seen)
            if staged:
                plgpu.wait_smem_to_gmem(0)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, queries, length), jnp.float32),
        grid=(MULTIPROCESSORS,),
        grid_names=("cta",),
        num_threads=c.groups + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((c.groups, heads * _WIDTH, dim), q.dtype, transforms=transforms),
            plgpu.SMEM((c.stages, step, dim), keys.dtype, transforms=transforms),
            plgpu.SMEM((c.stages, step), jnp.float32),
            plgpu.SMEM((c.groups, 2, _WIDTH, step), jnp.float32, transforms=STAGE_TRANSFORMS),
            plgpu.SMEM((_WIDTH, step), jnp.float32),
            plgpu.Barrier(num_arrivals=heads, num_barriers=c.groups),
            plgpu.Barrier(num_arrivals=copies * (1 + scaled), num_barriers=c.stages),
            plgpu.Barrier(num_arrivals=c.groups, num_barriers=c.stages),
        ],
    )
    return call(q, weights, keys, page_table, query_start, *([key_scales] if scaled else []))
