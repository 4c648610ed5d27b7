"""Exact selection on Hopper GPUs (Pallas Mosaic GPU): thresholds, unions of neighbouring queries, positions.

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

`build_unions` reads the scores of a group of rows once more, at the same positions in all of them. A warp owns a run of
positions, keeps their membership bits in shared memory, and after the blocks of the cluster have exchanged their counts
writes what is selected by at least one row to its place. `select_topk` is the same with groups of one row.
"""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.select_topk.emit import Machine, Value

HIGHEST = 0xFFFFFFFF
MULTIPROCESSORS = 132
BINS = 2048
# Shared memory of select_threshold, in words.
WARP_SUMS, FOUND, COUNTERS, BUFFER = BINS, BINS + 32, BINS + 36, BINS + 64
# Shared memory of build_unions, in words.
ROWS, WARP_COUNTS, BLOCK_COUNT, BITS = 0, 64, 96, 128


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


def union_body(
    machine,
    scores,
    thresholds,
    last_ties,
    lengths,
    positions,
    members,
    counts,
    index,
    rank,
    *,
    rows,
    size,
    group,
    limit,
):
    """Writes what rows `index * group` to `index * group + group - 1` select; `members` is None to leave it out."""
    unroll = 16 // group if group > 1 else 8
    chunk, words = 128 * unroll, unroll * 4 * group // 32
    warps = machine.threads // 32
    index, rank = machine.word(index), machine.word(rank)
    with machine.when(machine.thread < group):
        at = index * group + machine.thread
        machine.store_shared_vector(
            machine.thread * 4 + ROWS,
            [machine.load_global(machine.row(ref, 0, rows), at) for ref in (thresholds, last_ties, lengths)]
            + [machine.word(0)],
        )
    machine.barrier()
    longest = functools.reduce(Value.max, (machine.load_shared(ROWS + 4 * r + 2) for r in range(group)))
    chunks = (longest + (chunk - 1)) // chunk
    each = (chunks + (machine.cluster * warps - 1)) // (machine.cluster * warps)
    most = math.ceil(math.ceil(size / chunk) / (machine.cluster * warps))
    begin = ((rank * warps + machine.warp) * each).min(chunks)
    end = (begin + each).min(chunks)
    pointers = [machine.row(scores, index * group + r, size) for r in range(group)]

    def bits_at(i):
        return (((i - begin) + machine.warp * most) * 32 + machine.lane) * words + BITS

    def mark(i, count):
        first = i * chunk + machine.lane * 4
        packed = [machine.word(0)] * words
        pairs = [(u, r) for u in range(unroll) for r in range(group)]
        # A read past the end of a row becomes one of its last scores, which its length then hides.
        loaded = [machine.load_global4(pointers[r], (first + u * 128).min(size - 4)) for u, r in pairs]
        for (u, r), scores in zip(pairs, loaded, strict=True):
            threshold, last, length, _ = machine.load_shared_vector(ROWS + 4 * r, 4)
            for j, score in enumerate(scores):
                position, bit = first + (u * 128 + j), (u * 4 + j) * group + r
                chosen = machine.compare_floats("gt", score, threshold) | (
                    machine.compare_floats("eq", score, threshold) & (position <= last)
                )
                packed[bit // 32] = packed[bit // 32] | machine.select(chosen & (position < length), 1 << bit % 32, 0)
        for bit in range(0, unroll * 4 * group, group):
            any_row = packed[bit // 32] & ((1 << group) - 1 << bit % 32)
            count = count + machine.select(any_row.ne(0), 1, 0)
        return packed, count

    def mark_and_keep(i, count):
        packed, count = mark(i, count)
        machine.store_shared_vector(bits_at(i), packed)
        return [count]

    [count] = machine.loop(begin, end, 1, mark_and_keep, [0])
    count = machine.warp_sum(count)
    with machine.when(machine.lane.eq(0)):
        machine.store_shared(machine.warp + WARP_COUNTS, count)
    machine.barrier()
    count = machine.load_shared(machine.lane.min(warps - 1) + WARP_COUNTS)
    before = machine.warp_sum(machine.select(machine.lane < machine.warp.min(warps), count, 0))
    total = machine.warp_sum(machine.select(machine.lane < warps, count, 0))
    if machine.cluster > 1:
        machine.store_shared(BLOCK_COUNT, total)
        machine.cluster_barrier()
        count = machine.load_peer(BLOCK_COUNT, machine.lane.min(machine.cluster - 1))
        before = before + machine.warp_sum(machine.select(machine.lane < rank, count, 0))
        total = machine.warp_sum(machine.select(machine.lane < machine.cluster, count, 0))
        machine.cluster_barrier()
    position_row = machine.row(positions, index, limit)
    member_row = None if members is None else machine.row(members, index, limit)

    def write(i, base):
        packed = machine.load_shared_vector(bits_at(i), words)
        for u in range(unroll):
            selected = []
            for j in range(4):
                bit = (u * 4 + j) * group
                selected.append(packed[bit // 32] >> bit % 32 & (1 << group) - 1)
            own = functools.reduce(Value.__add__, (machine.select(word.ne(0), 1, 0) for word in selected))
            inclusive = own
            for distance in (1, 2, 4, 8, 16):
                lower = machine.shuffle_up(inclusive, distance)
                inclusive = inclusive + machine.select(machine.lane >= distance, lower, 0)
            at = base + inclusive - own
            for j, word in enumerate(selected):
                with machine.when(word.ne(0) & (at < limit)):
                    machine.store_global(position_row, at, i * chunk + machine.lane * 4 + (u * 128 + j))
                    if members is not None:
                        machine.store_global(member_row, at, word)
                at = at + machine.select(word.ne(0), 1, 0)
            base = base + machine.warp_sum(own)
        return [base]

    machine.loop(begin, end, 1, write, [before])

    def fill(at):
        machine.store_global(position_row, at, HIGHEST if members is None else 0)
        if members is not None:
            machine.store_global(member_row, at, 0)

    machine.loop(total + rank * machine.threads + machine.thread, limit, machine.cluster * machine.threads, fill)
    if counts is not None:
        with machine.when(machine.thread.eq(0) & rank.eq(0)):
            machine.store_global(machine.row(counts, 0, rows // group), index, total)


def _launch(body, out_type, rows, cluster, threads, shared_words, teams=1):
    """A kernel that runs `body(machine, *refs, row, rank)` in every thread of each row's team or cluster."""

    def kernel(*refs):
        *refs, shared = refs

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (len(refs) + 1) + (plgpu.Layout.WG_SPLAT,) * 2)
        def run(_, *args):
            *args, shared, block, rank = args
            machine = Machine(threads, cluster, shared, teams, shared_words)
            block, rank = (Value(machine, v.registers.item()) for v in (block, rank))
            if teams == 1:
                body(machine, *args, block, rank)
            else:
                row = block * teams + machine.team
                with machine.when(row < rows):
                    body(machine, *args, row, rank)

        rank = lax.axis_index("part") if cluster > 1 else jnp.int32(0)
        run(*refs, shared, lax.axis_index("block"), rank)

    clustered = {"cluster": (cluster,), "cluster_names": ("part",)} if cluster > 1 else {}
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(-(-rows // teams),),
        grid_names=("block",),
        num_threads=teams * threads // 128,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((teams * shared_words,), jnp.int32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **clustered,
    )


def _check(scores):
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
    _check(scores)
    rows, size = scores.shape
    if not 1 <= k < 1 << 19:
        raise NotImplementedError("k must be from 1 to 2**19 - 1")
    cluster = cluster or next((c for c in (8, 4, 2) if rows * c <= MULTIPROCESSORS), 1)
    teams = teams or (2 if cluster == 1 and rows > MULTIPROCESSORS else 1)
    body = functools.partial(
        threshold_body, rows=rows, size=size, k=k, capacity=capacity, samples=samples, unroll=unroll
    )
    out_type = (jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32))
    return _launch(body, out_type, rows, cluster, threads, BUFFER + 2 * capacity + (BINS if cluster > 1 else 0), teams)(
        scores, lengths
    )


def _union_cluster(groups, group, size, cluster, threads):
    """Blocks per group of rows, and the words of shared memory each needs."""
    cluster = cluster or next((c for c in (1, 2, 4) if groups * c >= 128 and size * group <= c << 20), 8)
    chunk = 128 * (16 // group if group > 1 else 8)
    most = math.ceil(math.ceil(size / chunk) / (cluster * threads // 32))
    words = BITS + threads * most * (chunk // 32 * group // 32)
    if words * 4 > 200_000:
        raise NotImplementedError("rows are too long for the membership bits to fit shared memory")
    return cluster, words


def build_unions(
    scores: jax.Array,
    threshold: jax.Array,
    last_tie: jax.Array,
    lengths: jax.Array,
    *,
    group: int = 16,
    limit: int = 32768,
    threads: int = 512,
    cluster: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The positions that at least one of `group` neighbouring rows selects, and which rows select each.

    Args:
      scores: float32 `[rows, size]`, rows a multiple of `group`.
      threshold, last_tie: from `select_threshold`, `[rows]`.
      lengths: int32 `[rows]`.
      group: 2, 4, 8 or 16.
      limit: room for positions; `group * k` is always enough. Positions beyond it are dropped.

    Returns:
      positions int32 `[rows / group, limit]`, ascending; members int32, same shape, bit i set where row i of the group
      selects the position; both 0 behind the counts. counts int32 `[rows / group]`.
    """
    _check(scores)
    rows, size = scores.shape
    if group not in (2, 4, 8, 16) or rows % group:
        raise NotImplementedError("group must be 2, 4, 8 or 16 and divide the number of rows")
    cluster, words = _union_cluster(rows // group, group, size, cluster, threads)
    body = functools.partial(union_body, rows=rows, size=size, group=group, limit=limit)
    entries = jax.ShapeDtypeStruct((rows // group, limit), jnp.int32)
    out_type = (entries, entries, jax.ShapeDtypeStruct((rows // group,), jnp.int32))
    return _launch(body, out_type, rows // group, cluster, threads, words)(scores, threshold, last_tie, lengths)


def select_topk(scores: jax.Array, lengths: jax.Array, k: int) -> jax.Array:
    """Positions of the `k` highest scores among the first `lengths` of each row; all of them when there are fewer.

    Exact and deterministic: of equal scores (0.0 equals -0.0) the lower position wins.

    Args:
      scores: float32 `[..., s]`.
      lengths: int32 `[...]`, from 0 to s.
      k: how many to select.

    Returns:
      int32 `[..., k]` positions in ascending order, then -1 where a row has fewer than k.
    """
    _check(scores)
    size = scores.shape[-1]
    rows, flat = scores.reshape(-1, size), lengths.reshape(-1)
    threshold, last_tie = select_threshold(rows, flat, k)
    threads = 512
    cluster, words = _union_cluster(len(rows), 1, size, None, threads)

    def body(machine, scores, thresholds, last_ties, lengths, positions, index, rank):
        union_body(
            machine,
            scores,
            thresholds,
            last_ties,
            lengths,
            positions,
            None,
            None,
            index,
            rank,
            rows=len(rows),
            size=size,
            group=1,
            limit=k,
        )

    out_type = jax.ShapeDtypeStruct((len(rows), k), jnp.int32)
    positions = _launch(body, out_type, len(rows), cluster, threads, words)(rows, threshold, last_tie, flat)
    return positions.reshape(*lengths.shape, k)
