"""Attention of blocks of neighbouring queries to the union of what they select, gathered by row copies.

The keys and values of all heads of a position are one contiguous row of its page, a `[2 * k, d]` tile, so an entry of a
union is one copy. A turn multiplies 1,024 rows for all queries of the block, and the next two turns' rows are copied
meanwhile. To start a copy takes the scalar unit some instructions. They are spread over the products of the turn, which
leave it idle. Places in a list and in a buffer are constants but for a tile's address, which saves most of them. Row
numbers are trusted: checks of their bounds would cost more than the copies.

A block's queries are side by side for each head. So the mask of a turn is computed once from the union's words, and
serves all heads. Two heads of a key head are multiplied at once.

A block without a list walks all pages, in whole pages, under the same mask.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import paging
from pallas_kernels.topk_attention.mosaic_tpu.unions import TILES, WORDS, Unions
from pallas_kernels.tpu import LANES, MASKED, check_attention, precision, result_like, vmem_limit

_CHUNK = TILES * LANES
"""Entries of a union that are multiplied at once; lists are padded to a multiple of it."""
_UNROLL = 2
_AHEAD = 2
"""Turns whose rows are on their way while one is multiplied."""
_RING = 1 + _AHEAD


def union_attention(
    q: jax.Array, kv: jax.Array, page_table: jax.Array, unions: Unions, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Attention of each query to the entries of its block's union that have its bit.

    Args:
      q: `[b, t, n, d]`.
      kv: `[p, page_size, 2 * k, d]` pages.
      page_table: int32 `[b, m]`, numbers of pages that exist.
      unions: of the queries, with rows of these pages.
      scale: factor on the dot products.

    Returns:
      As `api.topk_attention`.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take.
    """
    batch, queries, heads, dim = q.shape
    kv_heads, page_size = kv.shape[2] // 2, kv.shape[1]
    check_attention(q, kv)
    if _CHUNK % page_size or dim > LANES:
        raise NotImplementedError(f"pages of {page_size} positions, heads of {dim} elements")
    pack = 1 + (heads // kv_heads + 1) % 2
    block, blocks = unions.block, -(-queries // unions.block)
    table = paging.pad_to_chunks(page_table, _CHUNK // page_size)
    turns = unions.words.shape[1] * LANES // _CHUNK
    table = jnp.pad(table, ((0, 0), (0, max(0, turns * (_CHUNK // page_size) - table.shape[1]))))
    padded = jnp.pad(q, ((0, 0), (0, blocks * block - queries), (0, 0), (0, 0)))
    by_head = padded.reshape(batch * blocks, block, heads, dim).swapaxes(1, 2)
    out, lse = _attend(
        by_head.reshape(-1, heads // pack, pack * block, dim),
        kv.reshape(-1, 2 * kv_heads, dim),
        table,
        unions,
        page_size=page_size,
        chunk=_CHUNK,
        pack=pack,
        scale=scale,
    )
    out = out.reshape(batch, blocks, heads, block, dim).transpose(0, 1, 3, 2, 4)
    lse = lse.reshape(batch, blocks, heads, block).swapaxes(2, 3)
    return out.reshape(batch, -1, heads, dim)[:, :queries], lse.reshape(batch, -1, heads)[:, :queries]


def _turns(entries: Any, block: jax.Array, chunk: int) -> tuple[Any, Any]:
    """The first turn of a block that starts no copies, and the number of turns.

    There is one turn at least, with rows that nobody selected.
    """
    turns = jnp.maximum(jax.lax.div(entries[block] + chunk - 1, chunk), 1)
    return jnp.maximum(turns - _AHEAD, 0), turns


def _dense(dense: Any, block: jax.Array) -> jax.Array | int:
    return dense[block]


_for_each_turn = jax.lax.fori_loop


def _sum_of_lanes(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("page_size", "chunk", "pack", "scale"))
def _attend(
    q: jax.Array,
    kv: jax.Array,
    table: jax.Array,
    unions: Unions,
    *,
    page_size: int,
    chunk: int,
    pack: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q `[g, n / pack, pack * block, d]`, and log-sum-exps `[g, n / pack, 1, pack * block]`."""
    all_blocks, heads, queries, dim = q.shape
    kv_heads = kv.shape[1] // 2
    blocks, group, tiles = all_blocks // table.shape[0], heads // kv_heads, chunk // LANES
    all_tiles = unions.words.shape[1]
    unroll = math.gcd(heads, _UNROLL)
    steps = heads // unroll
    tiles_a_step = tiles // steps  # Tiles whose copies are started beside the products of a step's heads.
    dot = functools.partial(jax.lax.dot_general, precision=precision(kv.dtype), preferred_element_type=jnp.float32)

    def kernel(
        entries, dense, table, q, words, rows, kv,
        out, lse, numbers, members, buffers, kv_of, bias, acc, largest, total, listed, done,
    ):  # fmt: skip
        block = pl.program_id(0)
        (behind, count), all_positions = _turns(entries, block, chunk), _dense(dense, block)

        def lists(turn: jax.Array | int) -> list[Any]:
            # One turn's lists are copied that nobody needs, perhaps from behind the end.
            slot, here = jax.lax.rem(turn, _RING), pl.ds(jnp.minimum(turn * tiles, all_tiles - tiles), tiles)
            return [
                pltpu.make_async_copy(rows.at[block, here], numbers.at[slot], listed.at[0, slot]),
                pltpu.make_async_copy(words.at[block, here], members.at[slot], listed.at[1, slot]),
            ]

        def load_lists(turn: jax.Array | int) -> None:
            for copy in lists(turn):
                copy.start()

        def wait_for_lists(turn: jax.Array | int) -> None:
            for copy in lists(turn):
                copy.wait()

        def copy_rows(turn: jax.Array | int, tile: Any, lanes: range) -> None:
            """Starts the copies of some of a tile's 128 rows."""
            slot = jax.lax.rem(turn, _RING)
            # Only the tile's address is computed at run time: one for all its rows.
            targets = buffers.at[slot, pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)]
            for lane in lanes:
                source = kv.at[pl.ds(numbers[slot, tile, lane], 1)]
                pltpu.make_async_copy(source, targets.at[pl.ds(lane, 1)], done.at[slot]).start()

        def copy_pages(turn: jax.Array | int) -> None:
            slot, pages = jax.lax.rem(turn, _RING), chunk // page_size
            for page in range(pages):
                source = kv.at[pl.ds(table[0, turn * pages + page] * page_size, page_size)]
                target = buffers.at[slot, pl.ds(page * page_size, page_size)]
                pltpu.make_async_copy(source, target, done.at[slot]).start()

        def attend(turn: jax.Array | int, *, copies: str) -> None:
            """Multiplies a turn's rows, and starts the copies of the turn after the next."""
            slot, following = jax.lax.rem(turn, _RING), turn + _AHEAD
            if copies == "pages":
                copy_pages(following)
            whole = buffers.at[slot]
            pltpu.make_async_copy(whole, whole, done.at[slot]).wait()
            for eight in range(queries // pack // WORDS):
                for tile in range(tiles):
                    bit = jnp.bitwise_and(jax.lax.shift_right_logical(members[slot, tile], eight), 1)
                    lanes = pl.ds(tile * LANES, LANES)
                    bias[pl.ds(eight * WORDS, WORDS), lanes] = jnp.where(bit != 0, 0.0, MASKED)
            for first in range(0, chunk, LANES):
                # Few rows at a time, which registers hold.
                values = buffers[slot, first : first + LANES].reshape(LANES, 2 * kv_heads * dim)
                for head in range(2 * kv_heads):
                    kv_of[head, first : first + LANES] = values[:, head * dim : (head + 1) * dim]
            if copies != "none":
                # The lists behind these take the place of this turn's.
                wait_for_lists(following)
                load_lists(following + 1)
            if copies == "rows":
                for tile in range(steps * tiles_a_step, tiles):
                    copy_rows(following, tile, range(LANES))

            def attend_heads(step: jax.Array, _: None) -> None:
                for i in range(unroll):
                    if copies == "rows":
                        for tile in range(tiles_a_step):
                            lanes = range(i * LANES // unroll, (i + 1) * LANES // unroll)
                            copy_rows(following, step * tiles_a_step + tile, lanes)
                    attend_head(step * unroll + i)

            def attend_head(head: jax.Array) -> None:
                key, value = kv_of[jax.lax.div(head, group)], kv_of[kv_heads + jax.lax.div(head, group)]
                dots = dot(q[0, head], key, (((1,), (1,)), ((), ()))) * scale
                logits = []
                for lanes in range(0, chunk, LANES):
                    mask = bias[:, lanes : lanes + LANES]
                    logits.append(dots[:, lanes : lanes + LANES] + jnp.concatenate([mask] * pack, axis=0))
                old = largest[head]
                new = jnp.maximum(old, jnp.max(functools.reduce(jnp.maximum, logits), axis=1, keepdims=True))
                weights = [jnp.exp(tile - new) for tile in logits]
                correction = jnp.exp(old - new)
                part = dot(jnp.concatenate(weights, axis=1).astype(value.dtype), value, (((1,), (0,)), ((), ())))
                acc[head] = acc[head] * correction[:, :dim] + part
                # The total is kept per lane. The lanes are added at the end.
                total[head] = total[head] * correction + functools.reduce(jnp.add, weights)
                largest[head] = new

            jax.lax.fori_loop(0, steps, attend_heads, None)

        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)
        largest[...] = jnp.full_like(largest, MASKED)
        for turn in range(_RING):
            load_lists(turn)

        for turn in range(_AHEAD):
            wait_for_lists(turn)

            @pl.when((all_positions == 0) & (turn < count))
            def _(turn: int = turn) -> None:
                jax.lax.fori_loop(0, tiles, lambda tile, _: copy_rows(turn, tile, range(LANES)), None)

            @pl.when((all_positions != 0) & (turn < count))
            def _(turn: int = turn) -> None:
                copy_pages(turn)

        @pl.when(all_positions == 0)
        def _() -> None:
            _for_each_turn(0, behind, lambda turn, _: attend(turn, copies="rows"), None)

        @pl.when(all_positions != 0)
        def _() -> None:
            _for_each_turn(0, behind, lambda turn, _: attend(turn, copies="pages"), None)

        _for_each_turn(behind, count, lambda turn, _: attend(turn, copies="none"), None)
        wait_for_lists(behind + _AHEAD)

        def finish(head: jax.Array, _: None) -> None:
            weight, found = _sum_of_lanes(total[head]), largest[head] > MASKED / 2
            # A query that selected nothing has attended only to masked rows.
            out[0, head] = jnp.where(found[:, :dim], acc[head] / weight, 0.0).astype(out.dtype)
            lse[0, head] = jnp.transpose(jnp.where(found, largest[head] + jnp.log(weight), -jnp.inf))[:1]

        jax.lax.fori_loop(0, heads, finish, None)

    def of_block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda g, *_: (g,) + (0,) * len(shape))

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    state = heads, queries, LANES
    most = all_blocks * all_tiles * LANES
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(all_blocks,),
            in_specs=[
                pl.BlockSpec((None, 1, table.shape[1]), lambda g, *_: (g // blocks, 0, 0), memory_space=pltpu.SMEM),
                of_block(heads, queries, dim),
                in_hbm,
                in_hbm,
                in_hbm,
            ],
            out_specs=[of_block(heads, queries, dim), of_block(heads, 1, queries)],
            scratch_shapes=[
                pltpu.SMEM((_RING, tiles, LANES), jnp.int32),
                pltpu.VMEM((_RING, tiles, WORDS, LANES), jnp.int32),
                pltpu.VMEM((_RING, chunk, 2 * kv_heads, dim), kv.dtype),
                pltpu.VMEM((2 * kv_heads, chunk, dim), kv.dtype),
                pltpu.VMEM((queries // pack, chunk), jnp.float32),
                pltpu.VMEM((heads, queries, dim), jnp.float32),
                pltpu.VMEM(state, jnp.float32),
                pltpu.VMEM(state, jnp.float32),
                pltpu.SemaphoreType.DMA((2, _RING)),
                pltpu.SemaphoreType.DMA((_RING,)),
            ],
        ),
        out_shape=[
            result_like(q, q.shape, q.dtype),
            result_like(q, (all_blocks, heads, 1, queries), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit(), disable_bounds_checks=True
        ),
        # The most there can be: unions of all positions.
        cost_estimate=pl.CostEstimate(
            flops=4 * most * heads * queries * dim,
            bytes_accessed=most * (2 * kv_heads * dim * kv.dtype.itemsize + 36),
            transcendentals=most * heads * queries,
        ),
        name="union_attention",
    )(unions.entries, unions.dense, table[:, None], q, unions.words, unions.rows, kv)
