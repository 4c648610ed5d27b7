"""Grouped matmul for Hopper GPUs (Pallas Mosaic GPU, sm_90a).

One persistent kernel serves prefill and decode. The rows of each group are cut into row tiles. The first tile starts at
the group's first row, so no tile holds rows of two groups. A unit of work is one row tile and one column tile. Every
block of the grid first computes two prefix sums of `group_sizes` in shared memory: the rows and the row tiles before
each group, in one scan over 128 threads. Then it processes units `block, block + grid, ...`, and finds a unit's group
by binary search. So the routing needs no work on the host or in another kernel, empty groups cost nothing, and only
matrices of groups with rows are read.

A block has one producer warpgroup and `consumers` consumer warpgroups. With TMA, the producer streams [rows, 64] tiles
of lhs and [64, columns] tiles of rhs through a ring of stages in shared memory. It runs ahead into the next unit while
the consumers store the last one. Each consumer multiplies 64 rows by all columns with wgmma, with accumulators in
registers. It skips the arithmetic if the group has no rows left for it.

The last row tile of a group also reads rows of the next group, or zeros after the end of the array. Their products are
never stored: a consumer with 64 valid rows stores through shared memory with TMA, and a consumer with fewer stores
straight from registers under a row mask. Rows behind the last group form one more group, which reads nothing and stores
zeros.

Decode uses one consumer (64 rows, nearly all of them padding) and many small column tiles. The tensor cores then still
take far less time than reading the weights. Each weight is read once from memory. If a group has at most 8 rows, only 8
rows of lhs are fetched.

`gate_up_silu` is the same kernel with two column ranges per unit (gate and up) and silu(gate) * up in the epilogue.
"""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.gpu.hopper import SHARED_BYTES
from pallas_kernels.gpu.mlir import byte_offset, global_pointer
from pallas_kernels.grouped_matmul.mosaic_gpu.units import MAX_GROUPS, Units, num_blocks

_SLAB = 64  # Elements of one 128-byte swizzled row: one step along the contracted axis, and the columns of one store.
_WARPGROUP_ROWS = 64


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """How the kernel is tiled.

    Attributes:
      consumers: consumer warpgroups per block, 1 or 2. A row tile has 64 rows for each.
      columns: output columns per unit; with `gate_up_silu`, of gate and of up each.
      stages: tiles of lhs and of rhs in flight; None for all that fit.
    """

    consumers: int
    columns: int
    stages: int | None = None


def grouped_matmul(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, config: MatmulConfig | None = None
) -> jax.Array:
    """Multiplies consecutive groups of rows of `lhs` by the matrix of their group.

    Args:
      lhs: bf16 `[rows, in]`, sorted by group.
      rhs: bf16 `[e, in, out]`.
      group_sizes: int32 `[e]`, the number of rows of each group, in order. Their sum is at most `rows`.
      config: tiling, chosen from the shapes if None.

    Returns:
      bf16 `[rows, out]`, accumulated in fp32; rows behind the last group are zero.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take.
      ValueError: the shapes do not fit each other.
    """
    return _call(lhs, rhs, group_sizes, fused=False, config=config)


def gate_up_silu(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, config: MatmulConfig | None = None
) -> jax.Array:
    """`silu(gate) * up` of the two halves of `grouped_matmul(lhs, rhs, group_sizes)`'s columns, in fp32 until the end.

    Args:
      lhs: bf16 `[rows, in]`, sorted by group.
      rhs: bf16 `[e, in, 2f]`: the first f columns are the gate's, the last f are up's.
      group_sizes: int32 `[e]`, the number of rows of each group, in order. Their sum is at most `rows`.
      config: tiling, chosen from the shapes if None.

    Returns:
      bf16 `[rows, f]`; rows behind the last group are zero.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take.
      ValueError: the shapes do not fit each other.
    """
    return _call(lhs, rhs, group_sizes, fused=True, config=config)


def expert_mlp(lhs: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`gate_up_silu` and `grouped_matmul`: see `api.expert_mlp`. bf16 only; rows behind the last group are zero."""
    return grouped_matmul(gate_up_silu(lhs, gate_up, group_sizes), down, group_sizes)


def default_config(rows: int, groups: int, columns: int, fused: bool) -> MatmulConfig:
    """The tiling that was fastest in measurements. `columns` are the output's.

    Raises:
      NotImplementedError: no tile width divides the columns.
    """
    if rows <= 24 * groups:
        preferred, consumers = ((64,) if fused else (128, 64)), 1
    else:
        preferred, consumers = ((128, 64) if fused else (256, 128, 64)), 2
    for width in preferred:
        if columns % width == 0:
            return MatmulConfig(consumers, width)
    raise NotImplementedError(f"the output's columns ({columns}) must be a multiple of {preferred[-1]}")


def _call(lhs, rhs, group_sizes, *, fused, config):
    (rows, k), (groups, k_rhs, n) = lhs.shape, rhs.shape
    if k != k_rhs or group_sizes.shape != (groups,):
        raise ValueError(f"shapes do not fit: {lhs.shape}, {rhs.shape}, {group_sizes.shape}")
    if lhs.dtype != jnp.bfloat16 or rhs.dtype != jnp.bfloat16:
        raise NotImplementedError(f"only bfloat16, not {lhs.dtype} and {rhs.dtype}")
    if group_sizes.dtype != jnp.int32:
        raise NotImplementedError(f"group_sizes must be int32, not {group_sizes.dtype}")
    if not 1 <= groups <= MAX_GROUPS:
        raise NotImplementedError(f"at most {MAX_GROUPS} groups, not {groups}")
    if rows == 0 or k == 0 or k % _SLAB:
        raise NotImplementedError(f"needs a row, and a multiple of {_SLAB} contracted elements, not {lhs.shape}")
    if fused and n % 2:
        raise ValueError(f"gate and up must be of one size, got {n} columns")
    columns = n // 2 if fused else n
    if config and config.consumers not in (1, 2):
        raise ValueError(f"1 or 2 consumers, not {config.consumers}")
    config = config or default_config(rows, groups, columns, fused)
    if columns % config.columns or config.columns % _SLAB:
        raise NotImplementedError(
            f"{columns} columns cannot be cut into tiles of {config.columns}, a multiple of {_SLAB}"
        )
    return _build(rows, k, groups, columns, fused, config, num_blocks())(group_sizes, lhs, rhs)


@functools.lru_cache
def _build(rows, k, groups, columns, fused, config, blocks):
    """Returns the kernel `(group_sizes, lhs, rhs) -> out` for these sizes."""
    bf16 = jnp.dtype(jnp.bfloat16)
    consumers, tile_n = config.consumers, config.columns
    tile_m = consumers * _WARPGROUP_ROWS
    halves = 2 if fused else 1
    k_steps, column_tiles = k // _SLAB, columns // tile_n
    # With one consumer most groups are tiny, and the producer fetches 8 rows of lhs instead of 64.
    lhs_boxes = (8, tile_m) if consumers == 1 else (tile_m,)

    stage_bytes = (tile_m + halves * tile_n) * _SLAB * bf16.itemsize
    store_slots = 2 if consumers > 1 else 1
    store_bytes = consumers * store_slots * _WARPGROUP_ROWS * _SLAB * bf16.itemsize
    units = Units(rows, groups, tile_m, column_tiles, blocks)
    free_bytes = SHARED_BYTES - store_bytes - pl.cdiv(4 * units.table_size, 1024) * 1024 - 512
    stages = config.stages or min(free_bytes // stage_bytes, 2 * k_steps, 16)
    if stages < 2:
        raise NotImplementedError(f"tiles of {tile_m} x {halves} x {tile_n} do not fit into shared memory")

    def tiled(shape):
        """Shared memory in the layout that wgmma reads and its results are written in."""
        return plgpu.SMEM(shape, bf16, transforms=(plgpu.TilingTransform((8, _SLAB)), plgpu.SwizzleTransform(128)))

    def both_views(shape):
        """The same memory as tiles and as plain rows, for tiles that are one slab wide.

        The bytes are the same in both views. A TMA copy of the tiled view copies whole blocks of 8 rows, and can begin
        only at a multiple of 8; a copy of the rows can begin anywhere.
        """
        return plgpu.RefUnion(tiled(shape), plgpu.SMEM(shape, bf16, transforms=(plgpu.SwizzleTransform(128),)))

    def body(sizes, lhs, rhs, out, lhs_views, rhs_smem, out_views, table, full, free, ready):
        (lhs_smem, lhs_rows), (out_smem, out_rows) = lhs_views, out_views
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _():
            units.scan(sizes, table)
            plgpu.barrier_arrive(ready)

        plgpu.barrier_wait(ready)
        my_units = units.count(table, block)

        @pl.when(warpgroup == consumers)
        def _produce():
            if consumers > 1:
                plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, my_units)
            def _unit(index):
                group, row, left, column_tile = units.locate(table, block, index)

                @pl.when(group < groups)
                def _():
                    @pl.loop(0, k_steps)
                    def _load(step):
                        slot = lax.rem(index * k_steps + step, jnp.int32(stages))
                        at_k = pl.ds(step * _SLAB, _SLAB)
                        plgpu.barrier_wait(free.at[slot])
                        for half in range(halves):
                            plgpu.copy_gmem_to_smem(
                                rhs.at[group, at_k, pl.ds(half * columns + column_tile * tile_n, tile_n)],
                                rhs_smem.at[slot, half],
                                full.at[slot],
                            )
                        for i, box in enumerate(lhs_boxes):
                            fits = None
                            if len(lhs_boxes) > 1:
                                fits = (left <= box) if i == 0 else (left > lhs_boxes[0])
                            plgpu.copy_gmem_to_smem(
                                lhs.at[pl.ds(row, box), at_k],
                                lhs_rows.at[slot, pl.ds(0, box)],
                                full.at[slot],
                                predicate=fits,
                            )

        @pl.when(warpgroup < consumers)
        def _consume():
            if consumers > 1:
                plgpu.set_max_registers(232, action="increase")
            for slot in range(stages):
                plgpu.barrier_arrive(free.at[slot])

            @pl.loop(0, my_units)
            def _unit(index):
                group, row, left, column_tile = units.locate(table, block, index)
                row, left = row + warpgroup * _WARPGROUP_ROWS, left - warpgroup * _WARPGROUP_ROWS
                column = column_tile * tile_n
                has_matrix = group < groups

                @pl.when(has_matrix & (left > 0))
                def _multiply():
                    def accumulate(*accs):
                        @pl.loop(0, k_steps)
                        def _step(step):
                            at = index * k_steps + step
                            slot = lax.rem(at, jnp.int32(stages))
                            plgpu.barrier_wait(full.at[slot])
                            lhs_tile = lhs_smem.at[slot, pl.ds(warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)]
                            for half, acc in enumerate(accs):
                                plgpu.wgmma(acc, lhs_tile, rhs_smem.at[slot, half])
                            plgpu.wgmma_wait(halves)  # The step before this one is done.
                            before = lax.rem(at + (stages - 1), jnp.int32(stages))
                            plgpu.barrier_arrive(free.at[before], predicate=step > 0)

                        return tuple(acc[...] for acc in accs)

                    accs = pl.run_scoped(accumulate, *[plgpu.ACC((_WARPGROUP_ROWS, tile_n), jnp.float32)] * halves)
                    plgpu.barrier_arrive(free.at[lax.rem(index * k_steps + (k_steps - 1), jnp.int32(stages))])
                    if fused:
                        gate, up = accs
                        result = (gate / (1.0 + jnp.exp(-gate)) * up).astype(bf16)
                    else:
                        result = accs[0].astype(bf16)

                    @pl.when(left >= _WARPGROUP_ROWS)
                    def _store_tile():
                        for i in range(tile_n // _SLAB):
                            plgpu.wait_smem_to_gmem(store_slots - 1, wait_read_only=True)
                            out_smem[warpgroup, i % store_slots] = result[:, i * _SLAB : (i + 1) * _SLAB]
                            plgpu.commit_smem()
                            plgpu.copy_smem_to_gmem(
                                out_rows.at[warpgroup, i % store_slots],
                                out.at[pl.ds(row, _WARPGROUP_ROWS), pl.ds(column + i * _SLAB, _SLAB)],
                            )

                    @pl.when(left < _WARPGROUP_ROWS)
                    def _store_rows():
                        _store_masked(out, result, row, column, left)

                @pl.when(has_matrix & (left <= 0))
                def _skip():
                    @pl.loop(0, k_steps)
                    def _step(step):
                        slot = lax.rem(index * k_steps + step, jnp.int32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.barrier_arrive(free.at[slot])

                @pl.when(jnp.logical_not(has_matrix) & (left > 0))
                def _clear():
                    zeros = plgpu.layout_cast(jnp.zeros((_WARPGROUP_ROWS, tile_n), bf16), plgpu.Layout.WGMMA)
                    _store_masked(out, zeros, row, column, left)

            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, columns), bf16),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        scratch_types=[
            both_views((stages, tile_m, _SLAB)),
            tiled((stages, halves, _SLAB, tile_n)),
            both_views((consumers, store_slots, _WARPGROUP_ROWS, _SLAB)),
            plgpu.SMEM((units.table_size,), jnp.int32),
            plgpu.Barrier(num_arrivals=halves + len(lhs_boxes), num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )


def _store_masked(out, values, row, column, count):
    """`out[row : row + count, column : column + width] = values[:count]`; `values` is bf16, [64, width], as wgmma."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA) + (plgpu.Layout.WG_SPLAT,) * 3)
    def run(_, out, values, row, column, count):
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        row, column, count = (x.registers.item() for x in (row, column, count))
        width, pitch = values.shape[1], ir.MemRefType(out.type).shape[1]
        # A register holds two neighbours of a row. Its place is the thread's offset plus an offset known here.
        strides = values.layout.tiling.tile_strides((width, 1))
        own_row, own_column = (arith.index_cast(i32, x) for x in next(iter(values.layout.thread_idxs(values.shape))))
        element = arith.addi(
            arith.muli(arith.extui(i64, arith.addi(row, own_row)), arith.constant(i64, pitch)),
            arith.extui(i64, arith.addi(column, own_column)),
        )
        base = byte_offset(global_pointer(out), arith.muli(element, arith.constant(i64, 2)))
        room = arith.subi(count, own_row)
        for at, register in np.ndenumerate(values.registers):
            rows_on, columns_on = divmod(sum(i * s for i, s in zip(at, strides, strict=True)), width)
            utils.inline_ptx(
                "st.global.b32 [$0], $1;",
                byte_offset(base, arith.constant(i64, 2 * (rows_on * pitch + columns_on))),
                utils.bitcast(register, i32),
                predicate=arith.cmpi(arith.CmpIPredicate.slt, arith.constant(i32, rows_on), room),
                has_side_effects=True,
            )

    run(out, values, row, column, count)
