"""Units of work of a persistent kernel: one row tile of a group and one column tile each.

The rows of each group are cut into row tiles. The first tile starts at the group's first row, so no tile holds rows of
two groups. Rows behind the last group form one more group.
"""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, nvvm

from pallas_kernels.gpu.hopper import MULTIPROCESSORS
from pallas_kernels.gpu.mlir import const

MAX_GROUPS = 1024


@dataclasses.dataclass(frozen=True)
class Units:
    """Which units a block of the grid processes: `block, block + blocks, ...`.

    Attributes:
      rows: rows of all groups, and behind them.
      groups: number of groups, at most `MAX_GROUPS`.
      tile_rows: rows of a row tile.
      column_tiles: column tiles of a row.
      blocks: blocks of the grid.
    """

    rows: int
    groups: int
    tile_rows: int
    column_tiles: int
    blocks: int

    @property
    def table_size(self) -> int:
        """int32 words of shared memory that `scan` fills and the other methods read."""
        return 2 * (self.groups + 2) + 8

    def scan(self, sizes, table):
        """Fills the table from `sizes`, int32 `[groups]`; one warpgroup runs this."""
        _scan_groups(sizes, table, self.rows, self.tile_rows)

    def count(self, table, block):
        """Units of a block."""
        return self._count_until(table, self.groups + 1, block)

    def count_with_matrix(self, table, block):
        """Units of a block whose rows are of a group; they come first."""
        return self._count_until(table, self.groups, block)

    def _count_until(self, table, group, block):
        units = self._tiles_before(table, group) * self.column_tiles
        return lax.div(units - block + (self.blocks - 1), jnp.int32(self.blocks))

    def locate(self, table, block, index):
        """A unit's group, first row, number of rows from there to the group's end, and column tile."""
        unit = block + index * self.blocks
        tile = lax.div(unit, jnp.int32(self.column_tiles))
        group = _last_group(table, tile, self.groups)
        row = table[group] + (tile - self._tiles_before(table, group)) * self.tile_rows
        return group, row, table[group + 1] - row, unit - tile * self.column_tiles

    def _tiles_before(self, table, group):
        return table[group + (self.groups + 2)]


def num_blocks() -> int:
    """Blocks of the grid, one for each multiprocessor of the device that a program is for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device and device.num_cores:
        return device.num_cores
    device = backend.get_default_device()
    return device.core_count if device.platform == "gpu" else MULTIPROCESSORS


def _last_group(table, tile, groups):
    """The last group, `groups` for the rows behind them, with no more row tiles before it than `tile`.

    The lanes of a warp look at all groups at once: a search takes several times longer, and nothing can be fetched
    before a block knows its first unit.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT),
    )
    def run(_, table, tile):
        tile, count = tile.registers.item(), const(0)
        lane = arith.remui(utils.thread_idx(), const(32))
        for first in range(1, groups + 1, 32):
            group = arith.addi(lane, const(first))
            at = arith.addi(arith.minui(group, const(groups)), const(groups + 2))
            before = memref.load(table, [arith.index_cast(ir.IndexType.get(), at)])
            found = arith.cmpi(arith.CmpIPredicate.sle, before, tile)
            if first + 31 > groups:
                found = arith.andi(found, arith.cmpi(arith.CmpIPredicate.ule, group, const(groups)))
            count = arith.addi(count, arith.extui(const(0).type, found))
        count = utils.redux(count, const(-1), nvvm.ReductionKind.ADD)
        return fragmented_array.FragmentedArray.splat(count, (), is_signed=True)

    return run(table, tile)


def _scan_groups(sizes, table, rows, tile_m):
    """Fills `table` with the rows before each group (groups + 2 entries), then the row tiles (groups + 2 entries).

    In both, entry `groups` is for the rows behind the last group, and the next entry for the end of the array. The last
    8 words of `table` are scratch. One warpgroup runs this; each thread handles consecutive groups.
    """
    groups = sizes.shape[0]
    per_thread = pl.cdiv(groups, 128)
    tiles_at, scratch_at = groups + 2, 2 * (groups + 2)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2)
    def run(_, sizes, table):
        def load(ref, at):
            return memref.load(ref, [arith.index_cast(ir.IndexType.get(), at)])

        def store(value, at):
            memref.store(value, table, [arith.index_cast(ir.IndexType.get(), at)])

        def tiles_of(size):
            return arith.divui(arith.addi(size, const(tile_m - 1)), const(tile_m))

        def less(a, b):
            return arith.cmpi(arith.CmpIPredicate.slt, a, b)

        thread = arith.remui(utils.thread_idx(), const(128))
        lane, warp = arith.remui(thread, const(32)), arith.divui(thread, const(32))
        first = arith.muli(thread, const(per_thread))
        own = []
        for i in range(per_thread):
            at = arith.addi(first, const(i))
            size = load(sizes, arith.minui(at, const(groups - 1)))
            size = arith.minsi(arith.maxsi(size, const(0)), const(rows))
            size = arith.select(less(at, const(groups)), size, const(0))
            own.append((size, tiles_of(size)))
        sums = [functools.reduce(arith.addi, column) for column in zip(*own, strict=True)]
        inclusive = list(sums)
        for distance in (1, 2, 4, 8, 16):
            for j in range(2):
                below = nvvm.shfl_sync(const(-1), inclusive[j], const(distance), const(0), nvvm.ShflKind.up)
                inclusive[j] = arith.addi(inclusive[j], arith.select(less(lane, const(distance)), const(0), below))
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, lane, const(31))):
            for j in range(2):
                store(inclusive[j], arith.addi(arith.muli(warp, const(2)), const(scratch_at + j)))
        utils.warpgroup_barrier()
        before = [arith.subi(a, b) for a, b in zip(inclusive, sums, strict=True)]
        totals = [const(0), const(0)]
        for other in range(4):
            for j in range(2):
                part = load(table, const(scratch_at + 2 * other + j))
                totals[j] = arith.addi(totals[j], part)
                before[j] = arith.addi(before[j], arith.select(less(const(other), warp), part, const(0)))
        for i in range(per_thread):
            at = arith.addi(first, const(i))
            with utils.when(less(at, const(groups))):
                store(arith.minsi(before[0], const(rows)), at)
                store(before[1], arith.addi(at, const(tiles_at)))
            before = [arith.addi(a, b) for a, b in zip(before, own[i], strict=True)]
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, thread, const(0))):
            # Groups that do not fit any more end at the last row, so no unit of theirs multiplies or stores a row.
            totals[0] = arith.minsi(totals[0], const(rows))
            behind = arith.subi(const(rows), totals[0])
            store(totals[0], const(groups))
            store(totals[1], const(tiles_at + groups))
            store(const(rows), const(groups + 1))
            store(arith.addi(totals[1], tiles_of(behind)), const(tiles_at + groups + 1))

    run(sizes, table)
