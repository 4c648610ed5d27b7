"""Selection and attention on TPUs, without lists of selected positions.

A query's selection is two numbers: the lowest score that it takes, and the last position at which an equal score still
counts. A block of 256 queries streams keys and values through VMEM once, page by page, with its scores beside them.

For every 128 positions, each group of 16 neighbouring queries packs the rows that any of its queries selected. A 0/1
matrix, with a one where a selected position meets its place, multiplies the keys and values of all heads. The matrix
unit does that exactly. The same matrix multiplies the queries' selections, so a packed row knows which queries selected
it. When enough rows are packed, the group's 16 queries and all heads of one key head attend to them under that mask.

So 256 queries read keys and values from HBM once, in whole pages. The work of attention is proportional to the union of
16 queries' selections. Of every 128 positions, 16 places are used if no group selected more than 16 of them, 32 if some
group selected more, and so on. If no query selected any of them, they cost one comparison.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import paging
from pallas_kernels.select_topk.mosaic_tpu import select_threshold, select_topk
from pallas_kernels.sparse_attention.mosaic_tpu import sparse_attention
from pallas_kernels.tpu import LANES, MASKED, check_attention, precision, result_like, vmem_limit

GROUP = 16
"""Queries that share a union. With 8 heads each they fill the rows of a matrix unit."""
QUERIES = 256
"""Queries that share one reading of keys and values."""
_GROUPS = QUERIES // GROUP
_TILE = LANES
"""Positions packed at once. The cost to pack a row grows with this number."""


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """How the kernel is tiled.

    Attributes:
      chunk: positions copied at once, a multiple of 128 and of the page size.
      packed: packed rows attended to at once, a multiple of 16.
    """

    chunk: int = 1024
    packed: int = 256


def topk_attention(
    q: jax.Array,
    scores: jax.Array,
    lengths: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    *,
    top_k: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.topk_attention`.

    Raises:
      NotImplementedError: dtypes or sizes that the kernels do not take.
    """
    batch, queries = q.shape[:2]
    if queries < GROUP:
        return sparse_attention(q, kv, select_topk(scores, lengths, top_k), page_table, scale=scale)
    size = scores.shape[-1]
    lengths = jnp.clip(lengths, 0, size)
    threshold, last_tie = select_threshold(scores.reshape(-1, size), lengths.reshape(-1), top_k)
    threshold, last_tie = threshold.reshape(batch, queries), last_tie.reshape(batch, queries)
    return threshold_attention(q, scores, threshold, last_tie, lengths, kv, page_table, scale=scale)


def threshold_attention(
    q: jax.Array,
    scores: jax.Array,
    threshold: jax.Array,
    last_tie: jax.Array,
    lengths: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    *,
    scale: float,
    config: PackingConfig = PackingConfig(),
    one_pass: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of each query to positions with a score above its threshold, or equal to it up to `last_tie`.

    Args:
      q: `[b, t, n, d]`.
      scores: float32 `[b, t, s]`.
      threshold: float32 `[b, t]`.
      last_tie: int32 `[b, t]`.
      lengths: int32 `[b, t]`, the number of positions that a query sees, from 0 to s.
      kv: `[p, page_size, 2 * k, d]` pages.
      page_table: int32 `[b, m]`.
      scale: factor on the dot products.
      config: tiling.
      one_pass: pack exactly 16 rows of every 128 positions and attend once per chunk, whatever was selected. The
        results mean nothing, but the program has no branches, which the compiler's static estimate of time ignores.

    Returns:
      As `api.topk_attention`.

    Raises:
      NotImplementedError: dtypes or shapes that the kernel does not take.
    """
    batch, queries, heads, dim = q.shape
    kv_heads, page_size = kv.shape[2] // 2, kv.shape[1]
    check_attention(q, kv)
    rows = GROUP * heads // kv_heads
    if rows % 8 or config.chunk % page_size:
        raise NotImplementedError(f"{heads} heads on {kv_heads}, pages of {page_size}")
    size = scores.shape[-1]
    config = dataclasses.replace(
        config,
        chunk=min(config.chunk, -(-size // max(_TILE, page_size)) * max(_TILE, page_size)),
    )
    padding = -queries % QUERIES

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))

    groups = (queries + padding) // GROUP
    grouped = pad(q).reshape(batch, groups, GROUP, kv_heads, heads // kv_heads, dim)
    grouped = grouped.transpose(0, 1, 3, 2, 4, 5).reshape(batch, groups, kv_heads, rows, dim)
    table = paging.pad_to_chunks(jnp.clip(page_table, 0, kv.shape[0] - 1), config.chunk // page_size)
    table = jnp.pad(table, ((0, 0), (0, max(0, -(-size // page_size) - table.shape[1]))))
    padded_lengths = pad(lengths)
    chunks = jnp.max(padded_lengths.reshape(batch, -1, QUERIES), axis=-1)
    chunks = jnp.maximum((chunks + config.chunk - 1) // config.chunk, 1).astype(jnp.int32)
    out, lse = _attend(
        grouped,
        scores,
        pad(threshold)[..., None],
        jnp.minimum(pad(last_tie), padded_lengths - 1)[..., None],
        padded_lengths[..., None],
        table,
        kv,
        chunks,
        scale=scale,
        config=config,
        one_pass=one_pass,
    )
    out = out.reshape(batch, groups, kv_heads, GROUP, -1, dim).transpose(0, 1, 3, 2, 4, 5)
    lse = lse.reshape(batch, groups, kv_heads, GROUP, -1).transpose(0, 1, 3, 2, 4)
    return out.reshape(batch, -1, heads, dim)[:, :queries], lse.reshape(batch, -1, heads)[:, :queries]


@functools.partial(jax.jit, static_argnames=("scale", "config", "one_pass"))
def _attend(
    q: jax.Array,
    scores: jax.Array,
    threshold: jax.Array,
    last_tie: jax.Array,
    lengths: jax.Array,
    table: jax.Array,
    kv: jax.Array,
    chunks: jax.Array,
    *,
    scale: float,
    config: PackingConfig,
    one_pass: bool,
) -> tuple[jax.Array, jax.Array]:
    batch, all_groups, kv_heads, rows, dim = q.shape
    page_size = kv.shape[1]
    width = 2 * kv_heads * dim
    blocks = all_groups // _GROUPS
    tiles, chunk_pages = config.chunk // _TILE, config.chunk // page_size
    turns = -(-scores.shape[-1] // config.chunk)
    steps = config.packed // GROUP
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    exact = functools.partial(dot, precision=precision(kv.dtype))
    across, along = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))

    def when(condition: jax.Array) -> Callable:
        return (lambda body: body()) if one_pass else pl.when(condition)

    def kernel(
        chunks, table, q, scores, threshold, last_tie, lengths, kv,
        out, lse, pages, bounds, ends, selected, places, rounds, ones, packed, filled, acc, largest, total, done,
    ):  # fmt: skip
        sequence, block, turn = (pl.program_id(axis) for axis in range(3))
        buffer = jax.lax.rem(turn, 2)
        count = turns if one_pass else chunks[sequence, block]

        def copy(turn: jax.Array | int, page: int) -> Any:
            source = kv.at[table[sequence, turn * chunk_pages + page]]
            buffer = jax.lax.rem(turn, 2)
            return pltpu.make_async_copy(
                source, pages.at[buffer, pl.ds(page * page_size, page_size)], done.at[buffer, page]
            )

        def start(turn: jax.Array | int) -> None:
            for page in range(chunk_pages):
                copy(turn, page).start()

        @pl.when(turn == 0)
        def _():
            start(0)
            acc[...] = jnp.zeros_like(acc)
            total[...] = jnp.zeros_like(total)
            largest[...] = jnp.full_like(largest, MASKED)
            packed[...] = jnp.zeros_like(packed)
            bounds[...] = jnp.broadcast_to(threshold[0], bounds.shape)
            ends[0] = jnp.broadcast_to(lengths[0], bounds.shape)
            ends[1] = jnp.broadcast_to(last_tie[0], bounds.shape)
            filled[0] = 0

        def select(tile: jax.Array, _: None) -> None:
            """Stores the positions of a tile that each query selects, and the places at which each group packs them."""
            score = scores[0, :, pl.ds(pl.multiple_of(tile * _TILE, _TILE), _TILE)]
            score = jnp.where(score != score, jnp.inf, score)
            position = turn * config.chunk + tile * _TILE + _lanes(score.shape)
            above = (score > bounds[...]) & (position < ends[0])
            chosen = jnp.where(above | ((score == bounds[...]) & (position <= ends[1])), 1.0, 0.0)
            selected[tile] = chosen
            # Through memory, which puts the groups' rows side by side.
            places[tile] = jnp.max(chosen.reshape(_GROUPS, GROUP, _TILE), axis=1)
            union = places[tile]
            square = (_TILE, _TILE)
            before = jnp.where(_sublanes(square) < _lanes(square), 1.0, 0.0)
            rank = dot(union.astype(jnp.bfloat16), before.astype(jnp.bfloat16), across)
            place = jnp.where(union > 0, rank, -1.0)
            places[tile] = place
            rounds[tile] = jax.lax.div(jnp.max(place).astype(jnp.int32) + GROUP, GROUP)

        def pack(tile: jax.Array, number: jax.Array | int) -> None:
            """Moves the rows with places 16 * number to 16 * number + 15 of each group behind the packed rows."""
            if not one_pass:
                pl.when(filled[0] == steps)(attend)
            shape = (_GROUPS, GROUP, _TILE)
            wanted = (number * GROUP + jax.lax.broadcasted_iota(jnp.int32, shape, 1)).astype(jnp.float32)
            ones[...] = jnp.where(places[tile][:, None] == wanted, 1.0, 0.0).reshape(QUERIES, _TILE)
            one = ones[...].astype(kv.dtype)
            step = jax.lax.rem(turn * tiles + tile, steps) if one_pass else filled[0]
            values = pages[buffer, pl.ds(pl.multiple_of(tile * _TILE, _TILE), _TILE)].reshape(_TILE, width)
            packed[step, :, :width] = exact(one, values, across).astype(kv.dtype)
            for part in range(0, QUERIES, LANES):
                queries = pl.ds(part, LANES)
                members = dot(ones[queries], selected[tile, queries], along, precision=jax.lax.Precision.DEFAULT)
                packed[step, queries, width:] = members.astype(packed.dtype)
            filled[0] = step + 1

        def attend() -> None:
            def attend_group(group: jax.Array, _: None) -> None:
                keys = packed[:, pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)]
                keys = keys.reshape(config.packed, width + LANES)
                # A row is a query and a head. The packed rows know which of 128 queries selected them.
                shape = (rows, LANES)
                query = jax.lax.rem(group, LANES // GROUP) * GROUP + jax.lax.div(_sublanes(shape), rows // GROUP)
                expand = jnp.where(_lanes(shape) == query, 1.0, 0.0).astype(keys.dtype)
                member = dot(expand, keys[:, width:], along)
                seen = (member > 0.5) & (_lanes(member.shape) < filled[0] * GROUP)
                bias = jnp.where(seen, 0.0, MASKED)
                for head in range(kv_heads):
                    key = keys[:, head * dim : (head + 1) * dim]
                    value = keys[:, (kv_heads + head) * dim : (kv_heads + head + 1) * dim]
                    logits = _tiles(exact(q[0, group, head], key, along) * scale + bias)
                    old = largest[group, head]
                    new = jnp.maximum(old, jnp.max(functools.reduce(jnp.maximum, logits), axis=1, keepdims=True))
                    weights = [jnp.exp(tile - new) for tile in logits]
                    correction = jnp.exp(old - new)
                    part = exact(jnp.concatenate(weights, axis=1).astype(value.dtype), value, across)
                    acc[group, head] = acc[group, head] * _columns(correction, dim) + part
                    # The total is kept per lane. The lanes are added at the end.
                    total[group, head] = total[group, head] * correction + functools.reduce(jnp.add, weights)
                    largest[group, head] = new

            jax.lax.fori_loop(0, _GROUPS, attend_group, None)
            filled[0] = 0

        @when(turn < count)
        def _():
            # With `one_pass` the last turn starts copies that nothing waits for.
            when(turn + 1 < count)(lambda: start(turn + 1))
            for page in range(chunk_pages):
                copy(turn, page).wait()

            def pack_tile(tile: jax.Array, _: None) -> None:
                if one_pass:
                    pack(tile, 0)
                else:
                    jax.lax.fori_loop(0, rounds[tile], lambda number, _: pack(tile, number), None)

            jax.lax.fori_loop(0, tiles, select, None, unroll=4)
            jax.lax.fori_loop(0, tiles, pack_tile, None)
            if one_pass:
                pl.when(jax.lax.rem(turn + 1, steps // tiles) == 0)(attend)
            else:
                pl.when((turn + 1 == count) & (filled[0] > 0))(attend)

        @pl.when(turn + 1 == count)
        def _():
            def finish(group: jax.Array, _: None) -> None:
                for head in range(kv_heads):
                    weight = _sum_of_lanes(total[group, head])
                    # A query that selected nothing has attended only to masked rows, if any.
                    found = largest[group, head] > MASKED / 2
                    attended = acc[group, head] / weight
                    out[0, group, head] = jnp.where(_columns(found, dim), attended, 0.0).astype(out.dtype)
                    sums = jnp.where(found, largest[group, head] + jnp.log(weight), -jnp.inf)
                    lse[0, group, head] = jnp.transpose(sums)[:1]

            jax.lax.fori_loop(0, _GROUPS, finish, None)

    def of_block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda b, i, *_: (b, i) + (0,) * (len(shape) - 1))

    def scores_block(b: jax.Array, i: jax.Array, j: jax.Array, chunks: jax.Array, _: jax.Array) -> tuple:
        return b, i, jnp.minimum(j, chunks[b, i] - 1)

    positions = turns * config.chunk
    packed_rows = batch * all_groups * positions * GROUP // _TILE
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, blocks, turns),
            in_specs=[
                of_block(_GROUPS, kv_heads, rows, dim),
                pl.BlockSpec((1, QUERIES, config.chunk), scores_block),
                of_block(QUERIES, 1),
                of_block(QUERIES, 1),
                of_block(QUERIES, 1),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=[of_block(_GROUPS, kv_heads, rows, dim), of_block(_GROUPS, kv_heads, 1, rows)],
            scratch_shapes=[
                pltpu.VMEM((2, config.chunk, 2 * kv_heads, dim), kv.dtype),
                pltpu.VMEM((QUERIES, _TILE), jnp.float32),
                pltpu.VMEM((2, QUERIES, _TILE), jnp.int32),
                pltpu.VMEM((tiles, QUERIES, _TILE), jnp.float32),
                pltpu.VMEM((tiles, _GROUPS, _TILE), jnp.float32),
                pltpu.SMEM((tiles,), jnp.int32),
                pltpu.VMEM((QUERIES, _TILE), jnp.float32),
                pltpu.VMEM((steps, QUERIES, width + LANES), kv.dtype),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((_GROUPS, kv_heads, rows, dim), jnp.float32),
                pltpu.VMEM((_GROUPS, kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((_GROUPS, kv_heads, rows, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((2, chunk_pages)),
            ],
        ),
        out_shape=[
            result_like(q, q.shape, q.dtype),
            result_like(q, (batch, all_groups, kv_heads, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit()
        ),
        cost_estimate=pl.CostEstimate(
            # For every 16 packed rows: the packing of their tile, and two products with the group's rows.
            flops=packed_rows * (2 * _TILE * (width + LANES) + 4 * rows * kv_heads * dim),
            bytes_accessed=4 * scores.size + batch * blocks * positions * width * kv.dtype.itemsize,
            transcendentals=packed_rows * rows * kv_heads,
        ),
    )(chunks, table, q, scores, threshold, last_tie, lengths, kv)


def _lanes(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def _sublanes(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)


def _sum_of_lanes(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)


def _tiles(x: jax.Array) -> list[jax.Array]:
    """The columns of x, 128 at a time."""
    return [x[:, first : first + LANES] for first in range(0, x.shape[1], LANES)]


def _columns(x: jax.Array, columns: int) -> jax.Array:
    """x `[rows, 128]`, which has equal columns, as a factor of an array with `columns` columns."""
    return x if columns == LANES else x[:, :1]
