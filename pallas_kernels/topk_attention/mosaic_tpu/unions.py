"""What blocks of neighbouring queries select together, listed by the kernel that finds their thresholds.

The kernel searches the thresholds of some rows of scores at a time, as `select_topk` does. While a row's scores are
still in VMEM, one more pass over them sets its bit at every position that it selected. The bits of a block's 256
queries are 8 words at each position: query q has bit q // 8 of word q % 8. So a row of scores meets its bits without
moving between sublanes, and the words of 128 positions are one vector register.

After the last row of a block the words are compacted: positions without bits are dropped. In a register of 128
positions, a word has to move left by the number of empty positions before it. It moves by the powers of two in that
number, the lowest first, which never lets two words meet. Then the register is rotated behind those already listed. The
list never outruns the reading of the words, so it takes their place.

A block that selected most positions gets no list. Its words stay where they are, and attention reads whole pages.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.select_topk.mosaic_tpu import CHUNK, PART, SAMPLE, over_rows, search_threshold, tile_of
from pallas_kernels.tpu import LANES, result_like, vmem_limit

WORDS = 8
"""Words of 32 bits for a block's queries at each position: the rows of a vector register."""
_MOST_QUERIES = 32 * WORDS
_DENSE_EIGHTHS = 7
"""A block gets no list if its queries selected more eighths of the positions that they see.

The compiler's estimates of both ways meet at about all positions."""
TILES = 8
"""Registers of 128 positions that are compacted side by side.

A list is padded to a multiple of them, with words of zeros and rows that exist."""

_COMPACTED = 4 * TILES
"""Registers of a turn of compaction."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unions:
    """Unions of blocks of `block` neighbouring queries; g counts the blocks of all sequences.

    Attributes:
      words: int32 `[g, tiles, 8, 128]`. Bit q // 8 of word q % 8 says whether the block's query q selected the entry.
      rows: int32 `[g, tiles, 128]`, the entries' rows of the flattened pages; undefined where there is no list.
      entries: int32 `[g]`, the number of entries before the padding.
      dense: int32 `[g]`, 1 where the entries are all positions in order and not a list.
      block: queries of a block.
    """

    words: jax.Array
    rows: jax.Array
    entries: jax.Array
    dense: jax.Array
    block: int = dataclasses.field(metadata={"static": True})


def block_of(queries: int) -> int:
    """Queries of a block, of `queries` queries of each sequence: a multiple of 32."""
    return min(_MOST_QUERIES, pl.cdiv(queries, 32) * 32)


def select_unions(scores: jax.Array, lengths: jax.Array, page_table: jax.Array, k: int, *, page_size: int) -> Unions:
    """The unions of neighbouring queries' `k` highest scores.

    Args:
      scores: float32 `[b, t, s]`.
      lengths: int32 `[b, t]`, the number of positions that a query sees. Numbers below 0 or above s count as these.
      page_table: int32 `[b, m]`, numbers of pages that exist, for at least s positions.
      k: number of positions that a query selects.
      page_size: positions of one page, a divisor or a multiple of 128.

    Raises:
      NotImplementedError: scores that are not float32, another page size, or rows so long that VMEM does not hold
        eight.
    """
    batch, queries, size = scores.shape
    if scores.dtype != jnp.float32:
        raise NotImplementedError(f"takes float32 scores, not {scores.dtype}")
    if LANES % page_size and page_size % LANES:
        raise NotImplementedError(f"takes pages of a divisor or a multiple of {LANES} positions, not of {page_size}")
    limit, block = vmem_limit(), block_of(queries)

    def padded_for(rows: int) -> int:
        unit = max(CHUNK // rows, _COMPACTED * LANES)
        return pl.cdiv(size, unit) * unit

    def bytes_of(rows: int) -> int:
        """Two blocks of scores and of words, one of integers and of their sample, and two lists of rows."""
        return 4 * (3 * rows + rows // SAMPLE + 2 * WORDS + 2) * padded_for(rows)

    # Many rows at a time, because each pass over them ends with sums that take about 250 cycles.
    rows = 32 if size <= 2**15 else next((rows for rows in (16, 8) if bytes_of(rows) <= limit), 8)
    if bytes_of(rows) > limit:
        longest = limit * size // bytes_of(rows)
        raise NotImplementedError(f"VMEM holds rows of up to {longest:,} positions, not of {size:,}")
    padded = padded_for(rows)
    blocks, steps = pl.cdiv(queries, block), block // rows
    lengths = jnp.pad(jnp.clip(lengths, 0, size), ((0, 0), (0, blocks * block - queries))).astype(jnp.int32)
    longest = jnp.max(lengths.reshape(batch * blocks, block), axis=1)
    tiles = padded // LANES
    table = jnp.pad(page_table, ((0, 0), (0, max(0, pl.cdiv(padded, page_size) - page_table.shape[1]))))
    words, listed, counts = pl.pallas_call(
        functools.partial(_kernel, k=k, page_size=page_size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch * blocks, steps),
            in_specs=[
                pl.BlockSpec((None, 1, table.shape[1]), lambda g, i, _: (g // blocks, 0, 0), memory_space=pltpu.SMEM),
                pl.BlockSpec((rows, 1), lambda g, i, _: (g * steps + i, 0)),
                # Rows behind the last query see nothing. Any scores do for them.
                pl.BlockSpec(
                    (None, rows, padded),
                    lambda g, i, _: (
                        g // blocks,
                        jnp.minimum(g % blocks * steps + i, pl.cdiv(queries, rows) - 1),
                        0,
                    ),
                ),
            ],
            out_specs=[
                pl.BlockSpec((None, tiles, WORDS, LANES), lambda g, i, _: (g, 0, 0, 0)),
                pl.BlockSpec((None, tiles, LANES), lambda g, i, _: (g, 0, 0)),
                pl.BlockSpec((None, 8, LANES), lambda g, i, _: (g, 0, 0)),
            ],
            scratch_shapes=[pltpu.VMEM((rows, padded), jnp.int32), pltpu.VMEM((rows, padded // SAMPLE), jnp.int32)],
        ),
        out_shape=[
            result_like(scores, (batch * blocks, tiles, WORDS, LANES), jnp.int32),
            result_like(scores, (batch * blocks, tiles, LANES), jnp.int32),
            result_like(scores, (batch * blocks, 8, LANES), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit),
        cost_estimate=pl.CostEstimate(
            flops=36 * scores.size, bytes_accessed=4 * scores.size + 36 * batch * blocks * padded, transcendentals=0
        ),
        name="select_unions",
    )(longest, table[:, None], lengths.reshape(-1, 1), scores)
    return Unions(words, listed, counts[:, 0, 0], counts[:, 1, 0], block)


def _seen(longest: jax.Array, block: jax.Array) -> jax.Array | int:
    """Positions that a block's queries see."""
    return longest[block]


def _kernel(longest, table, lengths, scores, words, rows, counts, keys, sample, *, k, page_size):
    block, step = pl.program_id(0), pl.program_id(1)
    threshold, last, tied = search_threshold(lengths[...], scores, keys, sample, k)

    @pl.when(step == 0)
    def _():
        words[...] = jnp.zeros_like(words)

    lane = lax.broadcasted_iota(jnp.int32, threshold.shape, 1)
    part, chunk, eights = PART // keys.shape[0], CHUNK // keys.shape[0] // LANES, keys.shape[0] // WORDS
    bits = [jnp.left_shift(jnp.int32(1), step * eights + eight) for eight in range(eights)]

    def set_bits(chosen):
        def visit(base, offset, _):
            found = []
            for start in range(offset, offset + part, LANES):
                one = chosen(tile_of(keys, base, start)[...], base + start)
                of_eight = [
                    jnp.where(one[eight * WORDS : (eight + 1) * WORDS], bits[eight], 0) for eight in range(eights)
                ]
                found.append(functools.reduce(jnp.bitwise_or, of_eight))
            of_chunk = words.at[pl.ds(pl.multiple_of(lax.div(base, LANES), chunk), chunk)]
            here = of_chunk.at[pl.ds(offset // LANES, part // LANES)]
            here[...] |= jnp.stack(found)

        over_rows(lengths[...], visit, None)

    @pl.when(tied == 0)
    def _():
        set_bits(lambda key, _: key >= threshold)

    @pl.when(tied != 0)
    def _():
        set_bits(lambda key, first: (key > threshold) | ((key == threshold) & (first + lane <= last)))

    @pl.when(step + 1 == pl.num_programs(1))
    def _():
        seen = _seen(longest, block)
        turns = (seen + _COMPACTED * LANES - 1) // (_COMPACTED * LANES) * (_COMPACTED // TILES)

        def count_used(turn, sums):
            """Until the list takes their place, rows hold 1 where a position has bits."""
            here = pl.ds(pl.multiple_of(turn * TILES, TILES), TILES)
            used = jnp.max(jnp.where(words[here] != 0, 1, 0), axis=1)
            rows[here] = used
            return sums + used

        found = lax.fori_loop(0, turns, count_used, jnp.zeros((TILES, LANES), jnp.int32))
        entries = jnp.sum(found)
        dense = entries * 8 > seen * _DENSE_EIGHTHS
        numbers = jnp.where(dense, seen, entries), jnp.where(dense, 1, 0)
        counts[...] = jnp.where(lax.broadcasted_iota(jnp.int32, counts.shape, 0) == 0, *numbers)
        pl.when(jnp.logical_not(dense))(lambda: _compact(turns, table, words, rows, page_size=page_size))


def _compact(turns, table, words, rows, *, page_size):
    """Drops the words without bits, and lists the rows of the others."""
    # A register holds the words of 128 positions, and so do the numbers of a turn's eight registers.
    assert TILES == WORDS
    shape = (WORDS, LANES)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    square = (LANES, LANES)
    earlier = lax.broadcasted_iota(jnp.int32, square, 0) <= lax.broadcasted_iota(jnp.int32, square, 1)
    earlier = jnp.where(earlier, 1.0, 0.0)

    def rows_of(tile, offset):
        """Rows of the pages that hold positions `128 * tile + offset`."""
        if page_size >= LANES:
            page = table[0, lax.div(tile * LANES, page_size)]
            return page * page_size + lax.rem(tile * LANES, page_size) + offset
        per_tile, found = LANES // page_size, table[0, tile * (LANES // page_size)]
        for page in range(1, per_tile):
            found = jnp.where(offset >= page * page_size, table[0, tile * per_tile + page], found)
        return found * page_size + jnp.bitwise_and(offset, page_size - 1)

    def to_the_left(number):
        """The words of eight registers without gaps, their numbers, and where in its register each word was."""
        of_group = pl.ds(pl.multiple_of(number * TILES, TILES), TILES)
        group, used = words.at[of_group], rows[of_group]
        moved = [group[tile] for tile in range(TILES)]
        # Products of zeros and ones are exact in the bfloat16 that a systolic array multiplies.
        upto = jnp.dot(used.astype(jnp.float32), earlier, precision=lax.Precision.DEFAULT).astype(jnp.int32)
        gap, distance = jnp.where(used > 0, lane - (upto - used), 0), 1
        while distance < LANES:
            from_right = pltpu.roll(gap, LANES - distance, 1)
            arrives = jnp.where((from_right & distance) != 0, 1, 0)
            gap = jnp.where(arrives > 0, from_right, jnp.where((gap & distance) != 0, 0, gap))
            for tile in range(TILES):
                here = jnp.broadcast_to(arrives[tile : tile + 1], shape) > 0
                moved[tile] = jnp.where(here, pltpu.roll(moved[tile], LANES - distance, 1), moved[tile])
            distance *= 2
        numbers = [jnp.sum(used[tile : tile + 1]) for tile in range(TILES)]
        return moved, numbers, lane + gap

    def turn(number, state):
        # Groups that do not depend on each other hide each other's latency.
        groups = range(_COMPACTED // TILES)
        compacted = [to_the_left(number * len(groups) + group) for group in groups]
        for group in groups:
            state = append(number * len(groups) + group, *compacted[group], state)
        return state

    def append(number, moved, numbers, places, state):
        filled, last_words, last_rows = state
        for tile in range(TILES):
            count = numbers[tile]
            offset = jnp.broadcast_to(places[tile : tile + 1], shape)
            found = jnp.where(lane < count, rows_of(number * TILES + tile, offset), 0)
            place, register = lax.rem(filled, LANES), lax.div(filled, LANES)
            new_words = pltpu.roll(jnp.where(lane < count, moved[tile], 0), place, 1)
            new_rows = pltpu.roll(found, place, 1)
            full_words = jnp.where(lane < place, last_words, new_words)
            full_rows = jnp.where(lane < place, last_rows, new_rows)
            words[register] = full_words
            rows[pl.ds(register, 1)] = full_rows[:1]
            overflows = place + count >= LANES
            # What did not fit was rotated to the front.
            rest = lane < place + count - LANES
            last_words = jnp.where(overflows, jnp.where(rest, new_words, 0), full_words)
            last_rows = jnp.where(overflows, jnp.where(rest, new_rows, 0), full_rows)
            filled = filled + count
        return filled, last_words, last_rows

    nothing = jnp.zeros(shape, jnp.int32)
    filled, last_words, last_rows = lax.fori_loop(
        0, lax.div(turns, _COMPACTED // TILES), turn, (jnp.int32(0), nothing, nothing)
    )
    first = lax.div(filled, LANES)

    def pad(register, _):
        here = register == first
        words[register] = jnp.where(here, last_words, 0)
        rows[pl.ds(register, 1)] = jnp.where(here, last_rows, 0)[:1]

    # A list that ends with a register has none behind it at the very end.
    end = jnp.minimum((lax.div(first, TILES) + 1) * TILES, words.shape[0])
    lax.fori_loop(first, end, pad, None)
