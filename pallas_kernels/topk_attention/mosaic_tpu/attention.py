"""Attention of blocks of neighbouring queries to the union of what they select, gathered by row copies.

The keys and values of all heads of a position are one contiguous row of its page, a `[2 * k, d]` tile, so an entry of a
union is one copy. A turn multiplies 1,024 rows for all queries of the block, and the next two turns' rows are copied
meanwhile. To start a copy takes the scalar unit some instructions. They are spread over the products of the turn, which
leave it idle. Places in a list and in a buffer are constants but for a tile's address, which saves most of them. Row
numbers are trusted: checks of their bounds would cost more than the copies.

`tpu_attention` multiplies a turn's rows, with transposed scores: queries lie in lanes. The mask of a turn is made of
the union's words once, and serves all heads: eight words are repeated along the lanes and transposed, and a shift finds
each lane's bit. A matrix unit of 256 x 256 has room for the mask beside a head's 128 elements. There the mask of 128
queries lies beside the keys, and beside each query a one at its place. Other generations add the mask to the scores.

A block without a list walks all pages, in whole pages, under the same mask.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import paging, tpu_attention
from pallas_kernels.topk_attention.mosaic_tpu.unions import TILES, WORDS, Unions
from pallas_kernels.tpu import LANES, MASKED, check_attention, result_like, vmem_limit

_CHUNK = TILES * LANES
"""Entries of a union that are multiplied at once; lists are padded to a multiple of it."""
_ROWS = 512
"""Rows that are multiplied at once where the block allows. A row is one head of one query."""
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
    if scale <= 0:
        # The kernel looks for the largest product, and scales it later.
        q, scale = q * jnp.sign(scale).astype(q.dtype), abs(scale) or 1.0
    block, blocks = unions.block, -(-queries // unions.block)
    table = paging.pad_to_chunks(page_table, _CHUNK // page_size)
    turns = unions.words.shape[1] * LANES // _CHUNK
    table = jnp.pad(table, ((0, 0), (0, max(0, turns * (_CHUNK // page_size) - table.shape[1]))))
    padded = jnp.pad(q, ((0, 0), (0, blocks * block - queries), (0, 0), (0, 0)))
    # Rows of a key head: the first 128 queries of the block for each of its heads, then the next.
    some = _subblock(block)
    by_head = padded.reshape(batch * blocks, block // some, some, kv_heads, -1, dim).transpose(0, 3, 1, 4, 2, 5)
    out, lse = _attend(
        by_head.reshape(batch * blocks, kv_heads, -1, dim),
        kv.reshape(-1, 2 * kv_heads, dim),
        table,
        unions,
        page_size=page_size,
        chunk=_CHUNK,
        scale=scale,
        mask_in_products=_mask_in_products() and some == LANES,
    )
    out = out.reshape(by_head.shape).transpose(0, 2, 4, 1, 3, 5)
    lse = lse.reshape(by_head.shape[:-1]).transpose(0, 2, 4, 1, 3)
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


def _mask_in_products() -> bool:
    """Whether products of twice 128 elements take the matrix unit no longer than those of 128."""
    try:
        return pltpu.get_tpu_info().mxu_column_size > LANES
    except ValueError:
        return False


def _subblock(block: int) -> int:
    """Queries of a block whose rows lie together."""
    return LANES if block % LANES == 0 else block


def _tile(queries: int, group: int) -> int:
    """Rows that are multiplied at once, of `group` heads of a subblock: all of them, or a multiple of 128."""
    sizes = [n * queries for n in range(1, group + 1) if group % n == 0 and n * queries % LANES == 0]
    return max((size for size in sizes if size <= _ROWS), default=min(sizes, default=group * queries))


@functools.partial(jax.jit, static_argnames=("page_size", "chunk", "scale", "mask_in_products"))
def _attend(
    q: jax.Array,
    kv: jax.Array,
    table: jax.Array,
    unions: Unions,
    *,
    page_size: int,
    chunk: int,
    scale: float,
    mask_in_products: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q `[g, k, n / k * block, d]`, and log-sum-exps `[g, k, 1, n / k * block]`.

    The rows of a key head are in the order `[block / 128, n / k, 128]`, or `[n / k, block]` if 128 does not divide the
    block.
    """
    all_blocks, kv_heads, rows_of_head, dim = q.shape
    blocks, tiles, all_tiles = all_blocks // table.shape[0], chunk // LANES, unions.words.shape[1]
    some = _subblock(unions.block)
    subblocks = unions.block // some
    rows_of_subblock = rows_of_head // subblocks
    tile = _tile(some, rows_of_subblock // some)
    width = LANES if some == LANES else tile  # Rows whose mask is kept. The others of a tile have the same.
    pairs = kv_heads * (rows_of_head // tile) // 2
    tiles_a_pair = tiles // max(pairs, 1)  # Tiles whose copies are started beside the products of two tiles of rows.

    def kernel(
        entries, dense, table, q, words, rows, kv,
        out, lse, numbers, members, buffers, keys, values, bias, own, acc, largest, total, even, odd, listed, done,
    ):  # fmt: skip
        state = acc, largest, total
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

        def unpack(slot: jax.Array) -> None:
            """Makes the mask of a turn's positions of the bits of its words."""
            query = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (LANES, width), 1), unions.block)
            for tile in range(tiles):
                words = jnp.transpose(jnp.concatenate([members[slot, tile]] * (width // WORDS), axis=0))
                for subblock in range(subblocks):
                    bit = jax.lax.shift_left(1, jax.lax.div(subblock * LANES + query, WORDS))
                    target = bias.at[subblock, tile * LANES : (tile + 1) * LANES]
                    target[...] = jnp.where(words & bit != 0, 0.0, MASKED).astype(bias.dtype)

        def bias_of(first: Any, some: Any) -> jax.Array:
            return bias[first // rows_of_subblock, some]

        def mask(scores: jax.Array, first: Any, first_key: int) -> jax.Array:
            found = bias_of(first, pl.ds(first_key, scores.shape[0]))
            return scores + jnp.concatenate([found] * (tile // width), axis=1)

        def attend(turn: jax.Array | int, *, copies: str) -> None:
            """Multiplies a turn's rows, and starts the copies of the turn after the next."""
            slot, following = jax.lax.rem(turn, _RING), turn + _AHEAD
            if copies == "pages":
                copy_pages(following)
            whole = buffers.at[slot]
            pltpu.make_async_copy(whole, whole, done.at[slot]).wait()
            unpack(slot)
            tpu_attention.split(whole, keys, values)
            if copies != "none":
                # The lists behind these take the place of this turn's.
                wait_for_lists(following)
                load_lists(following + 1)
            if copies == "rows":
                for tile in range(pairs * tiles_a_pair, tiles):
                    copy_rows(following, tile, range(LANES))

            def copy_some(pair: jax.Array | int, clump: int, clumps: int) -> None:
                for tile in range(tiles_a_pair):
                    lanes = range(clump * LANES // clumps, (clump + 1) * LANES // clumps)
                    copy_rows(following, pair * tiles_a_pair + tile, lanes)

            tpu_attention.attend_to_chunk(
                q.at[0],
                keys,
                values,
                state,
                (even, odd),
                scale=scale,
                mask=None if mask_in_products else mask,
                columns=(lambda first, some: (bias_of(first, some), own[...])) if mask_in_products else None,
                beside=copy_some if copies == "rows" else None,
            )

        tpu_attention.reset(state)
        if mask_in_products:
            row, column = (jax.lax.broadcasted_iota(jnp.int32, own.shape, axis) for axis in (0, 1))
            own[...] = (jax.lax.rem(row, LANES) == column).astype(own.dtype)
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

        tpu_attention.finish(state, out.at[0], lse.at[0], scale=scale)

    def of_block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda g, *_: (g,) + (0,) * len(shape))

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    most = all_blocks * all_tiles * LANES
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(all_blocks,),
            in_specs=[
                pl.BlockSpec((None, 1, table.shape[1]), lambda g, *_: (g // blocks, 0, 0), memory_space=pltpu.SMEM),
                of_block(kv_heads, rows_of_head, dim),
                in_hbm,
                in_hbm,
                in_hbm,
            ],
            out_specs=[of_block(kv_heads, rows_of_head, dim), of_block(kv_heads, 1, rows_of_head)],
            scratch_shapes=[
                pltpu.SMEM((_RING, tiles, LANES), jnp.int32),
                pltpu.VMEM((_RING, tiles, WORDS, LANES), jnp.int32),
                pltpu.VMEM((_RING, chunk, 2 * kv_heads, dim), kv.dtype),
                pltpu.VMEM((kv_heads, chunk, dim), kv.dtype),
                pltpu.VMEM((kv_heads, dim, chunk), kv.dtype),
                pltpu.VMEM((subblocks, chunk, width), kv.dtype if mask_in_products else jnp.float32),
                pltpu.VMEM((tile, LANES), kv.dtype),
                *tpu_attention.state_shapes(kv_heads, dim, rows_of_head),
                *tpu_attention.score_shapes(chunk, tile),
                pltpu.SemaphoreType.DMA((2, _RING)),
                pltpu.SemaphoreType.DMA((_RING,)),
            ],
        ),
        out_shape=[
            result_like(q, q.shape, q.dtype),
            result_like(q, (all_blocks, kv_heads, 1, rows_of_head), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit(), disable_bounds_checks=True
        ),
        # The most there can be: unions of all positions.
        cost_estimate=pl.CostEstimate(
            flops=4 * most * kv_heads * rows_of_head * dim,
            bytes_accessed=most * (2 * kv_heads * dim * kv.dtype.itemsize + 36),
            transcendentals=most * kv_heads * rows_of_head,
        ),
        name="union_attention",
    )(unions.entries, unions.dense, table[:, None], q, unions.words, unions.rows, kv)
