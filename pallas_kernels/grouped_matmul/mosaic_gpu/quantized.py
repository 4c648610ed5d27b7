"""Grouped matmul with matrices of fewer bits for Hopper GPUs (Pallas Mosaic GPU, sm_90a).

The weights are the left operand of wgmma, in registers, and the rows of activations are the right one, in shared
memory. So a tile of few rows wastes nothing, and what a thread reads of the weights becomes bfloat16 where it is used:
`fragments` says how. No copy of the numbers is made anywhere.

The kernel is persistent, over the same `units` as the one for bfloat16. A producer warpgroup streams tiles of weights
and of activations through a ring of stages with TMA, `STEP` inputs at a time. Each consumer takes 64 columns of both
halves of the column tile: neighbours, or a gate's and up's. The two products of a step start from zero; their float32
sums are multiplied by the scales of their outputs and added to those before. So every row has the sums of the same
numbers in the same order, whatever the tiling and wherever the row lies.

Of few rows a step takes longer than its bytes take to arrive: words are loaded, converted, multiplied, and each waits
for the one before. So up to four warpgroups share the inputs of the same columns and take steps in turn. The sums lie
in shared memory and go round: who has multiplied step i waits for the turn, adds, and passes the turn on to step i + 1.
The order of the sums stays that of the steps.

With `gate_up_silu` a gate and its up are in the registers of two lanes of a warp, which exchange half of them.

With rows in float8 both operands stay float8, and the tensor cores multiply twice as fast. A step's products are scaled
by the weights' block and by the row. `gate_up_silu` then writes float8 too: both consumers together have 128 columns of
a row, for which there is one scale.
"""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.hopper import SHARED_BYTES
from pallas_kernels.gpu.wgmma import FRAGMENT, ROWS, finish_dots
from pallas_kernels.grouped_matmul.mosaic_gpu.fragments import STEP
from pallas_kernels.grouped_matmul.mosaic_gpu.steps import (
    SCALES_START,
    add_float8_products,
    add_in_turn,
    add_scaled,
    load_scales,
    release,
    start_products,
    store,
    store_float8,
)
from pallas_kernels.grouped_matmul.mosaic_gpu.units import MAX_GROUPS, Units, num_blocks

_SLAB_BYTES = 128
"""Bytes of activations in one swizzled row."""
_SCALES_STEP = 32
"""The number of rows' scales that a copy takes is a multiple: a byte for each thread of the producer."""
_COLUMNS = 64
"""Columns that a consumer takes of each half of a column tile."""
_SHARED_ROWS = 16
"""Most rows of a tile whose sums go round."""


@dataclasses.dataclass(frozen=True)
class QuantizedConfig:
    """How the kernel is tiled.

    Attributes:
      consumers: consumers per block, 1 or 2. A column tile has two halves of 64 columns for each.
      rows: rows of a row tile, 8, 16, 32 or 64; of rows in float8 128 too.
      parts: warpgroups of a consumer, which share its inputs: 1; with at most 16 rows in bfloat16 2 too, and 4 with one
        consumer.
    """

    consumers: int
    rows: int
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Scales:
    """How scales `[e, row blocks, column blocks]` lie.

    Attributes:
      inputs: inputs that share a scale, a multiple of `STEP`; None for all.
      outputs: outputs that share a scale: 1, or a multiple of 64.
    """

    inputs: int | None
    outputs: int


def quantized_grouped_matmul(
    lhs: jax.Array,
    lhs_scales: jax.Array | None,
    rhs: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    group_sizes: jax.Array,
    *,
    block: tuple[int, int],
    dtype: Any = None,
    config: QuantizedConfig | None = None,
) -> jax.Array:
    """See `quantized.quantized_grouped_matmul`. Scales are factors on float32 sums, and are not rounded.

    Args:
      lhs: bfloat16 `[rows, in]`, in a multiple of 128; or float8_e4m3fn, with lhs_scales, for rhs of float8_e4m3fn with
        at least 64 outputs a scale, where what is no number stays none.
      lhs_scales: float32 `[rows, in / 128]`, or None.
      rhs: float8_e4m3fn or int8 `[e, in, out]`, or uint8 `[e, in / 2, out]`, out a multiple of 128. A float8 that is no
        number counts as 480 with its sign.
      scales: bfloat16, float16 or float32 `[e, row blocks, column blocks]`.
      zeros: None.
      group_sizes: int32 `[e]`.
      block: inputs and outputs that share a scale. Inputs are all, or a multiple of 128; outputs are 1, all, or a
        multiple of 64.
      dtype: bfloat16 where lhs has scales.
      config: tiling, chosen from the shapes if None. It changes no bit of the result.

    Returns:
      bfloat16 `[rows, out]`; rows behind the last group are zero.

    Raises:
      NotImplementedError: dtypes, sizes or blocks that the kernel does not take.
    """
    row_scales = _scales_of_rows(lhs, lhs_scales, dtype)
    return _call(lhs, row_scales, rhs, scales, zeros, group_sizes, block, fused=False, config=config)


def quantized_expert_mlp(
    lhs: jax.Array,
    lhs_scales: jax.Array | None,
    gate_up: jax.Array,
    gate_up_scales: jax.Array,
    gate_up_zeros: jax.Array | None,
    down: jax.Array,
    down_scales: jax.Array,
    down_zeros: jax.Array | None,
    group_sizes: jax.Array,
    *,
    gate_up_block: tuple[int, int],
    down_block: tuple[int, int],
    dtype: Any = None,
) -> jax.Array:
    """See `quantized.quantized_expert_mlp`; arguments as for `quantized_grouped_matmul`. Two launches."""
    row_scales = _scales_of_rows(lhs, lhs_scales, dtype)
    gate_up_arrays = gate_up, gate_up_scales, gate_up_zeros
    inner = _call(lhs, row_scales, *gate_up_arrays, group_sizes, gate_up_block, fused=True)
    inner, row_scales = (inner, None) if lhs_scales is None else inner
    return _call(inner, row_scales, down, down_scales, down_zeros, group_sizes, down_block, fused=False)


def _scales_of_rows(lhs: jax.Array, scales: jax.Array | None, dtype: Any) -> jax.Array | None:
    """As the kernel takes and writes them, those of neighbouring rows together: float32 `[in / 128, rows or more]`."""
    if (lhs.dtype if scales is None else dtype) != jnp.bfloat16:
        raise NotImplementedError(f"only bfloat16 rows, not {lhs.dtype if scales is None else dtype}")
    return None if scales is None else jnp.pad(scales.T, ((0, 0), (0, _scale_columns(len(lhs)) - len(lhs))))


def _scale_columns(rows: int) -> int:
    """Rows with room for one copy, and so that lines are of a multiple of 16 bytes, as TMA wants them."""
    return max(rows + -rows % SCALES_START, _SCALES_STEP)


def default_config(rows: int, groups: int, columns: int, fused: bool, blocks: int, float8: bool) -> QuantizedConfig:
    """A tiling for these sizes. `columns` are the output's; `float8` says that the rows are in float8.

    Raises:
      NotImplementedError: no column tile divides the columns.
    """
    each = rows / groups
    tile = next((tile for tile, most in ((8, 2), (16, 6), (32, 16), (64, 64)) if each <= most), 128 if float8 else 64)
    narrow = _COLUMNS if fused else 2 * _COLUMNS
    if columns % narrow:
        raise NotImplementedError(f"the output's columns ({columns}) must be a multiple of {narrow}")
    tiles = columns // (2 * narrow)
    shared = tile <= _SHARED_ROWS and not float8
    wide = columns % (2 * narrow) == 0 and min(rows, groups) * tiles >= (4 if shared else 2) * blocks
    consumers = 2 if wide else 1
    return QuantizedConfig(consumers, tile, 4 // consumers if shared else 1)


def _call(lhs, row_scales, rhs, scales, zeros, group_sizes, block, *, fused, config=None):
    (rows, k), (groups, _, n) = lhs.shape, rhs.shape
    if zeros is not None:
        raise NotImplementedError("no matrices with zero points")
    if not 1 <= groups <= MAX_GROUPS:
        raise NotImplementedError(f"at most {MAX_GROUPS} groups, not {groups}")
    if rows == 0 or k == 0 or k % STEP:
        raise NotImplementedError(f"needs a row, and a multiple of {STEP} contracted elements, not {lhs.shape}")
    layout, float8 = _scales_layout(k, n, block), row_scales is not None
    if float8 and (rhs.dtype != jnp.float8_e4m3fn or layout.outputs == 1):
        raise NotImplementedError(
            f"rows in float8 need matrices in float8_e4m3fn with a scale for {_COLUMNS} outputs at least, "
            f"not {rhs.dtype} with one for {layout.outputs}"
        )
    columns = n // 2 if fused else n
    blocks = num_blocks()
    config = config or default_config(rows, groups, columns, fused, blocks, float8)
    if fused and float8:  # A scale is for the columns of both consumers.
        config = dataclasses.replace(config, consumers=2)
    tile = config.consumers * _COLUMNS * (1 if fused else 2)
    shares = (
        not float8 and config.rows <= _SHARED_ROWS and config.parts in (2, 4) and config.consumers * config.parts <= 4
    )
    fits = (
        config.consumers in (1, 2)
        and config.rows in (8, 16, 32, 64, 128 if float8 else 64)
        and (config.parts == 1 or shares)
        and columns % tile == 0
    )
    if not fits:
        raise NotImplementedError(f"{config} does not fit {columns} columns")
    run = _build(rows, k, groups, columns, fused, rhs.dtype, float8, layout, config, blocks)
    return run(group_sizes, lhs, rhs, scales, *([row_scales] if float8 else []))


def _scales_layout(k: int, n: int, block: tuple[int, int]) -> Scales:
    inputs, outputs = block
    if inputs < k and inputs % STEP:
        raise NotImplementedError(f"a scale for all inputs, or for a multiple of {STEP}, not for {inputs}")
    if outputs < n and outputs != 1 and outputs % _COLUMNS:
        raise NotImplementedError(f"a scale for 1 output, for all, or for a multiple of {_COLUMNS}, not for {outputs}")
    return Scales(inputs if inputs < k else None, outputs if outputs < n else -(-n // _COLUMNS) * _COLUMNS)


def own_steps(part, unit, k_steps, parts):
    """The first step of a block's unit that a part takes, and how many. Of all units it takes every `parts`-th."""
    first = lax.rem(part + unit * (-k_steps % parts), jnp.int32(parts))
    return first, lax.div(k_steps - first + (parts - 1), jnp.int32(parts))


@functools.lru_cache
def _build(rows, k, groups, columns, fused, dtype, float8, layout, config, blocks):
    """Returns the kernel `(group_sizes, lhs, rhs, scales) -> out` for these sizes.

    With `float8`, lhs is float8_e4m3fn and the kernel takes its scales `[in / 128, rows or more]` behind the others. If
    it is `fused` too, out and such scales of out are returned. Those of rows behind the last group may be anything.
    """
    bf16, dtype = jnp.dtype(jnp.bfloat16), jnp.dtype(dtype)
    lhs_dtype = jnp.dtype(jnp.float8_e4m3fn) if float8 else bf16
    slab = _SLAB_BYTES // lhs_dtype.itemsize
    slabs = STEP // slab
    consumers, tile_rows, parts, rounds = config.consumers, config.rows, config.parts, float8 and fused
    warpgroups = consumers * parts
    width = consumers * _COLUMNS
    stored_rows = STEP // 2 if dtype == jnp.uint8 else STEP
    k_steps = k // STEP
    column_step, half_step = (width, columns) if fused else (2 * width, width)
    # If a group has at most 8 rows, only 8 are fetched.
    lhs_boxes = (8, tile_rows) if tile_rows > 8 else (8,)

    units = Units(rows, groups, tile_rows, columns // column_step, blocks)
    # The first row may be up to SCALES_START - 1 places behind the start of a copy.
    scale_rows = pl.cdiv(tile_rows + SCALES_START - 1, _SCALES_STEP) * _SCALES_STEP
    stage_bytes = 2 * stored_rows * width + tile_rows * STEP * lhs_dtype.itemsize + 4 * scale_rows * float8
    # Each array begins at a multiple of 1,024 bytes.
    free_bytes = SHARED_BYTES - pl.cdiv(4 * units.table_size, 1024) * 1024 - 512 - 1024 * (float8 + rounds)
    totals_shape = consumers, tile_rows // 4, 128, 4
    free_bytes -= 4 * math.prod(totals_shape) * (parts > 1)
    # A part has stages of its own, since it must see each phase of their barriers.
    stages = min(free_bytes // stage_bytes, 2 * max(k_steps, parts), 16) // parts * parts

    weight_transforms = (plgpu.SwizzleTransform(width),)
    lhs_transforms = (plgpu.TilingTransform((8, slab)), plgpu.SwizzleTransform(_SLAB_BYTES))
    lhs_shape = (stages, slabs, tile_rows, slab)
    # The same memory as tiles, for wgmma, and as plain rows, where a copy can begin at any row.
    lhs_views = plgpu.RefUnion(
        plgpu.SMEM(lhs_shape, lhs_dtype, transforms=lhs_transforms),
        plgpu.SMEM(lhs_shape, lhs_dtype, transforms=(plgpu.SwizzleTransform(_SLAB_BYTES),)),
    )

    # Together no more than a block is launched with: 3 * 168, or 5 * 96. A thread would wait for more forever.
    producer_registers, consumer_registers = (32, 112) if warpgroups > 2 else (24, 240) if float8 else (40, 232)

    def body(sizes, lhs, rhs, scales, *refs):
        # With float8, `row_scales` comes first. With `rounds`, a second result follows the first.
        row_scales, out, out_scales = refs[0], refs[float8], refs[float8 + 1]
        lhs_views, weights, table, full, free, ready, *others = refs[float8 + 1 + rounds :]
        own_scales: Any = others[0] if float8 else None
        maxima = others[1] if rounds else None
        shared_totals: Any = others[0] if parts > 1 else None
        lhs_smem, lhs_rows = lhs_views
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _():
            units.scan(sizes, table)
            plgpu.barrier_arrive(ready)

        plgpu.barrier_wait(ready)
        my_units = units.count(table, block)

        @pl.when(warpgroup == warpgroups)
        def _produce():
            if warpgroups > 1:
                plgpu.set_max_registers(producer_registers, action="decrease")

            @pl.loop(0, my_units)
            def _unit(index):
                group, row, left, column_tile = units.locate(table, block, index)

                @pl.when(group < groups)
                def _():
                    @pl.loop(0, k_steps)
                    def _load(step):
                        slot = lax.rem(index * k_steps + step, jnp.int32(stages))
                        plgpu.barrier_wait(free.at[slot])
                        for half in range(2):
                            column = column_tile * column_step + half * half_step
                            plgpu.copy_gmem_to_smem(
                                rhs.at[group, pl.ds(step * stored_rows, stored_rows), pl.ds(column, width)],
                                weights.at[slot, half],
                                full.at[slot],
                            )
                        for number in range(slabs):
                            for i, box in enumerate(lhs_boxes):
                                fits = None
                                if len(lhs_boxes) > 1:
                                    fits = (left <= box) if i == 0 else (left > lhs_boxes[0])
                                plgpu.copy_gmem_to_smem(
                                    lhs.at[pl.ds(row, box), pl.ds(step * STEP + number * slab, slab)],
                                    lhs_rows.at[slot, number, pl.ds(0, box)],
                                    full.at[slot],
                                    predicate=fits,
                                )
                        if float8:
                            start = row - lax.rem(row, jnp.int32(SCALES_START))
                            plgpu.copy_gmem_to_smem(
                                row_scales.at[step, pl.ds(start, scale_rows)], own_scales.at[slot], full.at[slot]
                            )

        @pl.when(warpgroup < warpgroups)
        def _consume():
            if warpgroups > 1:
                plgpu.set_max_registers(consumer_registers, action="increase")
            consumer, part = lax.rem(warpgroup, consumers), lax.div(warpgroup, consumers)

            @pl.when(part == 0)
            def _():
                for slot in range(stages):
                    plgpu.barrier_arrive(free.at[slot])

            my_steps = units.count_with_matrix(table, block) * k_steps
            nothing = plgpu.layout_cast(jnp.zeros((ROWS, tile_rows), jnp.float32), FRAGMENT)

            @pl.loop(0, my_units)
            def _unit(index):
                group, row, left, column_tile = units.locate(table, block, index)
                column = column_tile * column_step

                def factors(step):
                    at = 0 if layout.inputs is None else lax.div(step * STEP, jnp.int32(layout.inputs))
                    return load_scales(scales, consumer, group, at, column, half_step, layout.outputs, width, tile_rows)

                def multiply_float8(step, totals):
                    slot = lax.rem(index * k_steps + step, jnp.int32(stages))
                    own = factors(step)
                    plgpu.barrier_wait(full.at[slot])
                    totals = add_float8_products(
                        totals,
                        own,
                        weights.at[slot],
                        lhs_smem.at[slot],
                        own_scales.at[slot],
                        row,
                        consumer,
                        weight_transforms,
                        lhs_transforms,
                        tile_rows,
                    )
                    release()
                    plgpu.barrier_arrive(free.at[slot])
                    return totals

                def start(slot):
                    plgpu.barrier_wait(full.at[slot])
                    return start_products(
                        weights.at[slot], lhs_smem.at[slot], consumer, weight_transforms, lhs_transforms, tile_rows
                    )

                def multiply(step, totals):
                    slot = lax.rem(index * k_steps + step, jnp.int32(stages))
                    own = (None, None) if layout.inputs is None else factors(step)
                    products = start(slot)
                    first = add_scaled(totals[0], finish_dots(products[0], 1), own[0])
                    second = finish_dots(products[1], 0)
                    release()
                    plgpu.barrier_arrive(free.at[slot])
                    return first, add_scaled(totals[1], second, own[1])

                def multiply_in_turn(step):
                    number = index * k_steps + step
                    slot = lax.rem(number, jnp.int32(stages))
                    own = None if layout.inputs is None else factors(step)
                    products = start(slot)
                    products = finish_dots(products[0], 1), finish_dots(products[1], 0)
                    release()
                    plgpu.barrier_arrive(free.at[slot])
                    return add_in_turn(
                        shared_totals.at[consumer],
                        products,
                        own,
                        warpgroup,
                        step > 0,
                        number > 0,
                        number + 1 < my_steps,
                        warpgroups,
                        consumers,
                    )

                def store_totals(totals, own=None):
                    if layout.inputs is None and not float8:
                        own = own or factors(0)
                        totals = tuple(add_scaled(nothing, each, f) for each, f in zip(totals, own, strict=True))
                    if rounds:
                        store_float8(out, out_scales, maxima, totals, consumer, row, left, column, width)
                    else:
                        store(out, totals, consumer, row, left, column, half_step, width, fused)

                @pl.when(group < groups)
                def _():
                    if parts == 1:
                        step = multiply_float8 if float8 else multiply
                        store_totals(lax.fori_loop(0, k_steps, step, (nothing, nothing)))
                        return
                    first, count = own_steps(part, index, k_steps, parts)
                    # Loaded now, they are there when the last step ends.
                    own = factors(0) if layout.inputs is None else None

                    @pl.loop(0, count)
                    def _(at):
                        step = first + at * parts
                        totals = multiply_in_turn(step)

                        @pl.when(step == k_steps - 1)
                        def _():
                            store_totals(totals, own)

                if not rounds:

                    @pl.when((group == groups) & (part == 0))
                    def _():
                        store(out, (nothing, nothing), consumer, row, left, column, half_step, width, fused)

    out_type = jax.ShapeDtypeStruct((rows, columns), lhs_dtype if rounds else bf16)
    if rounds:
        out_type = out_type, jax.ShapeDtypeStruct((columns // width, _scale_columns(rows)), jnp.float32)
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            lhs_views,
            plgpu.SMEM((stages, 2, stored_rows, width), dtype, transforms=weight_transforms),
            plgpu.SMEM((units.table_size,), jnp.int32),
            plgpu.Barrier(num_arrivals=2 + slabs * len(lhs_boxes) + float8, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
            plgpu.Barrier(),
            *([plgpu.SMEM((stages, scale_rows), jnp.float32)] if float8 else []),
            *([plgpu.SMEM((tile_rows,), jnp.int32)] if rounds else []),
            *([plgpu.SMEM(totals_shape, jnp.float32)] if parts > 1 else []),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
