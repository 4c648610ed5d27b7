"""Index scores of one query per sequence.

The heads alone are the N side of a product. The warpgroups share the keys of a step, and each key is read once. Each of
a quad of four lanes holds a part of a score's terms; two shuffles finish the sum.

All blocks get the same number of steps, of one sequence or of several. Each block's part of several is computed before
the kernel, and once for all layers: a block that added up all steps would wait for memory once for each sequence.
"""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.hopper import MULTIPROCESSORS
from pallas_kernels.gpu.wgmma import ROWS, finish_dots
from pallas_kernels.indexer_scores.mosaic_gpu.epilogues import load_row, load_scales, store_row, sum_heads_in_quad
from pallas_kernels.indexer_scores.mosaic_gpu.products import start_dots, sync_warpgroup


def share(total, block):
    """The first of a block's steps among `total`, and their number."""
    each, rest = total // MULTIPROCESSORS, lax.rem(total, jnp.int32(MULTIPROCESSORS))
    return block * each + jnp.minimum(block, rest), each + (block < rest).astype(jnp.int32)


def parts(steps):
    """Equal parts, one for each block, of the steps of all sequences in their order.

    Args:
      steps: int32 `[b]`, those of each sequence.

    Returns:
      int32 `[MULTIPROCESSORS, 4]`: the first sequence of a part and the one behind its last, the step of the first at
      which the part begins, and its number of steps.
    """
    ends = jnp.cumsum(steps, dtype=jnp.int32)
    first, count = share(ends[-1], jnp.arange(MULTIPROCESSORS, dtype=jnp.int32))
    before = ends <= first[:, None]
    sequence = jnp.sum(before, axis=1)
    behind = jnp.where(count > 0, jnp.sum(ends < (first + count)[:, None], axis=1) + 1, sequence)
    step = first - jnp.sum(jnp.where(before, steps, 0), axis=1)
    return jnp.stack([sequence, behind, step, count], axis=1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("scale", "fill"))
def decode_scores(q, weights, keys, page_table, query_start, key_scales, *, scale, fill):
    batch, _, heads, dim = q.shape
    _, page_size, _ = keys.shape
    length = page_table.shape[1] * page_size
    groups = 2 if length % (2 * ROWS) == 0 else 1
    step = groups * ROWS
    itemsize, scaled = keys.dtype.itemsize, key_scales is not None
    stages = 128 * 1024 // (step * dim * itemsize)
    steps = length // step
    swizzle = plgpu.find_swizzle(dim * itemsize * 8)
    transforms = (plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))
    copy_rows = min(page_size, step)
    copies = step // copy_rows
    int32 = jnp.int32

    def reach_of(start):
        return jnp.clip((start + step) // step, 0, steps)

    def kernel(q_ref, gates_ref, keys_ref, table_ref, start_ref, *refs):
        *more, out_ref, q_smem, k_smem, scale_smem, inf_smem, q_barrier, full, empty = refs
        scales_ref = more.pop(0) if scaled else None
        parts_ref, fill_ref = (*more, None, None)[:2]
        cta = lax.axis_index("cta")
        wg = lax.axis_index("wg")

        def reach(b):
            return reach_of(start_ref[b])

        def segments(body, steps_of, part_ref):
            """Calls `body` for each sequence of this block: its number, steps from and to, and how many are done."""
            if part_ref is None:
                first, behind, (begin, count) = int32(0), int32(1), share(steps_of(0), cta)
            else:
                first, behind, begin, count = (part_ref[cta, i] for i in range(4))

            def sequence(b, done):
                lo = jnp.where(b == first, begin, 0)
                hi = jnp.minimum(lo + count - done, steps_of(b))
                pl.when(hi > lo)(lambda: body(b, lo, hi, done))
                return done + hi - lo

            lax.fori_loop(first, behind, sequence, int32(0))

        @pl.when(wg == groups)
        def _producer():
            plgpu.set_max_registers(40, action="decrease")

            lanes = min(copies, 4)  # Warps that copy.
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
                            if scales_ref is not None:
                                plgpu.copy_gmem_to_smem(
                                    scales_ref.at[page, pl.ds(row, copy_rows)],
                                    scale_smem.at[slot, pl.ds(first, copy_rows)],
                                    full.at[slot],
                                )
                        return following

                    lax.fori_loop(lo, hi, load, addresses(lo))

                pl.when(warp < lanes)(lambda: segments(load_segment, reach, parts_ref))

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

                segments(fill_segment, lambda b: steps - reach(b), fill_ref)
                plgpu.wait_smem_to_gmem(0)

        @pl.when(wg < groups)
        def _consumer():
            def score_segment(b, lo, hi, done):
                sync_warpgroup()
                plgpu.copy_gmem_to_smem(q_ref.at[b, 0], q_smem.at[wg], q_barrier.at[wg])
                gates = load_row(gates_ref.at[b, 0], heads, scale)
                plgpu.barrier_wait(q_barrier.at[wg])
                position = start_ref[b]

                def score(s, _, *, masked):
                    slot = lax.rem(done + s - lo, int32(stages))
                    plgpu.barrier_wait(full.at[slot])
                    dots = start_dots(
                        k_smem.at[slot, pl.ds(wg * ROWS, ROWS)], q_smem.at[wg], transforms, heads, swizzle
                    )
                    factors = load_scales(scale_smem.at[slot], wg) if scaled else None
                    dots = finish_dots(dots, 0)
                    plgpu.barrier_arrive(empty.at[slot])
                    sums = sum_heads_in_quad(dots, gates)
                    if scaled:
                        sums = sums * factors
                    store_row(out_ref.at[b, 0], sums, s * step + wg * ROWS, position, masked=masked)

                unmasked = jnp.clip((position + 1) // step, lo, hi)
                lax.fori_loop(lo, unmasked, functools.partial(score, masked=False), None)
                lax.fori_loop(unmasked, hi, functools.partial(score, masked=True), None)

            segments(score_segment, reach, parts_ref)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, 1, length), jnp.float32),
        grid=(MULTIPROCESSORS,),
        grid_names=("cta",),
        num_threads=groups + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((groups, heads, dim), q.dtype, transforms=transforms),
            plgpu.SMEM((stages, step, dim), keys.dtype, transforms=transforms),
            plgpu.SMEM((stages, step), jnp.float32),
            plgpu.SMEM((2 * ROWS,), jnp.float32),
            plgpu.Barrier(num_barriers=groups),
            plgpu.Barrier(num_arrivals=copies * (1 + scaled), num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        ],
    )
    more = [key_scales] if scaled else []
    if batch > 1:
        reaches = reach_of(query_start)
        more += [parts(reaches), *([parts(steps - reaches)] if fill else [])]
    return call(q, weights, keys, page_table, query_start, *more)
