"""Exact selection on Hopper GPUs (Pallas Mosaic GPU): what decides, per row, which scores are the highest.

`select_threshold` finds, per row, the k-th highest score and how far equal scores are kept. It reads a row about once:

1. Sample 4096 scores of the row and take two of them that very likely enclose the k-th highest of all ("bracket").
2. Read the row: count the scores above the bracket, collect those inside it in shared memory.
3. Narrow the bracket to one value with histograms of the collected scores.

Nothing depends on luck. When the bracket misses the k-th highest, or more scores lie inside than shared memory holds
(many equal scores, say), histograms over the whole row narrow the bracket by 2048x a pass until what is inside fits or
is one value, and step 2 runs again with it. When not all scores equal to the k-th are kept, histograms of their
positions find the last one. Scores are compared as order-preserving integers, -0.0 as 0.0.

A row is worked on by a team of 512 threads. Two teams share a block, each with its own barrier and shared memory, so
that one reads while the other is in its short steps. With too few rows to fill the GPU, a cluster of up to 8 blocks
works on a row instead: each reads a part of it, and histograms and counts are added up through distributed shared
memory.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.simt import Value, launch

HIGHEST = 0xFFFFFFFF
MULTIPROCESSORS = 132
BINS = 2048
# Shared memory of select_threshold, in words.
WARP_SUMS, FOUND, COUNTERS, BUFFER = BINS, BINS + 32, BINS + 36, BINS + 64


def raw_key(score):
    """Unsigned integers in the order of the float32 scores whose bits are given, -0.0 directly below 0.0."""
    return score ^ (score.sar(31) | 0x80000000)


def sort_key(score):
    """As `raw_key`, but 0.0 and -0.0 give the same."""
    return join_zeros(raw_key(score))


def join_zeros(key):
    return key.machine.select(key.eq(0x7FFFFFFF), 0x80000000, key)


class RowSelection:
    """One row's selection by the blocks of a cluster, each thread of which runs this."""

    def __init__(self, machine, row, length, rank, k, capacity, samples, unroll):
        self.machine, self.row, self.length, self.k = machine, row, length, k
        self.capacity, self.samples, self.unroll = capacity, samples, unroll
        self.totals = BUFFER + 2 * capacity
        blocks = machine.cluster
        share = (length + (4 * blocks - 1)) // (4 * blocks) * 4 if blocks > 1 else length
        self.end = (rank * share + share).min(length) if blocks > 1 else length
        self.begin = (rank * share).min(self.end) if blocks > 1 else machine.word(0)

    # Ways to visit scores.

    def visit_row(self, visit, carry=()):
        """`carry = visit(position, [4 scores], [4 conditions] or None, *carry)` over this block's part of the row."""
        machine = self.machine
        step = machine.threads * 4
        tile = step * self.unroll
        tiles = (self.end - self.begin) // tile
        first = self.begin + machine.thread * 4

        def visit_tile(i, *carry):
            position = first + i * tile
            scores = [machine.load_global4(self.row, position + u * step) for u in range(self.unroll)]
            for u in range(self.unroll):
                carry = visit(position + u * step, scores[u], None, *carry) or ()
            return carry

        def visit_rest(position, *carry):
            scores = machine.load_global4(self.row, position)
            return visit(position, scores, [position + i < self.end for i in range(4)], *carry)

        carry = machine.loop(0, tiles, 1, visit_tile, carry)
        return machine.loop(first + tiles * tile, self.end, step, visit_rest, carry)

    def count_row(self, bin_of):
        """Adds the row's scores to the histogram; `bin_of(position, key) -> (bin, condition)`."""

        def visit(position, scores, valid):
            for i, score in enumerate(scores):
                address, condition = bin_of(position + i, sort_key(score))
                self.machine.count_shared(address, condition & valid[i] if valid else condition)

        self.visit_row(visit)

    def slot(self, i):
        """Address of the i-th key, and behind it its position, that this thread holds in the buffer."""
        return (i * self.machine.threads + self.machine.thread) * 2 + BUFFER

    def count_buffer(self, size, bin_of):
        """Adds the first `size` keys that each thread holds in the buffer to the histogram."""

        def visit(i):
            key, position = self.machine.load_shared_vector(self.slot(i), 2)
            self.machine.count_shared(*bin_of(position, join_zeros(key)))

        self.machine.loop(0, size, 1, visit)

    def count_samples(self, bin_of):
        for i in range(0, self.samples // self.machine.threads, 4):
            slots = [self.machine.load_shared(self.slot(self.machine.word(i + j))) for j in range(4)]
            for key in slots:
                self.machine.count_shared(*bin_of(None, join_zeros(key)))

    # Histograms.

    def clear_bins(self):
        machine = self.machine
        each = BINS // machine.threads
        zeros = [machine.word(0)] * each
        machine.store_shared_vector(machine.thread * each, zeros)
        if machine.cluster > 1:
            machine.store_shared_vector(machine.thread * each + self.totals, zeros)
        machine.barrier()

    def find_bin(self, rank, together=True):
        """Counting from the highest bin down: the bin that holds the `rank`-th, how many are in higher bins, and in it.

        With `together` the histograms of all blocks of the cluster count.
        """
        machine = self.machine
        each = BINS // machine.threads
        together = together and machine.cluster > 1
        base = machine.word(BINS - each) - machine.thread * each
        machine.barrier()
        bins = machine.load_shared_vector(base, each)
        if together:  # The first block adds up, and looks; the others look too, but find nothing that is used.
            machine.cluster_barrier()
            for i in range(each):
                with machine.when(bins[i].ne(0)):
                    machine.add_first(base + (self.totals + i), bins[i])
            machine.cluster_barrier()
            bins = machine.load_shared_vector(base + self.totals, each)
        own = functools.reduce(Value.__add__, bins)
        inclusive = own
        for distance in (1, 2, 4, 8, 16):
            lower = machine.shuffle_up(inclusive, distance)
            inclusive = inclusive + machine.select(machine.lane >= distance, lower, 0)
        with machine.when(machine.lane.eq(31)):
            machine.store_shared(machine.warp + WARP_SUMS, inclusive)
        machine.barrier()
        above = inclusive - own
        for warp in range(machine.threads // 32):
            above = above + machine.select(machine.warp > warp, machine.load_shared(WARP_SUMS + warp), 0)
        with machine.when((above < rank) & (above + own >= rank)):
            for i in reversed(range(each)):
                with machine.when((above < rank) & (above + bins[i] >= rank)):
                    for slot, value in enumerate((base + i, above, bins[i])):
                        machine.store_shared(FOUND + slot, value)
                above = above + bins[i]
        if not together:
            machine.barrier()
            return [machine.load_shared(FOUND + slot) for slot in range(3)]
        machine.cluster_barrier()
        found = [machine.load_peer(FOUND + slot, 0) for slot in range(3)]
        machine.cluster_barrier()
        return found

    def narrow(self, count, rank, low, high, above, together=True, measure=None):
        """One step towards the `rank`-th highest value, between `low` and `high`, with `above` values being higher.

        `count(bin_of)` adds keys to the histogram. The values are `measure(position, key) -> (value, condition)`, by
        default the keys themselves. Returns low, high, above and the number of values between them.
        """
        machine = self.machine
        zeros = machine.leading_zeros(high - low)
        shift = machine.select(zeros < 21, machine.word(21) - zeros, 0)
        self.clear_bins()

        def bin_of(position, key):
            if measure is None:
                return (key - low) >> shift, key - low <= high - low
            value, condition = measure(position, key)
            return (value - low) >> shift, condition & (value - low <= high - low)

        count(bin_of)
        found, higher, inside = self.find_bin(machine.word(rank) - above, together)
        low = low + (found << shift)
        width = (machine.word(1) << shift) - 1
        return low, machine.select(high - low > width, low + width, high), above + higher, inside

    def narrow_until(self, enough, count, rank, low, high, above, inside=HIGHEST, **options):
        """Narrows until there is one value left or at most `enough` keys inside."""
        return self.machine.while_loop(
            lambda low, high, above, inside: low.ne(high) & (inside > enough),
            lambda low, high, above, inside: self.narrow(count, rank, low, high, above, **options),
            [low, high, above, inside],
        )

    # The steps.

    def bracket(self):
        """Two keys that very likely have the k-th highest between them, from a sample."""
        machine, samples = self.machine, self.samples
        points = samples // 4
        stride = (self.length >> 2) // points
        for i in range(points // machine.threads):
            point = machine.thread + i * machine.threads
            jitter = ((point * 2654435761 >> 16) * stride) >> 16
            scores = machine.load_global4(self.row, (point * stride + jitter) * 4)
            for j, score in enumerate(scores):
                machine.store_shared(self.slot(machine.word(4 * i + j)), raw_key(score))
        expected = machine.word(self.k * samples) // self.length
        margin = machine.square_root(expected) * 5 + 8
        near = functools.partial(self.narrow_until, 4, self.count_samples, low=0, high=HIGHEST, above=0, together=False)
        _, high, _, _ = near(machine.select(expected > margin, expected - margin, 1))
        low, _, _, _ = near((expected + margin).min(samples))
        return (machine.select(expected + margin >= samples, 0, low), machine.select(expected > margin, high, HIGHEST))

    def collect(self, low, high):
        """Collects the keys from `low` to `high` in the buffer, each thread in its own part of it.

        Returns how many keys of the row are above, how many are inside, whether the buffer held all, and how many this
        thread holds.
        """
        machine = self.machine
        with machine.when(machine.thread.eq(0)):
            machine.store_shared_vector(COUNTERS, [machine.word(0)] * 4)
        machine.barrier()
        # Both zeros are inside, or neither is, without the cost of joining them.
        low = machine.select(low.eq(0x80000000), 0x7FFFFFFF, low)
        high = machine.select(high.eq(0x7FFFFFFF), 0x7FFFFFFE, high)
        width = high - low
        first = self.slot(machine.word(0))
        limit = machine.word(BUFFER + 2 * self.capacity)

        def visit(position, scores, valid, above, free):
            for i, score in enumerate(scores):
                key = raw_key(score)
                inside, top = key - low <= width, key > high
                if valid:
                    inside, top = inside & valid[i], top & valid[i]
                above = above + machine.select(top, 1, 0)
                machine.store_shared_pair_where(free, key, position + i, inside & (free < limit))
                free = free + machine.select(inside, 2 * machine.threads, 0)
            return above, free

        above, free = self.visit_row(visit, [0, first])
        held = (free - first) // (2 * machine.threads)
        above, inside = machine.warp_sum(above), machine.warp_sum(held)
        machine.count_shared(COUNTERS + 3, held > self.capacity // machine.threads)
        with machine.when(machine.lane.eq(0)):
            machine.add_shared(COUNTERS + 1, above)
            machine.add_shared(COUNTERS + 2, inside)
        machine.cluster_barrier()
        if machine.cluster == 1:
            _, above, inside, over = machine.load_shared_vector(COUNTERS, 4)
        else:
            above, inside, over = (
                functools.reduce(
                    Value.__add__, (machine.load_peer(COUNTERS + i, peer) for peer in range(machine.cluster))
                )
                for i in (1, 2, 3)
            )
        machine.cluster_barrier()
        return above, inside, machine.select(over.eq(0), 1, 0), held

    def last_tie(self, threshold, rank):
        """Position of the `rank`-th score equal to `threshold`."""
        machine = self.machine
        shift = machine.select(self.length > BINS, machine.word(21) - machine.leading_zeros(self.length - 1), 0)
        self.clear_bins()
        self.count_row(lambda position, key: (machine.word(BINS - 1) - (position >> shift), key.eq(threshold)))
        found, earlier, _ = self.find_bin(rank)
        start = (machine.word(BINS - 1) - found) << shift
        self.clear_bins()

        def visit(offset):
            with machine.when(start + offset < self.length):
                key = sort_key(machine.load_global(self.row, start + offset))
                machine.count_shared(machine.word(BINS - 1) - offset, key.eq(threshold))

        machine.loop(machine.thread, machine.word(1) << shift, machine.threads, visit)
        found, _, _ = self.find_bin(rank - earlier, together=False)
        return start + (BINS - 1) - found

    def select(self):
        """Returns the key of the k-th highest score, and the last position at which an equal score is kept."""
        machine, k = self.machine, self.k

        def state(low, high):
            above, inside, fits, held = self.collect(low, high)
            holds = (above < k) & (above + inside >= k)
            done = holds & (low.eq(high) | fits.ne(0))
            return low, high, above, inside, fits, held, machine.select(done, 1, 0)

        def retry(low, high, above, inside, *_):
            missed_high, missed_low = above >= k, above + inside < k
            above, low, high = (
                machine.select(missed_high, 0, machine.select(missed_low, above + inside, above)),
                machine.select(missed_high, high + 1, machine.select(missed_low, 0, low)),
                machine.select(missed_high, HIGHEST, machine.select(missed_low, low - 1, high)),
            )
            low, high, _, _ = self.narrow_until(self.capacity // 2, self.count_row, k, low, high, above)
            return state(low, high)

        low, high = machine.branch(self.length > self.capacity, lambda *_: self.bracket(), [0, HIGHEST])
        low, high, above, inside, fits, held, _ = machine.while_loop(
            lambda low, high, above, inside, fits, held, done: done.eq(0), retry, state(low, high)
        )
        count = functools.partial(self.count_buffer, held)
        threshold, _, above, inside = self.narrow_until(0, count, k, low, high, above, inside)
        kept = machine.word(k) - above

        def tie_in_buffer(_):
            last, _, _, _ = self.narrow_until(
                0,
                count,
                kept,
                machine.word(HIGHEST) - (self.length - 1),
                HIGHEST,
                0,
                measure=lambda position, key: (machine.word(HIGHEST) - position, key.eq(threshold)),
            )
            return [machine.word(HIGHEST) - last]

        tied = kept.ne(inside)
        [last] = machine.branch(tied & fits.ne(0), tie_in_buffer, [self.length - 1])
        [last] = machine.branch(tied & fits.eq(0), lambda _: [self.last_tie(threshold, kept)], [last])
        return threshold, last


def threshold_body(machine, scores, lengths, thresholds, last_ties, row, rank, *, rows, size, k, **tuning):
    """Selects row `row`; `rank` is the block's number in its cluster."""
    row = machine.word(row)

    def put(ref, value):
        machine.store_global(machine.row(ref, 0, rows), row, value)

    length = machine.load_global(machine.row(lengths, 0, rows), row)
    writer = machine.thread.eq(0) & machine.word(rank).eq(0)
    with machine.when((length <= k) & writer):
        put(thresholds, 0xFF800000)
        put(last_ties, length - 1)
    with machine.when(length > k):
        key, last = RowSelection(
            machine, machine.row(scores, row, size), length, machine.word(rank), k, **tuning
        ).select()
        with machine.when(writer):
            put(thresholds, key ^ machine.select(key >= 0x80000000, 0x80000000, HIGHEST))
            put(last_ties, last)


def check_scores(scores):
    if scores.dtype != jnp.float32:
        raise NotImplementedError("scores must be float32")
    if scores.shape[-1] % 4 or not 4 <= scores.shape[-1] <= 1 << 22:
        raise NotImplementedError("the number of scores of a row must be a multiple of 4, at most 4M")
    if not scores.size:
        raise NotImplementedError("no rows")


def select_threshold(
    scores: jax.Array,
    lengths: jax.Array,
    k: int,
    *,
    threads: int = 512,
    cluster: int | None = None,
    teams: int | None = None,
    capacity: int = 23 * 512,
    samples: int = 4096,
    unroll: int = 2,
) -> tuple[jax.Array, jax.Array]:
    """What decides, per row, which of the first `lengths` scores are the `k` highest.

    Position s is one of them if s < length and (score > threshold or (score == threshold and s <= last_tie)).
    Of equal scores (0.0 equals -0.0) the lower position wins. What lies at or behind the length is not looked at.
    The keywords tune speed only: threads per row and block, blocks per row, rows per block, room for collected scores
    per block and row, scores sampled, and loads of 16 bytes in flight per thread.

    Args:
      scores: float32 `[rows, size]`, no NaN among the first `lengths`.
      lengths: int32 `[rows]`, from 0 to size.
      k: how many to select, at least 1.

    Returns:
      threshold float32 `[rows]` and last_tie int32 `[rows]`; -inf and length - 1 where length <= k.
    """
    check_scores(scores)
    rows, size = scores.shape
    if not 1 <= k < 1 << 19:
        raise NotImplementedError("k must be from 1 to 2**19 - 1")
    cluster = cluster or next((c for c in (8, 4, 2) if rows * c <= MULTIPROCESSORS), 1)
    teams = teams or (2 if cluster == 1 and rows > MULTIPROCESSORS else 1)
    body = functools.partial(
        threshold_body, rows=rows, size=size, k=k, capacity=capacity, samples=samples, unroll=unroll
    )
    out_type = (jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32))
    return launch(body, out_type, rows, cluster, threads, BUFFER + 2 * capacity + (BINS if cluster > 1 else 0), teams)(
        scores, lengths
    )
