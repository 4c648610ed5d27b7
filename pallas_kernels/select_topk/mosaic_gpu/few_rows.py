"""Selection of few rows: a cluster of blocks holds a row in registers, so its scores are read once.

1. The threads' highest scores give a floor x. If k / cluster threads of every block hold a score of at least x, then k
   scores of the row are at least x. Scores below the floor cannot be among the k highest.
2. A histogram of the scores from the floor up, summed over the cluster, narrows down the k-th highest. More histograms
   follow until at most 32 scores are left. If more than 32 are equal, histograms of their positions follow.
3. Every block gets these 32, the finalists, and ranks them. That gives the k-th highest score and the last position at
   which an equal score still counts. At the same time the warps exchange their counts of higher scores, from which a
   block knows where to write its positions.

A warp owns a run of neighbouring positions. The runs of the blocks alternate, so that high scores in one part of the
row are spread over all blocks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.hopper import MULTIPROCESSORS
from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.simt import warp_scan
from pallas_kernels.select_topk.mosaic_gpu.row_reader import HIGHEST, row_length, sort_key, write_short_row

BINS = 2048
FINALISTS = 32
"""Scores that are ranked one by one, one per lane."""
MAX_CHUNKS = 16
"""Most loads of four scores that fit a thread's registers."""

# Up to _WIDE_ROWS rows that are longer than _WIDE_SIZE get clusters of 16 blocks.
_WIDE_ROWS, _WIDE_SIZE = 4, 65_536

_SHORT_CHUNKS = 2
"""Loads of each thread where a row is short for its array: it is held by the same threads, in fewer registers."""

# Addresses in shared memory, in words. In order: a block's histogram; three histograms of the cluster, used in turn;
# sums and minima of warps; the result of find_bin; each block's floor and highest score; the number of finalists; the
# finalists; the warps' counts.
_TOTALS = BINS
_WARPS = _TOTALS + 3 * BINS
_FOUND = _WARPS + 64
_RANGES = _FOUND + 4
_COUNTER = _RANGES + 32
_FINALISTS = _COUNTER + 4
_RUNS = _FINALISTS + 2 * FINALISTS
WORDS = _RUNS + 512


@dataclasses.dataclass(frozen=True)
class HeldRowPlan:
    """How a row is spread over a cluster.

    Attributes:
      size: scores of the row.
      k: scores that are selected.
      cluster: blocks that hold the row.
      threads: threads of a block.
    """

    size: int
    k: int
    cluster: int
    threads: int = 512

    @property
    def chunks(self) -> int:
        """Number of four-score loads of each thread."""
        return -(-self.size // (self.cluster * self.threads * 4))

    @property
    def runs(self) -> int:
        """Number of warps of the cluster, each with one run of positions."""
        return self.cluster * self.threads // 32

    def shortened(self, chunks: int) -> "HeldRowPlan":
        """The plan for rows of this array that need at most this number of loads."""
        return dataclasses.replace(self, size=min(self.size, chunks * 4 * self.cluster * self.threads))


def few_rows_plan(rows: int, size: int, k: int) -> HeldRowPlan | None:
    """The plan with the widest cluster that the GPU has room for; None if the rows do not fit registers."""
    # The GPU places clusters of 16 less well: eight of them took two turns. A single one was faster than one of 8.
    if rows <= _WIDE_ROWS and size > _WIDE_SIZE:
        return HeldRowPlan(size, k, 16) if HeldRowPlan(size, k, 16).chunks <= MAX_CHUNKS else None
    for cluster in (8, 4, 2):
        plan = HeldRowPlan(size, k, cluster)
        if rows * cluster <= MULTIPROCESSORS and plan.chunks <= MAX_CHUNKS:
            return plan
    return None


def select_few_rows(scores: jax.Array, lengths: jax.Array, plan: HeldRowPlan) -> jax.Array:
    """`select_topk` of scores float32 `[rows, size]` and lengths int32 `[rows]`, int32 `[rows, k]`, under `plan`."""
    rows = len(scores)
    body = functools.partial(few_rows_body, rows=rows, plan=plan)
    out_type = jax.ShapeDtypeStruct((rows, plan.k), jnp.int32)
    return launch(body, out_type, rows, plan.cluster, plan.threads, WORDS)(scores, lengths)


def few_rows_body(machine, scores, lengths, positions, row, rank, *, rows, plan):
    """Runs in each thread: selects row `row`. `rank` is the block's number in its cluster."""
    row, rank = machine.word(row), machine.word(rank)
    length = row_length(machine, lengths, row, rows, plan.size)
    out = machine.row(positions, row, plan.k)
    with machine.when(length <= plan.k):
        write_short_row(machine, out, length, rank, plan.k)
    own, short = machine.row(scores, row, plan.size), plan.shortened(_SHORT_CHUNKS)
    least = plan.k
    if short.size < plan.size:
        with machine.when((length > plan.k) & (length <= short.size)):
            held = HeldRow(machine, own, length, rank, short)
            held.write(out, *held.find())
        least = max(plan.k, short.size)
    with machine.when(length > least):
        held = HeldRow(machine, own, length, rank, plan)
        held.write(out, *held.find())


class HeldRow:
    """A row in the registers of a cluster, as each thread sees it."""

    def __init__(self, machine, row, length, rank, plan):
        self.machine, self.length, self.rank, self.plan = machine, length, rank, plan
        self.run = machine.warp * machine.cluster + rank
        self.start = self.run * (plan.chunks * 128)
        self.first = self.start + machine.lane * 4
        # A load past the end of the row reads its last four scores instead. `hide` removes them below.
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

    # Histograms of the keys from `low` to `high`: a bin holds 2 ** shift keys.

    def shift(self, low, high):
        zeros = self.machine.leading_zeros(high - low)
        return self.machine.select(zeros < 21, self.machine.word(21) - zeros, 0)

    def my_bins(self):
        """The first of the bins that this thread adds up. The first thread has the highest bins."""
        each = BINS // self.machine.threads
        return self.machine.word(BINS - each) - self.machine.thread * each

    def find_bin(self, bins, rank):
        """Finds the bin of the `rank`-th highest key.

        Returns the bin, the number of keys in higher bins, and the number in the bin. If there are fewer than `rank`
        keys, it returns the previous result.
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
        """Keys of the floor and of the highest score. The k-th highest of the row is between them."""
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
        # A block with too few scores has no floor.
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
        """One step towards the k-th highest value. It is between `low` and `high`, and `above` values are higher.

        `value_of(i) -> (value, condition)`. Returns the next turn, low, high, above, and the number of values between
        low and high.
        """
        machine = self.machine
        shift, width = self.shift(low, high), high - low
        for i in range(len(self.keys)):
            value, condition = value_of(i)
            offset = value - low
            inside = offset <= width
            machine.count_shared(offset >> shift, inside if condition is None else inside & condition)
        machine.barrier()
        # Each block adds up a part of the bins. While one turn's bins are written, the next turn's are cleared. They
        # were last read two turns ago, and all blocks have left that turn.
        mine, bins_per_block = self.my_bins(), BINS // machine.cluster
        each = BINS // machine.threads
        bins = machine.load_shared_vector(mine, each)
        totals, owner = turn * BINS + _TOTALS, mine // bins_per_block
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
        """The key of the k-th highest score, the last position at which an equal score counts, and where to write."""
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
        """Sends the finalists and this warp's count of higher scores to all blocks.

        Returns the number of higher scores before this warp's run.
        """
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
        """Key and position of the `wanted`-th finalist, and the number of selected scores before this warp's run."""
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
        # A sum over lanes is at most 128, so four sums fit one word.
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
