"""Exact selection on TPUs, in Pallas Mosaic TPU: thresholds by counting, lists by prefix sums and one-hot products.

`select_threshold` reads some rows of scores from HBM once, and holds them in VMEM as integers in the same order. Then
it searches each row's k-th highest score. A pass counts the scores that are at least a guess, for all rows side by
side. The first two guesses are a bracket that a sample of the row predicts. Later ones interpolate between the counts
at both ends of the bracket, and aim a little beyond k, so that the bracket shrinks from both ends. From the ninth pass
on, every third guess halves the bracket, so no distribution takes more than about a hundred passes. A row is done when
exactly k scores are at least its guess, or when the bracket is one value. In the second case a search over positions
finds the last of the equal scores that is kept. The result is exact and does not depend on the order of additions.

`select_topk` writes lists from these two numbers. A row is cut into tiles of 128 positions. Prefix sums of the tiles'
counts give the tile of each entry of the list, as a one-hot matrix. A product with that matrix fetches the tile's own
prefix sums. The number of these sums that are not above the entry's rank is the position within the tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import LANES, result_like, vmem_limit

CHUNK = 8 * 4096  # Scores of one turn of a pass's loop, over all rows side by side.
PART = 8 * 512  # Scores of one vector of counts: few enough for registers, enough to be independent.
SAMPLE = 8  # One of so many scores is in a row's sample.
_DEVIATIONS = 3.0  # From the sample's k-th highest to both ends of the bracket that it predicts.
_LEAD = 0.4  # Standard deviations of a count by which a guess aims beyond k.
_LOWEST = -(2**31)
_HIGHEST = 2**31 - 1
_INFINITY, _MINUS_INFINITY = 0x7F800000, -0x7F800001  # Keys.


def select_topk(scores: jax.Array, lengths: jax.Array, k: int) -> jax.Array:
    """See `api.select_topk`.

    Raises:
      NotImplementedError: see `select_threshold`; also rows whose lists do not fit VMEM.
    """
    leading, size = scores.shape[:-1], scores.shape[-1]
    rows, lengths = scores.reshape(-1, size), jnp.clip(lengths.reshape(-1), 0, size)
    threshold, last_tie = select_threshold(rows, lengths, k)
    return _lists(rows, lengths, _sort_key(threshold), last_tie, k).reshape(*leading, k)


def select_threshold(scores: jax.Array, lengths: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Threshold and last tie of the `k` highest of the first `lengths` scores of each row.

    The selected scores are those above the threshold, and those equal to it at positions up to the last tie.

    Args:
      scores: float32 `[rows, s]`.
      lengths: int32 `[rows]`, from 0 to s.
      k: number of scores to select.

    Returns:
      The threshold, float32 `[rows]`, and the last tie, int32 `[rows]`. A row of at most k scores has -inf and
      `lengths - 1`.

    Raises:
      NotImplementedError: scores that are not float32, or rows so long that VMEM does not hold eight.
    """
    rows, size = scores.shape
    if scores.dtype != jnp.float32:
        raise NotImplementedError(f"takes float32 scores, not {scores.dtype}")
    if not rows or not size:
        raise NotImplementedError("takes at least one row and one position")
    limit = vmem_limit()
    block = 8 if size > 2**15 or rows <= 8 else 32
    padded = pl.cdiv(size, CHUNK // block) * (CHUNK // block)
    # A block that is read, one that is searched, its integers, and its sample.
    per_position = 4 * (3 * block + block // SAMPLE)
    if per_position * padded > limit:
        raise NotImplementedError(f"VMEM holds rows of up to {limit // per_position:,} positions, not of {size:,}")
    padding = -rows % block
    column = pl.BlockSpec((block, 1), lambda i: (i, 0))
    threshold, last_tie = pl.pallas_call(
        functools.partial(_threshold_kernel, k=k),
        grid=(pl.cdiv(rows, block),),
        in_specs=[column, pl.BlockSpec((block, padded), lambda i: (i, 0))],
        out_specs=(column, column),
        out_shape=(result_like(scores, (rows + padding, 1), jnp.int32),) * 2,
        scratch_shapes=[pltpu.VMEM((block, padded), jnp.int32), pltpu.VMEM((block, padded // SAMPLE), jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=limit),
        cost_estimate=pl.CostEstimate(flops=30 * rows * size, bytes_accessed=4 * rows * size, transcendentals=0),
        name="select_threshold",
    )(jnp.pad(lengths.astype(jnp.int32), (0, padding))[:, None], scores)
    return _score(threshold[:rows, 0]), last_tie[:rows, 0]


def _sort_key(scores: jax.Array) -> jax.Array:
    """Signed integers in the order of float32 scores; 0.0 and -0.0 give the same integer, and so do inf and NaN."""
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    key = jnp.where(bits == _LOWEST, 0, bits ^ ((bits >> 31) & _HIGHEST))
    return jnp.where(scores != scores, _INFINITY, key)


def _score(key: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(key ^ ((key >> 31) & _HIGHEST), jnp.float32)


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    return (low & high) + ((low ^ high) >> 1)


def _between(low: jax.Array, high: jax.Array, fraction: jax.Array) -> jax.Array:
    """A key strictly between two keys that are no neighbours, at a fraction of the way between their scores."""
    score = _score(low) + jnp.clip(fraction, 0.0, 1.0) * (_score(high) - _score(low))
    return _inside(low, high, jnp.where(jnp.abs(score) < jnp.inf, _sort_key(score), _middle(low, high)))


def _inside(low: jax.Array, high: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.minimum(key, high - 1), low + 1)


def _longest(lengths: jax.Array) -> jax.Array | int:
    return jnp.max(lengths)


def _shortest(lengths: jax.Array) -> jax.Array | int:
    return jnp.min(lengths)


_sample_search = _search = _position_search = lax.while_loop


def _threshold_kernel(lengths_ref, scores_ref, threshold_ref, last_ref, keys_ref, sample_ref, *, k):
    threshold, last, _ = search_threshold(lengths_ref[...], scores_ref, keys_ref, sample_ref, k)
    threshold_ref[...], last_ref[...] = threshold[:, :1], last[:, :1]


def over_rows(lengths: jax.Array, visit: Callable, start: Any, *, first_turn: Any = 0, part: int = 0) -> Any:
    """In a kernel: applies `carry = visit(base, offset, carry)` to all parts of rows, up to the longest row's end.

    Args:
      lengths: int32 `[rows, ...]`.
      visit: takes the first position of a chunk of `CHUNK // rows`, and the offset of a part in it, a Python integer:
        so one address serves the chunk.
      start: the first carry.
      first_turn: chunks that are left out.
      part: positions of a part; 0 means `PART // rows`.
    """
    chunk, part = CHUNK // lengths.shape[0], part or PART // lengths.shape[0]

    def turn(i, carry):
        for offset in range(0, chunk, part):
            carry = visit(pl.multiple_of(i * chunk, chunk), offset, carry)
        return carry

    return lax.fori_loop(first_turn, (_longest(lengths) + chunk - 1) // chunk, turn, start)


def tile_of(ref: Any, base: Any, offset: int) -> Any:
    """In a kernel: the 128 lanes at `base + offset`, of the chunk at `base` of rows."""
    return ref.at[:, pl.ds(base, CHUNK // ref.shape[0])].at[:, pl.ds(offset, LANES)]


def search_threshold(
    lengths: jax.Array, scores_ref: Any, keys_ref: Any, sample_ref: Any, k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """In a kernel: the thresholds of some rows, as keys, and their last ties, as `select_threshold` has them.

    Args:
      lengths: int32 `[rows, 1]`.
      scores_ref: float32 `[rows, s]`, s a multiple of `CHUNK // rows`.
      keys_ref: int32 `[rows, s]`. It gets the scores as integers in their order, up to the end of the longest row's
        last chunk. Positions from a row's length on get one that is below every threshold.
      sample_ref: int32 `[rows, s / SAMPLE]`, for a sample of them.
      k: number of scores to select.

    Returns:
      int32 `[rows, 128]` twice, with equal lanes, and an int32 that is not 0 if a row does not keep all scores that
      equal its threshold.
    """
    rows = lengths.shape[0]
    shape = (rows, LANES)  # All that is kept of a row is in every lane, so no loop has to spread it.
    lengths = jnp.broadcast_to(lengths, shape)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)

    def sum_of_lanes(parts):
        total = functools.reduce(jnp.add, parts)
        return jnp.broadcast_to(jnp.sum(total, axis=1, keepdims=True), shape)

    def count(condition):
        """The number of positions at which `condition(keys, first position)` holds."""

        def visit(base, offset, sums):
            offsets = [offset + tile * LANES for tile in range(len(sums))]
            chosen = [condition(tile_of(keys_ref, base, offset)[...], base + offset) for offset in offsets]
            return tuple(total + jnp.where(one, 1, 0) for total, one in zip(sums, chosen, strict=True))

        return sum_of_lanes(over_rows(lengths, visit, (jnp.zeros(shape, jnp.int32),) * (PART // rows // LANES)))

    group, chunk = SAMPLE * LANES, CHUNK // rows

    def convert(base, group_offset, bounds, *, whole):
        sample: Any = None
        for tile in range(SAMPLE):
            offset = group_offset + tile * LANES
            keys = _sort_key(tile_of(scores_ref, base, offset)[...])
            keys = keys if whole else jnp.where(base + offset + lane < lengths, keys, _LOWEST)
            tile_of(keys_ref, base, offset)[...] = keys
            # Other lanes of each tile, so that neighbours are not all in or all out.
            sample = keys if sample is None else jnp.where(lane % SAMPLE == tile, keys, sample)
        _sample_of(sample_ref, base, group_offset)[...] = sample
        lowest, highest = bounds
        return jnp.minimum(lowest, jnp.where(sample == _LOWEST, _HIGHEST, sample)), jnp.maximum(highest, sample)

    # Positions from a row's length on have a key below that of -inf, so they are never counted.
    full_turns = lax.div(_shortest(lengths), chunk)
    bounds = jnp.full(shape, _HIGHEST, jnp.int32), jnp.full(shape, _LOWEST, jnp.int32)

    def whole_chunk(i, bounds):
        for offset in range(0, chunk, group):
            bounds = convert(pl.multiple_of(i * chunk, chunk), offset, bounds, whole=True)
        return bounds

    bounds = lax.fori_loop(0, full_turns, whole_chunk, bounds)
    partly = functools.partial(convert, whole=False)
    lowest, highest = over_rows(lengths, partly, bounds, first_turn=full_turns, part=group)
    lowest = jnp.broadcast_to(jnp.min(lowest, axis=1, keepdims=True), shape)
    highest = jnp.broadcast_to(jnp.max(highest, axis=1, keepdims=True), shape)
    few = lengths <= k
    guesses = _bracket_of_sample(lengths, sample_ref, lowest, highest, few, k)
    # Where a guess proves wrong, the next are this far from it, then four times as far.
    reach = jnp.abs(_score(guesses[1]) - _score(guesses[0])) + jnp.abs(_score(guesses[1])) * 2**-10

    def unfinished(low, high, at_low):
        return jnp.logical_not(few | (at_low == k) | (high - low == 1))

    def narrow(state):
        low, high, at_low, at_high, side, reach, turn, _ = state
        number = (at_low - at_high).astype(jnp.float32)
        fraction = ((at_low - k).astype(jnp.float32) + 0.5) / number
        deviation = jnp.maximum(jnp.sqrt(jnp.maximum(number * fraction * (1.0 - fraction), 0.0)), 0.5)
        guess = _between(low, high, fraction + side * _LEAD * deviation / number)
        above, below = high > _INFINITY, low == _MINUS_INFINITY
        guess = jnp.where(above & ~below, _sort_key(_score(low) + reach), guess)
        guess = jnp.where(below & ~above, _sort_key(_score(high) - reach), guess)
        guess = jnp.where((turn >= 8) & (turn % 3 == 2), _middle(low, high), guess)
        guess = jnp.where(turn == 0, guesses[0], jnp.where(turn == 1, guesses[1], guess))
        guess = _inside(low, high, guess)
        found = count(lambda keys, _: keys >= guess)
        active, enough = unfinished(low, high, at_low), found >= k
        low, at_low = (jnp.where(active & enough, new, old) for new, old in ((guess, low), (found, at_low)))
        high, at_high = (jnp.where(active & ~enough, new, old) for new, old in ((guess, high), (found, at_high)))
        more = jnp.max(jnp.where(unfinished(low, high, at_low), 1, 0))
        return low, high, at_low, at_high, jnp.where(enough, 1.0, -1.0), 4.0 * reach, turn + 1, more

    # All scores are at least -inf, and none is above infinity.
    low, high = jnp.full(shape, _MINUS_INFINITY, jnp.int32), jnp.full(shape, _INFINITY + 1, jnp.int32)
    more = jnp.max(jnp.where(few, 0, 1))
    state = low, high, lengths, jnp.zeros_like(lengths), jnp.ones(shape, jnp.float32), reach, jnp.int32(0), more
    low, _, at_low, above, *_ = _search(lambda state: state[-1] > 0, narrow, state)
    tied = jnp.logical_not(few) & (at_low > k)

    def narrow_positions(state):
        before, last, _ = state  # The last tie that is kept is in (before, last].
        middle = (before + last) >> 1
        found = count(lambda keys, first: (keys == low) & (first + lane <= middle))
        enough = found >= k - above
        before, last = jnp.where(enough, before, middle), jnp.where(enough, middle, last)
        return before, last, jnp.max(jnp.where(tied, last - before, 0))

    before, last = jnp.full_like(lengths, -1), lengths - 1
    start = before, last, jnp.max(jnp.where(tied, last - before, 0))
    _, tie, _ = _position_search(lambda state: state[-1] > 1, narrow_positions, start)
    return low, jnp.where(tied, tie, lengths - 1), jnp.max(jnp.where(tied, 1, 0))


def _sample_of(sample_ref, base, offset):
    """The sample of `SAMPLE * 128` positions from `base + offset` on."""
    chunk = CHUNK // sample_ref.shape[0] // SAMPLE
    first = pl.multiple_of(lax.div(base, SAMPLE), chunk)
    return sample_ref.at[:, pl.ds(first, chunk)].at[:, pl.ds(offset // SAMPLE, LANES)]


def _bracket_of_sample(lengths, sample_ref, lowest, highest, few, k):
    """In a kernel: two keys between which the k-th highest of a row is, very likely, by its sample."""
    shape, expected = lengths.shape, k / SAMPLE
    margin = _DEVIATIONS * math.sqrt(expected)
    targets = expected + margin, max(expected - margin, 0.5)

    def counts(guesses):
        def visit(base, offset, sums):
            keys = _sample_of(sample_ref, base, offset)[...]
            return tuple(total + jnp.where(keys >= guess, 1, 0) for total, guess in zip(sums, guesses, strict=True))

        sums = over_rows(lengths, visit, (jnp.zeros(shape, jnp.int32),) * 2, part=SAMPLE * LANES)
        return [jnp.broadcast_to(jnp.sum(total, axis=1, keepdims=True), shape).astype(jnp.float32) for total in sums]

    def narrow(state):
        ends, turn, _ = state
        guesses = []
        for (low, high, at_low, at_high, guess, done), target in zip(ends, targets, strict=True):
            logs = [jnp.log(jnp.maximum(number, 0.5)) for number in (at_low, at_high)]
            fraction = (logs[0] - math.log(target)) / jnp.maximum(logs[0] - logs[1], 1e-3)
            new = _between(low, high, jnp.where(turn % 3 == 2, 0.5, fraction))
            guesses.append(jnp.where(done > 0, guess, new))
        new_ends = []
        for (low, high, at_low, at_high, _, done), guess, found, target in zip(
            ends, guesses, counts(guesses), targets, strict=True
        ):
            more = (found > target) & (done == 0)
            less = (found <= target) & (done == 0)
            low, at_low = jnp.where(more, guess, low), jnp.where(more, found, at_low)
            high, at_high = jnp.where(less, guess, high), jnp.where(less, found, at_high)
            close = (jnp.abs(found - target) <= margin / 3) | (high - low <= 1)
            new_ends.append((low, high, at_low, at_high, guess, jnp.where(close, 1, done)))
        open_ends = jnp.max(jnp.where(few, 0, 1 - new_ends[0][-1] * new_ends[1][-1]))
        return tuple(new_ends), turn + 1, jnp.where(turn < 9, open_ends, 0)

    all_of_sample = lengths.astype(jnp.float32) / SAMPLE
    end = lowest, highest + 1, all_of_sample, jnp.zeros(shape, jnp.float32), lowest, jnp.zeros(shape, jnp.int32)
    state = (end, end), jnp.int32(0), jnp.max(jnp.where(few, 0, 1))
    ends, *_ = _sample_search(lambda state: state[-1] > 0, narrow, state)
    return ends[0][4], ends[1][4]


def _lists(rows: jax.Array, lengths: jax.Array, threshold: jax.Array, last_tie: jax.Array, k: int) -> jax.Array:
    """The positions that a threshold, as a key, and a last tie select: int32 `[rows, k]`, then -1."""
    count, size = rows.shape
    tiles = pl.cdiv(size, 16 * LANES) * 16
    slots = pl.cdiv(k, LANES) * LANES
    rows = jnp.pad(rows, ((0, 0), (0, tiles * LANES - size))).reshape(count, tiles, LANES)
    limit = vmem_limit()
    if 24 * 4 * tiles * LANES > limit:
        raise NotImplementedError(f"VMEM holds lists of rows of up to {limit // 96:,} positions, not of {size:,}")
    positions = pl.pallas_call(
        _list_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(count,),
            in_specs=[pl.BlockSpec((None, tiles, LANES), lambda row, *_: (row, 0, 0))],
            out_specs=pl.BlockSpec((None, 1, slots), lambda row, *_: (row, 0, 0)),
        ),
        out_shape=result_like(rows, (count, 1, slots), jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=limit),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * tiles * LANES * (slots + 2 * LANES),
            bytes_accessed=4 * count * (size + slots),
            transcendentals=0,
        ),
        name="select_topk",
    )(threshold, last_tie, lengths, rows)
    return positions[:, 0, :k]


def _list_kernel(threshold_ref, last_ref, lengths_ref, scores_ref, positions_ref):
    row = pl.program_id(0)
    tiles = scores_ref.shape[0]
    threshold, last, length = threshold_ref[row], last_ref[row], lengths_ref[row]
    keys = _sort_key(scores_ref[...])
    tile = lax.broadcasted_iota(jnp.int32, keys.shape, 0)
    position = tile * LANES + lax.broadcasted_iota(jnp.int32, keys.shape, 1)
    chosen = (keys > threshold) | ((keys == threshold) & (position <= last))
    chosen = jnp.where(chosen & (position < length), 1.0, 0.0)
    # Products of zeros, ones and sums up to 128 are exact in the bfloat16 that a systolic array multiplies.
    square = (LANES, LANES)
    earlier = lax.broadcasted_iota(jnp.int32, square, 0) <= lax.broadcasted_iota(jnp.int32, square, 1)
    earlier = jnp.where(earlier, 1.0, 0.0)
    within = jnp.dot(chosen, earlier, precision=lax.Precision.DEFAULT)
    totals = jnp.dot(chosen, jnp.ones(square), precision=lax.Precision.DEFAULT)
    upto = totals.astype(jnp.int32)
    distance = 1
    while distance < tiles:
        upto += jnp.where(tile >= distance, pltpu.roll(upto, distance, 0), 0)
        distance *= 2
    before = upto - totals.astype(jnp.int32)
    within = jnp.transpose(within)
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    for first in range(0, positions_ref.shape[1], LANES):
        rank = first + lane
        holds = (before <= rank) & (rank < upto)
        own_tile = jnp.sum(jnp.where(holds, tile, 0), axis=0, keepdims=True)
        own_before = jnp.sum(jnp.where(holds, before, 0), axis=0, keepdims=True)
        one_hot = jnp.where(holds, 1.0, 0.0)
        sums = jnp.dot(within, one_hot, precision=lax.Precision.DEFAULT).astype(jnp.int32)
        offset = jnp.sum(jnp.where(sums <= rank - own_before, 1, 0), axis=0, keepdims=True)
        found = jnp.sum(jnp.where(holds, 1, 0), axis=0, keepdims=True) > 0
        positions_ref[:, pl.ds(first, LANES)] = jnp.where(found, own_tile * LANES + offset, -1)
