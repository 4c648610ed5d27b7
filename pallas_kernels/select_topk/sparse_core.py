"""Exact selection on the SparseCores of TPUs, in Pallas: a radix search for the threshold, then compaction.

The vector subcores of a SparseCore work in teams on a row each, or alone on rows that they hold themselves. A member of
a team copies its part of the row from HBM into its own memory once, and keeps it there as integers that ascend while
the scores descend. Four passes find the k-th highest score, 8 bits each: a histogram of the integers that share the
bits found so far, with one counter for each lane, so that no two lanes add to the same address. Members exchange their
histograms through the memory that a SparseCore's subcores share. Each adds up all of them, which gives the next bits,
and those of the members before it, which gives the place of its own positions in the list. A last pass compacts the
positions above the threshold and, of those that equal it, as many as the list still has room for. Members write their
places of the list into shared memory, and each merges a slice of it.

All sums are of integers, so the result has the same bits on every run. The time depends on the lengths, not on the
scores.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from pallas_kernels.tpu import LANES, result_like

_DIGIT_BITS = 8
_BINS = 2**_DIGIT_BITS
_COPIES = 4
"""Copies of a member's part. The first pass counts a part's beginning while its end is on its way."""
_SMALLEST_PART = 4096
"""Positions below which more members would only exchange more histograms."""
_UNROLL = 4
_INFINITY = 0x7F800000
_HIGHEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class _Teams:
    """How the subcores share the rows.

    Attributes:
      cores, subcores: SparseCores of a device, and vector subcores of one.
      lanes: elements of a vector.
      members: subcores of a team, a power of two.
      copied: positions of one of the `_COPIES` copies of a part.
      slots: entries of a list, a multiple of 128 for each member.
      waves: rows of a team.
    """

    cores: int
    subcores: int
    lanes: int
    members: int
    copied: int
    slots: int
    waves: int

    @property
    def count(self) -> int:
        return self.cores * self.subcores // self.members

    @property
    def part(self) -> int:
        return self.copied * _COPIES


def select_topk(scores: jax.Array, lengths: jax.Array, k: int) -> jax.Array:
    """See `api.select_topk`.

    Raises:
      NotImplementedError: a TPU without usable SparseCores, scores that are not float32, or rows so long that a
        SparseCore does not hold one.
    """
    leading, size = scores.shape[:-1], scores.shape[-1]
    if scores.dtype != jnp.float32:
        raise NotImplementedError(f"takes float32 scores, not {scores.dtype}")
    scores, lengths = scores.reshape(-1, size), jnp.clip(lengths.reshape(-1), 0, size).astype(jnp.int32)
    rows = scores.shape[0]
    if not rows or not size:
        raise NotImplementedError("takes at least one row and one position")
    teams = _teams(rows, size, k)
    # A team's lengths lie next to each other.
    lengths = jnp.pad(lengths, (0, teams.waves * teams.count - rows)).reshape(teams.waves, teams.count).T
    lengths = jnp.pad(lengths, ((0, 0), (0, -(teams.waves + teams.lanes) % LANES + teams.lanes)))
    if padding := teams.members * teams.part - size:
        scores = jnp.pad(scores, ((0, 0), (0, padding)))
    memory = functools.partial(pltpu.VMEM, dtype=jnp.int32)
    shared = functools.partial(pltpu.VMEM_SHARED, dtype=jnp.int32)
    memories: dict[str, Any] = {
        "lengths": memory((lengths.shape[1],)),
        "part": pltpu.VMEM((teams.part,), jnp.float32),
        "counters": memory((_BINS * teams.lanes,)),
        "own": memory((_BINS,)),
        "team": memory((_BINS * teams.members,)),
        "before": memory((_BINS + teams.lanes,)),
        "positions": memory((teams.slots + teams.lanes,)),
        "copies": pltpu.SemaphoreType.DMA((_COPIES,)),
    }
    if teams.members > 1:
        memories["histograms"] = shared((2 * _BINS * teams.subcores,))
        memories["lists"] = shared((teams.slots * teams.subcores,))
    kernel: Any = pl.kernel(
        functools.partial(_kernel, rows=rows, k=k, teams=teams),
        out_type=result_like(scores, (rows, teams.slots), jnp.int32),
        mesh=plsc.VectorSubcoreMesh(
            core_axis_name="core",
            subcore_axis_name="subcore",
            num_cores=teams.cores,
            num_subcores=teams.subcores,
        ),
        scratch_types=memories,
        compiler_params=pltpu.CompilerParams(needs_layout_passes=False),
        cost_estimate=pl.CostEstimate(
            flops=30 * rows * size, bytes_accessed=4 * rows * (size + teams.slots), transcendentals=0
        ),
        name="select_topk",
    )
    # The compiler aborts where it fuses the kernel with what takes its result, such as a loop that stacks results.
    out = lax.optimization_barrier(kernel(lengths, scores))
    return out[:, :k].reshape(*leading, k)


def holds(rows: int, size: int, k: int) -> bool:
    """Whether the current mesh's device, else the default device, has SparseCores that hold rows of so many scores."""
    try:
        _teams(rows, size, k)
    except NotImplementedError:
        return False
    return True


def _teams(rows: int, size: int, k: int) -> _Teams:
    """The smallest teams whose members hold their parts, or larger ones if there are more subcores than rows need."""
    try:
        info = plsc.get_sparse_core_info()
    except (RuntimeError, ValueError) as error:
        raise NotImplementedError("takes a TPU whose SparseCores run programs: v5p, v6e or tpu7x") from error
    subcores = info.num_cores * info.num_subcores

    def teams(members: int) -> _Teams:
        slots = pl.cdiv(k, members * LANES) * members * LANES
        copied = pl.cdiv(size, members * _COPIES * LANES) * LANES
        waves = pl.cdiv(rows, subcores // members)
        return _Teams(info.num_cores, info.num_subcores, info.num_lanes, members, copied, slots, waves)

    def words(team: _Teams) -> int:
        """Words of a subcore's memory. Shared memory is taken from all subcores' alike."""
        own = team.part + _BINS * (team.lanes + team.members + 2) + team.slots + team.waves + 2 * LANES
        return own + 2 * _BINS + team.slots

    # The compiler keeps some for itself.
    capacity = info.vmem_capacity_bytes // 4 * 15 // 16
    members = 1
    while words(teams(members)) > capacity:
        members *= 2
        if members > info.num_subcores:
            raise NotImplementedError(f"a SparseCore does not hold a row of {size:,} positions and its list")
    while 2 * members * min(rows, subcores) <= subcores and 2 * members <= info.num_subcores:
        if teams(2 * members).part < _SMALLEST_PART:
            break
        members *= 2
    return teams(members)


@dataclasses.dataclass
class _Memories:
    """What a kernel works in: one dimension, and all but the part int32.

    Attributes:
      lengths: of the team's rows.
      part: the part of a row, float32. The bits are those of integers that ascend while the scores descend.
      counters: of a histogram, one for each lane of a bin.
      own: the histogram of the part.
      team: the members' histograms.
      before: the histogram of the parts of the members before this one.
      positions: the list, with -1 where it has entries of other members.
      copies: semaphores of the copies of a part.
      histograms, lists: those of all subcores of the core, in shared memory. None if each works alone.
    """

    lengths: Any
    part: Any
    counters: Any
    own: Any
    team: Any
    before: Any
    positions: Any
    copies: Any
    histograms: Any = None
    lists: Any = None


def _kernel(lengths_hbm, scores_hbm, out_hbm, *, rows, k, teams, **memories):
    memories = _Memories(**memories)
    subcore = lax.axis_index("subcore")
    number = lax.axis_index("core") * teams.subcores + subcore
    team, member = lax.div(number, teams.members), lax.rem(number, teams.members)
    pltpu.sync_copy(lengths_hbm.at[team], memories.lengths)

    @plsc.parallel_loop(0, _BINS * teams.lanes, teams.lanes, unroll=_UNROLL)
    def _(i):
        memories.counters[pl.ds(i, teams.lanes)] = jnp.zeros((teams.lanes,), jnp.int32)

    @pl.loop(0, teams.waves)
    def _(wave):
        row = wave * teams.count + team
        length = memories.lengths[pl.ds(wave, teams.lanes)][0]
        first = member * teams.part
        held = jnp.clip(length - first, 0, teams.part)
        _copy_and_count(scores_hbm, memories, row, first, held, teams)
        found = _search(memories, subcore, member, held, jnp.minimum(length, k), teams)
        _compact(memories, first, held, found, teams)
        _write(memories, out_hbm, row, rows, subcore, member, teams)


def _copy_and_count(scores_hbm, memories, row, first, held, teams):
    """Copies a part, makes integers of its scores, and counts their first digits."""
    lanes, copied = teams.lanes, teams.copied
    lane = lax.iota(jnp.int32, lanes)

    def copy(i):
        return pltpu.make_async_copy(
            scores_hbm.at[row, pl.ds(pl.multiple_of(first + i * copied, LANES), copied)],
            memories.part.at[pl.ds(i * copied, copied)],
            memories.copies.at[i],
        )

    for i in range(_COPIES):

        @pl.when(i * copied < held)
        def _(i=i):
            copy(i).start()

    for i in range(_COPIES):

        @pl.when(i * copied < held)
        def _(i=i):
            copy(i).wait()

            @plsc.parallel_loop(i * copied, jnp.minimum(held, (i + 1) * copied), lanes, unroll=_UNROLL)
            def _(j):
                bits = _bits(memories, j, lanes)
                magnitude = bits & _HIGHEST
                # Zeros of both signs give -1.
                key = jnp.where(bits < 0, magnitude - 1, ~magnitude)
                key = jnp.where(magnitude > _INFINITY, ~_INFINITY, key)  # NaN
                key = jnp.where(j + lane < held, key, _HIGHEST)
                memories.part[pl.ds(j, lanes)] = lax.bitcast_convert_type(key, jnp.float32)
                _count(memories, key, 0, lane, None)


def _bits(memories, first, lanes):
    return lax.bitcast_convert_type(memories.part[pl.ds(first, lanes)], jnp.int32)


def _digit(key, turn):
    """The bits of the keys that a turn of the search finds. The first bit is the sign, so the first digit is signed."""
    shift = 32 - _DIGIT_BITS * (turn + 1)
    return (key >> shift) + _BINS // 2 if turn == 0 else (key >> shift) & (_BINS - 1)


def _count(memories, key, turn, lane, mask):
    counter = _digit(key, turn) * lane.size + lane
    plsc.addupdate_scatter(memories.counters, [counter], jnp.ones_like(lane), mask=mask)


def _search(memories, subcore, member, held, wanted, teams):
    """The last selected key.

    Returns:
      The key; how many positions the members before this one select above it; how many positions that equal it are
      selected, and how many of these the members before this one have.
    """
    lanes = teams.lanes
    lane = lax.iota(jnp.int32, lanes)
    key = digit = earlier = jnp.int32(0)
    for turn in range(32 // _DIGIT_BITS):
        if turn:
            shift = 32 - _DIGIT_BITS * turn
            known = key

            @plsc.parallel_loop(0, held, lanes, unroll=_UNROLL)
            def _(j, turn=turn, shift=shift, known=known):
                keys = _bits(memories, j, lanes)
                _count(memories, keys, turn, lane, (keys >> shift) == known)

        _exchange(memories, subcore, member, turn % 2, teams)

        zero = jnp.zeros((lanes,), jnp.int32)

        @plsc.parallel_loop(0, _BINS, lanes, carry=(jnp.int32(0), zero, zero, zero))
        def sums(i, carry, wanted=wanted):
            upto, bins, above, earlier = carry
            total = before = jnp.zeros((lanes,), jnp.int32)
            for other in range(teams.members):
                counts = memories.team[pl.ds(other * _BINS + i, lanes)]
                total, before = total + counts, before + jnp.where(other < member, counts, 0)
            memories.before[pl.ds(i, lanes)] = before
            total = plsc.cumsum(total) + upto
            low = total < wanted
            return (
                total[lanes - 1],
                bins + jnp.where(low, 1, 0),
                jnp.maximum(above, jnp.where(low, total, 0)),
                earlier + jnp.where(low, before, 0),
            )

        _, bins, above, passed = sums
        digit = jnp.sum(bins)
        key = digit - _BINS // 2 if turn == 0 else (key << _DIGIT_BITS) | digit
        wanted, earlier = wanted - jnp.max(above), earlier + jnp.sum(passed)
    return key, earlier, wanted, memories.before[pl.ds(digit, lanes)][0]


def _exchange(memories, subcore, member, side, teams):
    """Adds up the lanes' counters, clears them, and collects the members' histograms.

    Args:
      side: of shared memory. Members that are a turn ahead write to the other side.
    """
    lanes = teams.lanes
    lane = lax.iota(jnp.int32, lanes)
    own = memories.own if teams.members > 1 else memories.team

    @plsc.parallel_loop(0, _BINS, lanes)
    def _(i):
        total = zero = jnp.zeros((lanes,), jnp.int32)
        for turn in range(lanes):
            # A lane reads another lane's counters of its bin, so that all are in different banks.
            counter = [(i + lane) * lanes + ((lane + turn) & (lanes - 1))]
            total = total + plsc.load_gather(memories.counters, counter)
            plsc.store_scatter(memories.counters, counter, zero)
        own[pl.ds(i, lanes)] = total

    if teams.members == 1:
        return
    start = side * teams.subcores * _BINS
    pltpu.sync_copy(own, memories.histograms.at[pl.ds(pl.multiple_of(start + subcore * _BINS, LANES), _BINS)])
    plsc.subcore_barrier()
    start = pl.multiple_of(start + (subcore - member) * _BINS, LANES)
    pltpu.sync_copy(memories.histograms.at[pl.ds(start, teams.members * _BINS)], memories.team)


def _compact(memories, first, held, found, teams):
    """Writes the part's selected positions to their places of the list."""
    lanes = teams.lanes
    lane = lax.iota(jnp.int32, lanes)
    key, earlier, ties, earlier_ties = found

    @plsc.parallel_loop(0, teams.slots + lanes, lanes, unroll=_UNROLL)
    def _(i):
        memories.positions[pl.ds(i, lanes)] = jnp.full((lanes,), -1, jnp.int32)

    start = earlier + jnp.minimum(ties, earlier_ties), earlier_ties

    @plsc.parallel_loop(0, held, lanes, unroll=_UNROLL, carry=start)
    def _(j, carry):
        place, seen = carry
        keys = _bits(memories, j, lanes)
        tied = keys == key
        kept = tied & (plsc.cumsum(jnp.where(tied, 1, 0)) + seen <= ties)
        chosen = (keys < key) | kept
        plsc.store_compressed(memories.positions.at[pl.ds(place, lanes)], first + j + lane, mask=chosen)
        count = plsc.all_reduce_population_count
        return place + count(chosen)[0], seen + count(tied)[0]


def _write(memories, out_hbm, row, rows, subcore, member, teams):
    """Writes a row's list to HBM, each member a slice."""
    lanes, slots = teams.lanes, teams.slots
    width = slots // teams.members
    start = pl.multiple_of(member * width, LANES)
    if teams.members > 1:
        own = pl.multiple_of(subcore * slots, LANES)
        pltpu.sync_copy(memories.positions.at[pl.ds(0, slots)], memories.lists.at[pl.ds(own, slots)])
        plsc.subcore_barrier()
        for other in range(teams.members):
            theirs = pl.multiple_of((subcore - member + other) * slots + start, LANES)
            pltpu.sync_copy(memories.lists.at[pl.ds(theirs, width)], memories.positions.at[pl.ds(other * width, width)])

        @plsc.parallel_loop(0, width, lanes)
        def _(i):
            # A place belongs to one member; the others have -1 there.
            merged = memories.positions[pl.ds(i, lanes)]
            for other in range(1, teams.members):
                merged = jnp.maximum(merged, memories.positions[pl.ds(other * width + i, lanes)])
            memories.positions[pl.ds(i, lanes)] = merged

    @pl.when(row < rows)
    def _():
        pltpu.sync_copy(memories.positions.at[pl.ds(0, width)], out_hbm.at[row, pl.ds(start, width)])
