"""Index scores of one query per sequence, as in decode: the time is that of reading the keys.

A grid step scores a step of one sequence's keys. The pages of the next two steps are on their way meanwhile, and the
next steps may be the next sequence's. So memory idles only at the beginning.

Rows of 128 elements are multiplied as they lie in memory, with one or two keys each. Eight blocks of keys stand beside
each other in the depth of a product: two keys of a row, and rows 128 apart. A head has eight rows of queries, one for
each block, which are zero where the other blocks' keys are. So a product gives registers of one head and eight blocks.
The sum over heads adds whole registers, and its result is dense. Of rows with two keys, the scores are put into the
order of positions by one permutation of lanes.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import LANES, result_like, vmem_limit

_BLOCKS = 8
"""Blocks of keys in the depth of a product: the rows of a register."""
_COLUMNS = 256
"""Keys of a block: the width of the larger systolic arrays."""
TILE = _BLOCKS * _COLUMNS
"""Keys of a product."""
_STEP = 32_768
"""Most keys of a grid step."""
_BUFFERS = 3
"""Steps in VMEM: one is multiplied, and two are on their way."""


def _seen_tiles(seen: jax.Array, tiles: int) -> jax.Array | int:
    """How many tiles of a step have positions up to `seen`."""
    return lax.div(jnp.clip(seen, -1, tiles * TILE - 1) + TILE, TILE)


def decode_scores(
    q: jax.Array,
    gates: jax.Array,
    keys: jax.Array,
    page_table: jax.Array,
    query_start: jax.Array,
    key_scales: jax.Array | None,
    *,
    page_size: int,
) -> jax.Array:
    """Scores of every key for one query of each sequence, -inf after its own position.

    Args:
      q: bfloat16 `[b, n, d]`.
      gates: float32 `[b, n]`, scaled.
      keys: `[p, page_size * d / 128, 128]`, bfloat16 or float8.
      page_table: int32 `[b, m]`, from 0 to p - 1.
      query_start: int32 `[b]`, each query's position.
      key_scales: float32 `[p, page_size]`, or None.

    Returns:
      float32 `[b, m * page_size]`.
    """
    batch, _, dim = q.shape
    length = page_table.shape[1] * page_size
    step = min(_STEP, pl.cdiv(length, TILE) * TILE)
    steps = pl.cdiv(length, step)
    table = jnp.pad(page_table, ((0, 0), (0, steps * step // page_size - page_table.shape[1])))
    scales = []
    if key_scales is not None:
        # They are few bytes, so XLA puts them into the order of positions.
        scales = [key_scales.astype(jnp.float32)[table].reshape(batch, -1, LANES)]
    scores = _score(
        jnp.tile(q, (1, 1, LANES // dim)),
        gates[:, :, None],
        keys,
        table[:, None],
        jnp.clip(query_start, -1, length - 1),
        scales,
        step=step,
        page_size=page_size,
        dim=dim,
    )
    return scores.reshape(batch, -1)[:, :length]


@functools.partial(jax.jit, static_argnames=("step", "page_size", "dim"))
def _score(
    q: jax.Array,
    gates: jax.Array,
    keys: jax.Array,
    table: jax.Array,
    query_start: jax.Array,
    scales: list[jax.Array],
    *,
    step: int,
    page_size: int,
    dim: int,
) -> jax.Array:
    """Scores `[b, s / 128, 128]` of s positions, whole steps.

    The arguments are those of `decode_scores`, but q `[b, n, 128]` holds a query once for each key of a row, gates are
    `[b, n, 1]`, the table is `[b, 1, s / page_size]`, and scales are `[b, s / 128, 128]` in the order of positions.
    """
    batch, heads, _ = q.shape
    steps, tiles, per_row = table.shape[2] * page_size // step, step // TILE, LANES // dim
    tile_rows, page_rows, tile_pages = TILE // per_row, page_size // per_row, TILE // page_size
    groups = _BLOCKS // per_row
    # A device of two cores shares the sequences.
    parts = math.gcd(batch, 2)
    part = batch // parts

    def kernel(query_start, *refs):
        tables, (q, gates, keys) = refs[:_BUFFERS], refs[_BUFFERS : _BUFFERS + 3]
        *scales, out, buffer, queries, spread, done = refs[_BUFFERS + 3 :]
        first_sequence, number = pl.program_id(0) * part, pl.program_id(1) * steps + pl.program_id(2)

        def seen_from(sequence: Any, of_sequence: Any) -> jax.Array:
            """The last position that a sequence's query sees, counted from the first of a step."""
            return query_start[first_sequence + sequence] - of_sequence * step

        def start(ahead: int, sequence: Any, of_sequence: Any, slot: Any) -> None:
            """Starts the copies of a step's tiles of which the query sees something."""
            first = of_sequence * (step // page_size)

            def copy(page: Any) -> None:
                target = buffer.at[slot, pl.ds(page * page_rows, page_rows)]
                pltpu.make_async_copy(keys.at[tables[ahead][0, first + page]], target, done.at[slot]).start()

            def copy_tile(tile: Any, _: Any = None) -> None:
                for page in range(tile_pages):
                    copy(tile * tile_pages + page)

            count = _seen_tiles(seen_from(sequence, of_sequence), tiles)
            # Without a loop a copy takes fewer cycles. At the beginning that is not worth the code.
            unrolled = count == tiles if ahead == _BUFFERS - 1 else False

            @pl.when(unrolled)
            def _() -> None:
                for tile in range(tiles):
                    copy_tile(tile)

            pl.when(jnp.logical_not(unrolled))(lambda: lax.fori_loop(0, count, copy_tile, None))

        @pl.when(number == 0)
        def _() -> None:
            for ahead in range(min(_BUFFERS - 1, part * steps)):
                start(ahead, ahead // steps, ahead % steps, ahead)

        seen = seen_from(pl.program_id(1), pl.program_id(2))
        slot = lax.rem(number, _BUFFERS)

        def wait(tile: Any, size: int) -> None:
            some = buffer.at[slot, pl.ds(tile * tile_rows, size * tile_rows)]
            pltpu.make_async_copy(some, some, done.at[slot]).wait()

        count = _seen_tiles(seen, tiles)
        pl.when(count == tiles)(lambda: wait(0, tiles))
        pl.when(count < tiles)(lambda: lax.fori_loop(0, count, lambda tile, _: wait(tile, 1), None))

        ahead = number + _BUFFERS - 1

        @pl.when(ahead < part * steps)
        def _() -> None:
            start(_BUFFERS - 1, lax.div(ahead, steps), lax.rem(ahead, steps), lax.rem(ahead, _BUFFERS))

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            shape = heads, _BLOCKS, LANES
            wide = jnp.broadcast_to(q[...].astype(jnp.float32)[:, None], shape).reshape(-1, LANES)
            block = lax.rem(lax.broadcasted_iota(jnp.int32, wide.shape, 0), _BLOCKS)
            lane = lax.broadcasted_iota(jnp.int32, wide.shape, 1)
            for group in range(groups):
                own = block == group * per_row + lax.div(lane, dim)
                queries[:, group * LANES : (group + 1) * LANES] = jnp.where(own, wide, 0.0).astype(jnp.bfloat16)
            for head in range(heads):
                spread[head] = jnp.broadcast_to(gates[head : head + 1], (_BLOCKS, LANES))

        pl.when((seen >= 0) & (seen < step - 1))(lambda: _clear_unseen(buffer.at[slot], seen, dim))

        @pl.when(count > 0)
        def _() -> None:
            for tile in range(tiles):
                rows = buffer[slot, pl.ds(tile * tile_rows, tile_rows)].astype(jnp.bfloat16)
                rows = rows.reshape(_COLUMNS // LANES, groups, LANES, LANES)
                by_group = [rows[:, group].reshape(_COLUMNS, LANES) for group in range(groups)]
                dots = lax.dot_general(
                    queries[...],
                    jnp.concatenate(by_group, axis=1),
                    (((1,), (1,)), ((), ())),
                    precision=lax.Precision.DEFAULT,
                    preferred_element_type=jnp.float32,
                ).reshape(heads, _BLOCKS, _COLUMNS)
                for chunk in range(_COLUMNS // LANES):
                    part_of = jnp.maximum(dots[:, :, chunk * LANES : (chunk + 1) * LANES], 0.0)
                    scores = jnp.sum(part_of * spread[...], axis=0)
                    scores = _in_order(scores) if per_row == 2 else scores
                    first = tile * (TILE // LANES) + chunk * _BLOCKS
                    for scale in scales:
                        scores *= scale[first : first + _BLOCKS]
                    position = (first + lax.broadcasted_iota(jnp.int32, scores.shape, 0)) * LANES
                    position += lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                    out[first : first + _BLOCKS] = jnp.where(position <= seen, scores, -jnp.inf)

        @pl.when(count == 0)
        def _() -> None:
            out[...] = jnp.full(out.shape, -jnp.inf, jnp.float32)

    def of_sequence(rows: int, columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, columns), lambda i, s, j, *_: (i * part + s, 0, 0))

    def of_step() -> pl.BlockSpec:
        return pl.BlockSpec((None, step // LANES, LANES), lambda i, s, j, *_: (i * part + s, j, 0))

    def table_of(ahead: int) -> pl.BlockSpec:
        def index(i: jax.Array, s: jax.Array, j: jax.Array, *_: Any) -> tuple[Any, ...]:
            return i * part + jnp.minimum(lax.div(s * steps + j + ahead, steps), part - 1), 0, 0

        return pl.BlockSpec((None, *table.shape[1:]), index, memory_space=pltpu.SMEM)

    positions = steps * step
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(parts, part, steps),
            in_specs=[
                *[table_of(ahead) for ahead in range(_BUFFERS)],
                of_sequence(heads, LANES),
                of_sequence(heads, 1),
                pl.BlockSpec(memory_space=pltpu.HBM),
                *[of_step() for _ in scales],
            ],
            out_specs=of_step(),
            scratch_shapes=[
                pltpu.VMEM((_BUFFERS, step // per_row, LANES), keys.dtype),
                pltpu.VMEM((heads * _BLOCKS, groups * LANES), jnp.bfloat16),
                pltpu.VMEM((heads, _BLOCKS, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((_BUFFERS,)),
            ],
        ),
        out_shape=result_like(q, (batch, positions // LANES, LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            # The kernel needs no more. XLA keeps other arrays of a step in the rest.
            vmem_limit_bytes=min(vmem_limit(), 32 * 2**20),
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * positions * heads * dim,
            bytes_accessed=batch * positions * (4 + dim * keys.dtype.itemsize),
            transcendentals=0,
        ),
        name="indexer_scores",
    )(query_start, *[table] * _BUFFERS, q, gates, keys, *scales)


def _clear_unseen(rows: Any, seen: jax.Array, dim: int) -> None:
    """Clears the keys of the last tile that the query does not see: they may be another sequence's, even NaN.

    They are masked later, but a product adds their zeros times themselves to other keys' scores.
    """
    per_row, size = LANES // dim, 32
    tile_rows = TILE // per_row
    end = (lax.div(seen, TILE) + 1) * (tile_rows // size)

    def clear(group: jax.Array, _: None) -> None:
        some = pl.ds(pl.multiple_of(group * size, size), size)
        values = rows[some].astype(jnp.float32)
        position = (group * size + lax.broadcasted_iota(jnp.int32, values.shape, 0)) * per_row
        position += lax.div(lax.broadcasted_iota(jnp.int32, values.shape, 1), dim)
        rows[some] = jnp.where(position <= seen, values, 0.0).astype(rows.dtype)

    lax.fori_loop(lax.div(seen + 1, per_row * size), end, clear, None)


def _in_order(scores: jax.Array) -> jax.Array:
    """`[8, 128]` in the order of positions, from rows `2 * g + h` with the h-th keys of the rows of group g."""
    row, lane = (lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in range(2))
    odd = lax.rem(row, 2)
    source = odd * (LANES // 2) + lax.div(lane, 2)
    other = jnp.where(odd == 0, pltpu.roll(scores, _BLOCKS - 1, 0), pltpu.roll(scores, 1, 0))
    own, other = (jnp.take_along_axis(x, source, axis=1, mode="promise_in_bounds") for x in (scores, other))
    return jnp.where(lax.rem(row + lane, 2) == 0, own, other)
