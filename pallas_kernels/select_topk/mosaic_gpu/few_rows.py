"""Selection of few rows: a cluster of blocks holds a row in registers, so that its scores are read once.

1. The threads' highest scores give a floor: where, in each block, its share of k threads hold a score of at least x, k
   scores of the row are at least x, and what is below cannot be among the k highest.
2. A histogram of what is left, between the floor and the highest score, summed over the cluster, narrows down where the
   k-th highest lies; more of them, until at most 32 scores are there. Where more are equal, histograms of their
   positions go on.
3. Every block gets those 32, ranks them, and knows the k-th highest and the last position at which an equal score
   still counts. With the warps' counts of higher scores, exchanged at the same time, it writes its positions to their
   place.

A warp owns a run of neighbouring positions; the runs of the blocks alternate, so that they share what lies in one part
of the row.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.hopper import MULTIPROCESSORS
from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.simt import warp_scan
from pallas_kernels.select_topk.mosaic_gpu.row_reader import HIGHEST, sort_key

BINS = 2048
FINALISTS = 32
"""Scores that are ranked one by one: a lane each."""
MAX_CHUNKS = 16
"""Loads of four scores that a thread's registers have room for."""

# Up to so many rows, longer than so, get clusters of 16 blocks.
_WIDE_ROWS, _WIDE_SIZE = 4, 65_536

# Shared memory, in words: histograms of a block and, three in turn, of the cluster; sums and minima of warps; what was
# found; each block's floor and highest score; the finalists; the warps' counts.
_TOTALS = BINS
_WARPS = _TOTALS + 3 * BINS
_FOUND = _WARPS + 64
_RANGES = _FOUND + 4
_COUNTER = _RANGES + 32
_FINALISTS = _COUNTER + 4
_RUNS = _FINALISTS + 2 * FINALISTS
WORDS = _RUNS + 512


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a row of `size` scores, of which `k` are selected, is spread over `cluster` blocks of `threads`."""

    size: int
    k: int
    cluster: int
    threads: int = 512

    @property
    def chunks(self) -> int:
        """Loads of four scores of each thread."""
        return -(-self.size // (self.cluster * self.threads * 4))

    @property
    def runs(self) -> int:
        """Warps of the cluster."""
        return self.cluster * self.threads // 32


def few_rows_plan(rows: int, size: int, k: int) -> Plan | None:
    """The widest cluster that the GPU has room for; None where registers do not hold the rows."""
    # Clusters of 16 are placed less well: eight of them took two turns, one was faster than with 8 blocks.
    if rows <= _WIDE_ROWS and size > _WIDE_SIZE:
        return Plan(size, k, 16) if Plan(size, k, 16).chunks <= MAX_CHUNKS else None
    for cluster in (8, 4, 2):
        plan = Plan(size, k, cluster)
        if rows * cluster <= MULTIPROCESSORS and plan.chunks <= MAX_CHUNKS:
            return plan
    return None


def select_few_rows(scores: jax.Array, lengths: jax.Array, plan: Plan) -> jax.Array:
    """`mosaic_gpu.select_topk` of scores `[rows, size]` and lengths `[rows]`, spread as `plan` says."""
    rows = len(scores)
    body = functools.partial(few_rows_body, rows=rows, plan=plan)
    out_type = jax.ShapeDtypeStruct((rows, plan.k), jnp.int32)
    return launch(body, out_type, rows, plan.cluster, plan.threads, WORDS)(scores, lengths)


def few_rows_body(machine, scores, lengths, positions, row, rank, *, rows, plan):
    """Selects row `row`; `rank` is the block's number in its cluster."""
    row, rank = machine.word(row), machine.word(rank)
    length = machine.load_global(machine.row(lengths, 0, rows), row)
    out = machine.row(positions, row, plan.k)
    with machine.when(length <= plan.k):

        def put(at):
            machine.store_global(out, at, machine.select(at < length, at, HIGHEST))

        machine.loop(rank * machine.threads + machine.thread, plan.k, machine.cluster * machine.threads, put)
    with machine.when(length > plan.k):
        held = HeldRow(machine, machine.row(scores, row, plan.size), length, rank, plan)
        held.write(out, *held.find())


class HeldRow:
    """A row in the registers of a cluster, as each thread sees it."""

    def __init__(self, machine, row, length, rank, plan):
        self.machine, self.length, self.rank, self.plan = machine, length, rank, plan
        self.run = machine.warp * machine.cluster + rank
        self.start = self.run * (plan.chunks * 128)
        self.first = self.start + machine.lane * 4
        # A read past the end of the row becomes one of its last scores, which the length then hides.
        scores = [machine.load_global4(row, (self.first + i * 128).min(plan.size - 4)) for i in range(plan.chunks)]
        self.clear(0, BINS)
        self.clear(_TOTALS, 3 * BINS)
        with machine.when(machine.thread.eq(0)):
            machine.store_shared(_COUNTER, 0)
        keys = [sort_key(score) for chunk in scores for score in chunk]

        def hide(*keys):
            return [machine.select(self.position(i) < length, key, 0) for i, key in enumerate(keys)]

        self.keys = machine.branch(self.start + plan.chunks * 128 > length, hide, keys)

    def position(self, i):
        return self.first + (i // 4 * 128 + i % 4)

    def clear(self, start, size):
        machine = self.machine
        each = min(4, size // machine.threads)
        for i in range(0, size, each * machine.threads):
            machine.store_shared_vector(machine.thread * each + (start + i), [machine.word(0)] * each)

    # Histograms. Of `[low, high]`, as much as `shift` bits a bin.

    def shift(self, low, high):
        zeros = self.machine.leading_zeros(high - low)
        return self.machine.select(zeros < 21, self.machine.word(21) - zeros, 0)

    def my_bins(self):
        """The first of the bins that this thread adds up: the first thread the highest ones."""
        each = BINS // self.machine.threads
        return self.machine.word(BINS - each) - self.machine.thread * each

    def find_bin(self, bins, rank):
        """Counting from the highest bin down: the bin with the `rank`-th, how many are in higher ones, and in it.

        Leaves alone what was found before if there are fewer.
        """
        machine = self.machine
        own = sum(bins[1:], bins[0])
        inclusive = warp_scan(machine, own)
        with machine.when(machine.lane.eq(31)):
            machine.store_shared(machine.warp + _WARPS, inclusive)
        machine.barrier()
        warps = machine.threads // 32
        sums = machine.load_shared(machine.lane.min(warps - 1) + _WARPS)
        above = inclusive - own + machine.warp_sum(machine.select(machine.lane < machine.warp, sums, 0))
        with machine.when((above < rank) & (above + own >= rank)):
            for i in reversed(range(len(bins))):
                with machine.when((above < rank) & (above + bins[i] >= rank)):
                    for slot, value in enumerate((self.my_bins() + i, above, bins[i])):
                        machine.store_shared(_FOUND + slot, value)
                above = above + bins[i]
        machine.barrier()
        return [machine.load_shared(_FOUND + slot) for slot in range(3)]

    # The steps.

    def bounds(self):
        """Two scores with the k-th highest of the row between them: the floor and the highest."""
        machine, plan = self.machine, self.plan
        warps = machine.threads // 32
        best = self.keys[0]
        for key in self.keys[1:]:
            best = best.max(key)
        least = machine.warp_min(machine.select(best.eq(0), HIGHEST, best))
        most = machine.warp_max(best)
        with machine.when(machine.lane.eq(0)):
            machine.store_shared_vector(machine.warp * 2 + _WARPS, [least, most])
        with machine.when(machine.thread.eq(0)):
            machine.store_shared_vector(_FOUND, [machine.word(0)] * 4)
        machine.barrier()
        least, most = machine.load_shared_vector(machine.lane.min(warps - 1) * 2 + _WARPS, 2)
        least, most = machine.warp_min(least), machine.warp_max(most)
        shift = self.shift(least, most)
        machine.count_shared((best - least) >> shift, best.ne(0))
        machine.barrier()
        bins = machine.load_shared_vector(self.my_bins(), BINS // machine.threads)
        self.clear_my_bins()
        found, _, inside = self.find_bin(bins, -(-plan.k // machine.cluster))
        # Without scores enough, or any, a block has no floor.
        floor = machine.select(inside.eq(0), 1, least + (found << shift))
        with machine.when(machine.thread < machine.cluster):
            machine.store_peer(self.rank * 2 + _RANGES, machine.thread, floor)
            machine.store_peer(self.rank * 2 + (_RANGES + 1), machine.thread, most)
        machine.cluster_barrier()
        low, high = machine.load_shared_vector(machine.lane.min(machine.cluster - 1) * 2 + _RANGES, 2)
        return machine.warp_min(low), machine.warp_max(high)

    def clear_my_bins(self):
        self.machine.store_shared_vector(self.my_bins(), [self.machine.word(0)] * (BINS // self.machine.threads))

    def narrow(self, value_of, turn, low, high, above):
        """One step towards the k-th highest value, between `low` and `high`, with `above` values being higher.

        `value_of(i) -> (value, condition)`. Returns the next turn, low, high, above and the number of values between.
        """
        machine = self.machine
        shift, width = self.shift(low, high), high - low
        for i in range(len(self.keys)):
            value, condition = value_of(i)
            offset = value - low
            inside = offset <= width
            machine.count_shared(offset >> shift, inside if condition is None else inside & condition)
        machine.barrier()
        # Each block adds up a part of the bins. While a turn's are written, the next one's are cleared: the last to
        # read them was the turn before the last, which all blocks have left.
        mine, share = self.my_bins(), BINS // machine.cluster
        each = BINS // machine.threads
        bins = machine.load_shared_vector(mine, each)
        totals, owner = turn * BINS + _TOTALS, mine // share
        for i, count in enumerate(bins):
            with machine.when(count.ne(0)):
                machine.add_peer(totals + mine + i, owner, count)
        self.clear_my_bins()
        following = machine.select(turn.eq(2), 0, turn + 1)
        machine.store_shared_vector(following * BINS + _TOTALS + mine, [machine.word(0)] * each)
        machine.cluster_barrier()
        bins = machine.load_peer_vector(totals + mine, each, owner)
        found, higher, inside = self.find_bin(bins, machine.word(self.plan.k) - above)
        low, width = low + (found << shift), (machine.word(1) << shift) - 1
        return following, low, machine.select(high - low > width, low + width, high), above + higher, inside

    def find(self):
        """The key of the k-th highest score, the last position at which an equal one counts, and where to write."""
        machine = self.machine

        def narrow_until(value_of, turn, low, high, above, inside):
            return machine.while_loop(
                lambda turn, low, high, above, inside: low.ne(high) & (inside > FINALISTS),
                lambda turn, low, high, above, inside: self.narrow(value_of, turn, low, high, above),
                [turn, low, high, above, inside],
            )

        low, high = self.bounds()
        turn, low, high, above, inside = narrow_until(lambda i: (self.keys[i], None), 0, low, high, 0, HIGHEST)

        def narrow_positions(before, last, above, inside):
            _, late, early, above, inside = narrow_until(
                lambda i: (machine.word(HIGHEST) - self.position(i), self.keys[i].eq(low)),
                turn,
                machine.word(HIGHEST) - last,
                machine.word(HIGHEST) - before,
                above,
                inside,
            )
            return machine.word(HIGHEST) - early, machine.word(HIGHEST) - late, above, inside

        # The finalists have keys from `low` to `high` and positions from `begin` to `end`.
        begin, end, above, inside = machine.branch(
            inside > FINALISTS, narrow_positions, [0, self.length - 1, above, inside]
        )
        before = self.exchange(low, high, begin, end)
        return self.rank_finalists(machine.word(self.plan.k) - above, inside, before)

    def exchange(self, low, high, begin, end):
        """Gives the finalists to all blocks, and the count of this warp's scores above them."""
        machine = self.machine
        count, width = machine.word(0), high - low
        for i in range(0, len(self.keys), 4):
            four = list(range(i, i + 4))
            inside = [
                (self.keys[j] - low <= width) & (self.position(j) >= begin) & (self.position(j) <= end) for j in four
            ]
            for j in four:
                higher = (self.keys[j] > high) | (self.keys[j].eq(high) & (self.position(j) < begin))
                count = count + machine.select(higher, 1, 0)
            with machine.when(inside[0] | inside[1] | inside[2] | inside[3]):
                for j, condition in zip(four, inside, strict=True):
                    with machine.when(condition):
                        at = machine.fetch_add_peer(_COUNTER, 0, 1) * 2 + _FINALISTS
                        for peer in range(machine.cluster):
                            machine.store_peer_vector(at, peer, [self.keys[j], self.position(j)])
        count = machine.warp_sum(count)
        with machine.when(machine.lane < machine.cluster):
            machine.store_peer(self.run + _RUNS, machine.lane, count)
        machine.cluster_barrier()
        before = machine.word(0)
        for i in range(0, self.plan.runs, 32):
            index = machine.lane + i
            counts = machine.load_shared(index.min(self.plan.runs - 1) + _RUNS)
            before = before + machine.select(index < self.run, counts, 0)
        return before

    def rank_finalists(self, wanted, size, before):
        """Key and position of the `wanted`-th of the finalists, and the number selected in front of this warp's run."""
        machine = self.machine
        key, position = machine.load_shared_vector(machine.lane.min(size - 1) * 2 + _FINALISTS, 2)

        def compare(i, better):
            other, at = machine.load_shared_vector(i * 2 + _FINALISTS, 2)
            first = (other > key) | (other.eq(key) & (at < position))
            return [better + machine.select(first, 1, 0)]

        [better] = machine.loop(0, size, 1, compare, [0])
        valid = machine.lane < size
        last = valid & (better + 1).eq(wanted)
        threshold, last_tie = (machine.warp_max(machine.select(last, v, 0)) for v in (key, position))
        in_front = valid & (better < wanted) & (position < self.start)
        return threshold, last_tie, machine.warp_sum(before + machine.select(in_front, 1, 0))

    def write(self, out, threshold, last_tie, before):
        machine, plan = self.machine, self.plan
        chosen = [
            (key > threshold) | (key.eq(threshold) & (self.position(i) <= last_tie)) for i, key in enumerate(self.keys)
        ]
        counts = [machine.select(condition, 1, 0) for condition in chosen]
        sums = [sum(counts[i + 1 : i + 4], counts[i]) for i in range(0, len(counts), 4)]
        # The sums over lanes are at most 128: four of them fit a word.
        for i in range(0, plan.chunks, 4):
            packed = machine.word(0)
            for j, own in enumerate(sums[i : i + 4]):
                packed = packed | own << 8 * j
            inclusive = warp_scan(machine, packed)
            earlier, total = inclusive - packed, machine.shuffle(inclusive, 31)
            for j in range(min(4, plan.chunks - i)):
                at = before + (earlier >> 8 * j & 255)
                for e in range(4 * (i + j), 4 * (i + j) + 4):
                    machine.store_global_where(out, at, self.position(e), chosen[e])
                    at = at + counts[e]
                before = before + (total >> 8 * j & 255)
