"""Attention to lists of positions on TPUs, as in decode: one copy from HBM for every selected position.

The keys and values of all heads of a position are one contiguous row of its page, a `[2 * k, d]` tile. So a selected
position costs one copy. Eight entries of a list whose rows are neighbours cost one copy together. A list is cut into
steps. While a step is multiplied, the copies of the step after the next one are started, which may be the next
query's. Row numbers are trusted: checks of their bounds would cost more than the copies.

A step's rows are one matrix `[step * 2 * k, d]` as they lie in memory, and all heads are multiplied by all of it. A
mask keeps the logits of a head's own keys, and a shift by k lanes turns a key's weight into its value's. Without a
shift of rows, this costs less than taking heads apart. Logits of one step and values of the step before are
independent, so their products overlap.

One query alone fills few rows of a matrix unit. For prefill, where neighbouring queries can share reads,
`topk_attention` has a kernel of its own.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import paging
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
    unit = max(LANES // width, _RUN)
    step = min(_STEP, pl.cdiv(top_k, _RING * unit) * unit)
    lists = indices.reshape(total, top_k)
    lists = jnp.where((lists >= 0) & (lists < page_table.shape[1] * page_size), lists, -1)
    lists = jnp.pad(lists, ((0, 0), (0, -top_k % (_RING * step))), constant_values=-1)
    valid, length = lists >= 0, lists.shape[1]
    table = jnp.clip(page_table, 0, kv.shape[0] - 1)
    slots = paging.slots(table, jnp.maximum(lists, 0).reshape(batch, queries, -1), page_size).reshape(total, -1)
    # Turns behind the last valid entry are neither copied nor multiplied.
    used = jnp.max(jnp.where(valid, jnp.arange(length) + 1, 0), axis=-1)
    out, lse = _attend(
        q.reshape(total, heads, dim),
        kv.reshape(-1, width, dim),
        _mark_runs(slots)[:, None],
        jnp.repeat(valid.astype(jnp.float32), width, axis=1).reshape(total, -1, LANES),
        jnp.maximum(pl.cdiv(used, _RING * step), 1).astype(jnp.int32),
        step=step,
        scale=scale,
    )
    return out.reshape(q.shape), lse[..., 0].reshape(q.shape[:3])


def _mark_runs(slots: jax.Array) -> jax.Array:
    """`slots [r, l]` of rows with `-1 - first` for the first of each group of eight that are neighbours."""
    groups = slots.reshape(slots.shape[0], -1, _RUN)
    runs = jnp.all(groups == groups[..., :1] + jnp.arange(_RUN), axis=-1, keepdims=True)
    return jnp.where(runs & (jnp.arange(_RUN) == 0), -1 - groups, groups).reshape(slots.shape)


def _turns(turns: Any, row: jax.Array) -> jax.Array | int:
    return turns[row]


@functools.partial(jax.jit, static_argnames=("step", "scale"))
def _attend(
    q: jax.Array,
    rows: jax.Array,
    slots: jax.Array,
    valid: jax.Array,
    turns: jax.Array,
    *,
    step: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q `[r, n, d]` to `rows [slots, 2 * k, d]`, and log-sum-exps `[r, n, 128]`, the same in all lanes.

    `slots [r, 1, l]` has rows with marked runs, and `valid [r, l * 2 * k / 128, 128]` a number above 0 for each
    row of an entry that counts.
    """
    total, heads, dim = q.shape
    width, length = rows.shape[1], slots.shape[2]
    kv_heads, tiles = width // 2, step * width // LANES
    # A device of two cores shares the queries.
    parts = math.gcd(total, 2)
    part = total // parts
    dot = functools.partial(jax.lax.dot_general, precision=precision(q.dtype), preferred_element_type=jnp.float32)

    def kernel(turns, q, here, following, valid, rows, out, lse, *scratch):
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

        head = jax.lax.broadcasted_iota(jnp.int32, (heads, LANES), 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, (heads, LANES), 1)
        own = jax.lax.rem(lane, width) == jax.lax.div(head, heads // kv_heads)

        def multiply_keys(number: jax.Array | int, slot: int) -> None:
            dots = dot(q[0], matrix(slot), (((1,), (1,)), ((), ()))) * scale
            counts = valid[0, pl.ds(number * tiles, tiles)] > 0
            for tile in range(tiles):
                of_tile = dots[:, tile * LANES : (tile + 1) * LANES]
                logits[slot % 2, :, tile * LANES : (tile + 1) * LANES] = jnp.where(
                    own & counts[tile : tile + 1], of_tile, MASKED
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

        jax.lax.fori_loop(0, last_turn, lambda number, _: turn(number, last=False), None)
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
                of_row(*valid.shape[1:]),
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
    )(turns, q, slots, slots, valid, rows)
