"""Attention to lists of positions on TPUs, as in decode: one copy from HBM for every selected position.

The keys and values of all heads of a position are one contiguous row of its page, a `[2 * k, d]` tile. So a selected
position costs one copy. Eight entries of a list whose rows are neighbours cost one copy together. A list is cut into
steps. While a step is multiplied, the copies of the step after the next one are started, which may be the next
query's. Row numbers are trusted: checks of their bounds would cost more than the copies. A kernel before finds them: it
looks positions up in the page table by permutations of lanes, for which XLA would take longer than attention does.

A step's rows are one matrix `[step * 2 * k, d]` as they lie in memory, and all heads are multiplied by all of it. A
mask keeps the logits of a head's own keys, and a shift by k lanes turns a key's weight into its value's. Without a
shift of rows, this costs less than taking heads apart. Logits of one step and values of the step before are
independent, so their products overlap.

One query alone fills few rows of a matrix unit. For prefill, where neighbouring queries can share reads,
`topk_attention` has a kernel of its own.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import LANES, MASKED, check_attention, precision, result_like

_STEP = 128
"""Positions that are multiplied at once."""
_RING = 4
"""Steps whose rows are in VMEM: two are multiplied, and two are on their way."""
_AHEAD = 2
TURN = _RING * _STEP
"""Most entries of a turn of the loop."""
_RUN = 8
"""Neighbouring positions that are one copy."""
_LISTS = 8
"""Lists that one grid step looks up."""


def sparse_attention(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    page_table: jax.Array,
    kv_scales: jax.Array | None = None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.sparse_attention`.

    Raises:
      NotImplementedError: scales, or dtypes or sizes that the kernel does not take.
    """
    if kv_scales is not None:
        raise NotImplementedError("keys and values have scales")
    batch, queries, heads, dim = q.shape
    page_size, width, top_k = kv.shape[1], kv.shape[2], indices.shape[-1]
    check_attention(q, kv)
    if LANES % width:
        raise NotImplementedError(f"takes rows of keys and values whose number divides {LANES}, not {width}")
    total = batch * queries
    step = min(_STEP, pl.next_power_of_2(pl.cdiv(top_k, _RING)))
    step = max(step, LANES // width, _RUN)
    lists = jnp.where((indices >= 0) & (indices < page_table.shape[1] * page_size), indices, -1)
    lists = jnp.pad(lists, ((0, 0), (0, 0), (0, -top_k % max(_RING * step, LANES))), constant_values=-1)
    length = lists.shape[2]
    # Turns behind the last valid entry are neither copied nor multiplied.
    used = jnp.max(jnp.where(lists >= 0, jnp.arange(length) + 1, 0), axis=-1).reshape(total)
    rows = _look_up(lists.reshape(batch, queries, -1, LANES), jnp.clip(page_table, 0, kv.shape[0] - 1), page_size)
    out, lse = _attend(
        q.reshape(total, heads, dim),
        kv.reshape(-1, width, dim),
        rows.reshape(total, 1, length),
        lists.reshape(total, -1, LANES),
        jnp.maximum(pl.cdiv(used, _RING * step), 1).astype(jnp.int32),
        step=step,
        scale=scale,
    )
    return out.reshape(q.shape), lse[..., 0].reshape(q.shape[:3])


@functools.partial(jax.jit, static_argnames="page_size")
def _look_up(lists: jax.Array, page_table: jax.Array, page_size: int) -> jax.Array:
    """Rows of the flattened pages that hold the positions of lists, with marked runs.

    Args:
      lists: int32 `[b, t, l / 128, 128]`; -1 counts as 0.
      page_table: int32 `[b, m]`.

    Returns:
      the shape of lists; `-1 - row` for the first of each group of eight that are neighbours.
    """
    batch, queries = lists.shape[:2]
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % LANES))).reshape(batch, -1, LANES)
    # Lists of one grid step: of as many sequences, or of one.
    sequences, per_sequence = (min(batch, _LISTS), 1) if queries == 1 else (1, min(queries, _LISTS))

    def kernel(lists: Any, table: Any, out: Any) -> None:
        for sequence, query in itertools.product(range(sequences), range(per_sequence)):
            position = jnp.maximum(lists[sequence, query], 0)
            page, lane = lax.div(position, page_size), lax.broadcasted_iota(jnp.int32, position.shape, 1)
            table_row, table_lane = lax.div(page, LANES), lax.rem(page, LANES)

            def look(row: Any, found: jax.Array, *, table_row=table_row, table_lane=table_lane, sequence=sequence):
                entries = jnp.broadcast_to(table[sequence, pl.ds(row, 1)], found.shape)
                entries = jnp.take_along_axis(entries, table_lane, axis=1, mode="promise_in_bounds")
                return jnp.where(table_row == row, entries, found)

            pages = lax.fori_loop(0, table.shape[1], look, jnp.zeros_like(position), unroll=True)
            rows = pages * page_size + lax.rem(position, page_size)
            # Of a group, lane by lane, whether a row is the next of the one before; then whether all are.
            place = lax.rem(lane, _RUN)
            run = ((place == 0) | (rows == pltpu.roll(rows, 1, 1) + 1)).astype(jnp.int32)
            for shift in (1, 2, 4):
                run &= pltpu.roll(run, LANES - shift, 1)
            out[sequence, query] = jnp.where((run > 0) & (place == 0), -1 - rows, rows)

    def of(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda i, j: (i, j, 0, 0))

    lists_of_step = of(sequences, per_sequence, *lists.shape[2:])
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(batch, sequences), pl.cdiv(queries, per_sequence)),
        in_specs=[lists_of_step, pl.BlockSpec((sequences, *table.shape[1:]), lambda i, j: (i, 0, 0))],
        out_specs=lists_of_step,
        out_shape=result_like(lists, lists.shape, jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="page_rows",
    )(lists, table)


def _turns(turns: Any, row: jax.Array) -> jax.Array | int:
    return turns[row]


@functools.partial(jax.jit, static_argnames=("step", "scale"))
def _attend(
    q: jax.Array,
    rows: jax.Array,
    slots: jax.Array,
    lists: jax.Array,
    turns: jax.Array,
    *,
    step: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q `[r, n, d]` to `rows [slots, 2 * k, d]`, and log-sum-exps `[r, n, 128]`, the same in all lanes.

    `slots [r, 1, l]` has rows with marked runs, and `lists [r, l / 128, 128]` numbers from 0 for entries that count.
    """
    total, heads, dim = q.shape
    width, length = rows.shape[1], slots.shape[2]
    kv_heads, tiles = width // 2, step * width // LANES
    # A device of two cores shares the queries.
    parts = math.gcd(total, 2)
    part = total // parts
    dot = functools.partial(lax.dot_general, precision=precision(q.dtype), preferred_element_type=jnp.float32)

    def kernel(turns, q, here, following, lists, rows, out, lse, *scratch):
        *buffers, logits, acc, largest, weight, done = scratch
        row = pl.program_id(0) * part + pl.program_id(1)
        last_turn = _turns(turns, row) - 1

        def start(slots: Any, first: jax.Array | int, slot: int) -> None:
            """Starts the copies of the step whose entries begin at `first`."""

            def copy(row: jax.Array, place: int, size: int) -> None:
                target = buffers[slot].at[pl.ds(place, size)]
                pltpu.make_async_copy(rows.at[pl.ds(row, size)], target, done.at[slot]).start()

            for place in range(0, step, _RUN):
                entry = slots[0, 0, first + place]

                @pl.when(entry < 0)
                def _(entry: jax.Array = entry, place: int = place) -> None:
                    copy(-1 - entry, place, _RUN)

                @pl.when(entry >= 0)
                def _(place: int = place) -> None:
                    for i in range(place, place + _RUN):
                        copy(slots[0, 0, first + i], i, 1)

        def wait(slot: int) -> None:
            """One wait for the bytes of all copies of a step."""
            pltpu.make_async_copy(buffers[slot], buffers[slot], done.at[slot]).wait()

        def matrix(slot: int) -> jax.Array:
            return buffers[slot][...].reshape(step * width, dim)

        head = lax.broadcasted_iota(jnp.int32, (heads, LANES), 0)
        lane = lax.broadcasted_iota(jnp.int32, (heads, LANES), 1)
        own = lax.rem(lane, width) == lax.div(head, heads // kv_heads)
        # The entry of each lane of a step's tiles, counted from the step's first.
        shape = max(tiles, 8), LANES
        entry = lax.broadcasted_iota(jnp.int32, shape, 0) * (LANES // width)
        entry = lax.rem(entry + lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), width), step)

        def multiply_keys(number: jax.Array | int, slot: int) -> None:
            dots = dot(q[0], matrix(slot), (((1,), (1,)), ((), ()))) * scale
            first = number * step
            entries = jnp.broadcast_to(lists[0, pl.ds(lax.div(first, LANES), 1)], entry.shape)
            counts = jnp.take_along_axis(entries, lax.rem(first, LANES) + entry, axis=1, mode="promise_in_bounds")
            for tile in range(tiles):
                of_tile = dots[:, tile * LANES : (tile + 1) * LANES]
                logits[slot % 2, :, tile * LANES : (tile + 1) * LANES] = jnp.where(
                    own & (counts[tile : tile + 1] >= 0), of_tile, MASKED
                )

        def multiply_values(slot: int, keep: jax.Array | bool) -> None:
            old = largest[...]
            tile_logits = [logits[slot % 2, :, i * LANES : (i + 1) * LANES] for i in range(tiles)]
            new = jnp.maximum(old, jnp.max(functools.reduce(jnp.maximum, tile_logits), axis=1, keepdims=True))
            weights = [jnp.exp(tile - new) for tile in tile_logits]
            correction = jnp.exp(old - new)
            shifted = jnp.concatenate([pltpu.roll(tile, kv_heads, 1) for tile in weights], axis=1).astype(q.dtype)
            part = dot(shifted, matrix(slot), (((1,), (0,)), ((), ())))
            acc[...] = jnp.where(keep, acc[...] * correction[:, :dim] + part, 0.0)
            # The total is kept per lane. The lanes are added at the end.
            weight[...] = jnp.where(keep, weight[...] * correction + functools.reduce(jnp.add, weights), 0.0)
            largest[...] = jnp.where(keep, new, MASKED)

        def turn(number: jax.Array | int, *, last: bool) -> None:
            for slot in range(_RING):
                done_before, ahead = (slot - 1) % _RING, (slot + _AHEAD) % _RING
                wait(slot)
                multiply_keys(number * _RING + slot, slot)
                if last and slot + _AHEAD >= _RING:
                    start(following, (slot + _AHEAD - _RING) * step, ahead)
                else:
                    start(here, (number * _RING + slot + _AHEAD) * step, ahead)
                # Before a query's first step there are no values, and what it adds up is cleared.
                multiply_values(done_before, slot > 0 or number > 0)

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            for slot in range(_AHEAD):
                start(here, slot * step, slot)

        lax.fori_loop(0, last_turn, lambda number, _: turn(number, last=False), None)
        turn(last_turn, last=True)
        multiply_values(_RING - 1, True)

        @pl.when(pl.program_id(1) == part - 1)
        def _() -> None:
            for slot in range(_AHEAD):
                wait(slot)

        # A query that selected nothing has attended only to masked rows.
        found, sums = largest[...] > MASKED / 2, jnp.sum(weight[...], axis=1, keepdims=True)
        out[0] = jnp.where(found[:, :dim], acc[...] / sums, 0.0).astype(out.dtype)
        lse[0] = jnp.where(found, largest[...] + jnp.log(sums), -jnp.inf)

    def of_row(*shape: int, space: pltpu.MemorySpace = pltpu.VMEM, ahead: int = 0) -> pl.BlockSpec:
        def index(i: jax.Array, j: jax.Array, *_: Any) -> tuple[Any, ...]:
            return (i * part + jnp.minimum(j + ahead, part - 1), *(0 for _ in shape))

        return pl.BlockSpec((1, *shape), index, memory_space=space)

    elements = total * length * heads
    state = pltpu.VMEM((heads, LANES), jnp.float32)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(parts, part),
            in_specs=[
                of_row(heads, dim),
                of_row(1, length, space=pltpu.SMEM),
                of_row(1, length, space=pltpu.SMEM, ahead=1),
                of_row(*lists.shape[1:]),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=[of_row(heads, dim), of_row(heads, LANES)],
            scratch_shapes=[
                *[pltpu.VMEM((step, width, dim), rows.dtype)] * _RING,
                pltpu.VMEM((2, heads, step * width), jnp.float32),
                pltpu.VMEM((heads, dim), jnp.float32),
                state,
                state,
                pltpu.SemaphoreType.DMA((_RING,)),
            ],
        ),
        out_shape=[
            result_like(q, q.shape, q.dtype),
            result_like(q, (total, heads, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(
            flops=4 * elements * dim,
            bytes_accessed=total * length * width * dim * rows.dtype.itemsize,
            transcendentals=elements,
        ),
        name="sparse_attention",
    )(turns, q, slots, slots, lists, rows)
