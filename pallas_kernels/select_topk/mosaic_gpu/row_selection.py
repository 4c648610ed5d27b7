"""The selection of one row that is read part by part.

A row is read about once:

1. A sample of the row gives a bound that is very likely not above the k-th highest score.
2. One pass over the row collects the scores from the bound up, with their positions, in shared memory. Copies into a
   ring in shared memory run a few steps ahead. Each thread copies the scores that it reads, so no barriers are needed.
3. Histograms of the collected scores find the k-th highest. Histograms of positions find the last of the equal scores
   that is kept.
4. A bitmap in shared memory marks the selected positions. They are then written in order, or the bitmap is.

Exactness does not depend on the sample. If fewer than k scores were collected, or more than shared memory holds (many
equal scores, for example), histograms over the whole row narrow down the k-th highest. Each pass narrows it by 2048x,
until the scores from the bound up fit or the k-th is known. Then the row is read again. Scores are compared as integers
in the same order, -0.0 as 0.0.

A team of 512 threads works on a row. Two teams share a block; each has its own rows, barrier and shared memory. The
second team starts later, by about the time to read a row, so that one team reads while the other is in its short steps.
Reading is slower while both read, which keeps them apart. Where bitmaps of short rows are written, four teams of 256
threads share a block. With too few rows to fill the GPU, a cluster of up to 8 blocks works on a row instead. Each block
reads a part, and histograms and counts are added up through distributed shared memory.
"""

import functools

from pallas_kernels.gpu.simt import Value, count_before, warp_scan
from pallas_kernels.select_topk.mosaic_gpu.row_reader import (
    BINS,
    COUNTERS,
    FOUND,
    HIGHEST,
    RING,
    WARP_SUMS,
    Collected,
    RowReader,
    sort_key,
)


class RowSelection(RowReader):
    """The selection of one row by a cluster. Every thread of the cluster runs this."""

    # Histograms.

    def clear_bins(self):
        """Empties the histograms, effective at the next barrier. Called once: `find_bin` leaves them empty."""
        machine = self.machine
        each = BINS // machine.threads
        zeros = [machine.word(0)] * each
        machine.store_shared_vector(machine.thread * each, zeros)
        if machine.cluster > 1:
            machine.store_shared_vector(machine.thread * each + self.plan.totals, zeros)

    def find_bin(self, rank, together=True):
        """Finds the bin of the `rank`-th highest key.

        Returns the bin, the number of keys in higher bins, and the number in the bin. With `together`, the histograms
        of all blocks of the cluster are added up first.
        """
        machine = self.machine
        each = BINS // machine.threads
        together = together and machine.cluster > 1
        base = machine.word(BINS - each) - machine.thread * each
        machine.barrier()
        zeros = [machine.word(0)] * each
        bins = machine.load_shared_vector(base, each)
        machine.store_shared_vector(base, zeros)
        if together:  # The first block adds up and searches. The others also search, but their results are not used.
            machine.cluster_barrier()
            for i in range(each):
                with machine.when(bins[i].ne(0)):
                    machine.add_first(base + (self.plan.totals + i), bins[i])
            machine.cluster_barrier()
            bins = machine.load_shared_vector(base + self.plan.totals, each)
            machine.store_shared_vector(base + self.plan.totals, zeros)
        own = functools.reduce(Value.__add__, bins)
        inclusive = warp_scan(machine, own)
        with machine.when(machine.lane.eq(31)):
            machine.store_shared(machine.warp + WARP_SUMS, inclusive)
        machine.barrier()
        warps = machine.threads // 32
        sums = machine.load_shared(machine.lane.min(warps - 1) + WARP_SUMS)
        above = machine.warp_sum(machine.select(machine.lane < machine.warp, sums, 0)) + inclusive - own
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
        """One step towards the `rank`-th highest value. It is between `low` and `high`, and `above` values are higher.

        `count(bin_of)` adds keys to the histogram. The values are `measure(position, key) -> (value, condition)`, by
        default the keys themselves. Returns low, high, above and the number of values between them.
        """
        machine = self.machine
        zeros = machine.leading_zeros(high - low)
        shift = machine.select(zeros < 21, machine.word(21) - zeros, 0)

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
        """Narrows until one value is left, at most `enough` keys are inside, or all keys inside are wanted."""
        wanted = self.machine.word(rank)
        return self.machine.while_loop(
            lambda low, high, above, inside: low.ne(high) & (inside > enough) & (above + inside).ne(wanted),
            lambda low, high, above, inside: self.narrow(count, rank, low, high, above, **options),
            [low, high, above, inside],
        )

    # The steps.

    def lower_bound(self):
        """A key from a sample that is very likely not above the k-th highest."""
        machine, samples = self.machine, self.plan.samples
        points = samples // 4
        stride = (self.length >> 2) // points

        def sample(point):
            jitter = ((point * 2654435761 >> 16) * stride) >> 16
            scores = machine.load_global4(self.row, (point * stride + jitter) * 4)
            machine.store_shared_vector(point * 4 + self.plan.buffer, [sort_key(score) for score in scores])

        for first in range(0, points, self.plan.threads):
            if points - first >= self.plan.threads:
                sample(machine.thread + first)
            else:
                with machine.when(machine.thread < points - first):
                    sample(machine.thread + first)
        machine.barrier()
        expected = machine.word(self.plan.k * samples) // self.length
        rank = expected + machine.square_root(expected) * 5 + 8
        low, _, _, _ = self.narrow_until(4, self.count_samples, rank.min(samples), 0, HIGHEST, 0, together=False)
        return machine.select(rank >= samples, 0, low)

    def collect(self, low, started=False):
        """Collects the scores whose keys are `low` or higher, and their positions, in shared memory."""
        machine, plan = self.machine, self.plan
        with machine.when(machine.thread.eq(0)):
            machine.store_shared_vector(COUNTERS, [machine.word(0)] * 4)
        machine.barrier()
        # `flip` turns a score with the sign of `low` into its key. A score with the other sign still compares
        # correctly with `low`. Either both zeros are inside or neither is.
        low = machine.select(low.eq(0x80000000), 0x7FFFFFFF, low)
        flip = machine.select(low >= 0x80000000, 0x80000000, HIGHEST)
        # `free` is the byte address of the next free slot.
        first, each = machine.address_of(self.slot(machine.word(0))), 8 * plan.threads
        limit = machine.address_of(machine.word(plan.spilled))

        def visit(position, scores, valid, free):
            entries = [(score ^ flip, position + i) for i, score in enumerate(scores)]
            inside = [flipped >= low for flipped, _ in entries]
            if valid:
                inside = [a & b for a, b in zip(inside, valid, strict=True)]

            places = [free]
            for wanted in inside:
                places.append(places[-1] + machine.select(wanted, each, 0))
            stores = list(zip(places, entries, inside, strict=False))

            def with_room():
                for place, entry, wanted in stores:
                    machine.store_pair_where(place, *entry, wanted)
                return []

            def without_room():
                for place, entry, wanted in stores:
                    machine.store_pair_where(place, *entry, wanted & (place < limit))
                    with machine.when(wanted & (place >= limit)):
                        at = machine.fetch_add_shared(COUNTERS + 1, 1)
                        machine.store_pair_where(limit + at * 8, *entry, at < plan.spill)
                return []

            machine.branch((places[-1] >= limit + each) & places[-1].ne(free), without_room, [], with_room)
            return [places[-1]]

        [free] = self.visit_row(visit, [first], started)
        found = (free - first) // each
        inside = machine.warp_sum(found)
        with machine.when(machine.lane.eq(0)):
            machine.add_shared(COUNTERS, inside)
        machine.cluster_barrier()
        spilled = machine.load_shared(COUNTERS + 1)
        inside, over = machine.load_shared(COUNTERS), machine.select(spilled > plan.spill, 1, 0)
        if machine.cluster > 1:
            peers = [[machine.load_peer(COUNTERS + i, peer) for i in range(2)] for peer in range(machine.cluster)]
            inside = functools.reduce(Value.__add__, (count for count, _ in peers))
            over = functools.reduce(Value.__or__, (machine.select(count > plan.spill, 1, 0) for _, count in peers))
        machine.cluster_barrier()
        fits = machine.select(over.eq(0), 1, 0)
        return Collected(inside, fits, found.min(plan.slots), spilled.min(plan.spill), flip)

    def last_tie(self, threshold, rank):
        """Position of the `rank`-th score equal to `threshold`."""
        machine = self.machine
        shift = machine.select(self.length > BINS, machine.word(21) - machine.leading_zeros(self.length - 1), 0)
        self.count_row(lambda position, key: (machine.word(BINS - 1) - (position >> shift), key.eq(threshold)))
        found, earlier, _ = self.find_bin(rank)
        start = (machine.word(BINS - 1) - found) << shift

        def visit(offset):
            with machine.when(start + offset < self.length):
                key = sort_key(machine.load_global(self.row, start + offset))
                machine.count_shared(machine.word(BINS - 1) - offset, key.eq(threshold))

        machine.loop(machine.thread, machine.word(1) << shift, machine.threads, visit)
        found, _, _ = self.find_bin(rank - earlier, together=False)
        return start + (BINS - 1) - found

    def find(self):
        """Finds the row's selection.

        Returns threshold, last, and the collected scores. Position s is selected if its key is above the threshold, or
        if its key equals it and s <= last.
        """
        machine, k = self.machine, self.plan.k

        def state(low, high, above, started=False):
            collected = self.collect(low, started)
            done = (collected.inside >= k) & (low.eq(high) | collected.fits.ne(0))
            return machine.select(done, 1, 0), low, high, above, *collected

        def retry(_, low, high, above, inside, *__):
            missed = inside < k
            above, low, high = (
                machine.select(missed, inside, above),
                machine.select(missed, 0, low),
                machine.select(missed, low - 1, high),
            )
            low, high, above, _ = self.narrow_until(self.plan.spill, self.count_row, k, low, high, above)
            return state(low, high, above)

        self.start_copies()
        self.clear_bins()
        room = self.plan.slots * self.plan.threads
        [low] = machine.branch(self.length > room, lambda _: [self.lower_bound()], [0])
        _, low, high, above, *collected = machine.while_loop(
            lambda done, *_: done.eq(0), retry, state(low, machine.word(HIGHEST), machine.word(0), True)
        )
        collected = Collected(*collected)
        count = functools.partial(self.count_collected, collected)
        threshold, _, above, equal = self.narrow_until(0, count, k, low, high, above, collected.inside - above)
        kept = machine.word(k) - above

        def last_collected(_):
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

        tied = kept.ne(equal)
        [last] = machine.branch(tied & collected.fits.ne(0), last_collected, [self.length - 1])
        [last] = machine.branch(tied & collected.fits.eq(0), lambda _: [self.last_tie(threshold, kept)], [last])
        return threshold, last, collected

    def mark_selected(self, threshold, last, collected):
        """Sets the bits of this block's selected positions. Returns the bitmap's address and its chunks of 32 words."""
        machine, fits = self.machine, collected.fits
        # The bitmap replaces the ring. If the buffer did not hold all scores, the row is read again through the ring,
        # and the bitmap replaces the buffer.
        bitmap = machine.select(fits.ne(0), RING, self.plan.buffer)
        chunks = (self.end - self.begin + 1023) >> 10  # A chunk has 32 words, one per lane.
        zeros = [machine.word(0)] * 4

        def clear(i):
            machine.store_shared_vector(bitmap + i * 4, zeros)

        machine.loop(machine.thread, chunks * 8, self.plan.threads, clear)
        machine.barrier()

        def mark(position, key, valid=None):
            chosen = (key > threshold) | (key.eq(threshold) & (position <= last))
            at = position - self.begin
            bit = machine.word(1) << (at & 31)
            machine.or_shared_where(bitmap + (at >> 5), bit, chosen & valid if valid else chosen)

        def mark_row(*_):
            def visit(position, scores, valid):
                for i, score in enumerate(scores):
                    mark(position + i, sort_key(score), valid[i] if valid else None)

            self.visit_row(visit)

        with machine.when(fits.ne(0)):
            self.visit_collected(collected, mark)
        with machine.when(fits.eq(0)):
            mark_row()
        machine.barrier()
        return bitmap, chunks

    def write_bits(self, out, words, *found):
        """Writes the bitmap of the selected positions to the row `out`, `words` words. One block has the whole row."""
        machine = self.machine
        bitmap, chunks = self.mark_selected(*found)
        held = chunks * 32

        def put(at):
            word = machine.load_shared(bitmap + at.min(held - 1))
            machine.store_global(out, at, machine.select(at < held, word, 0))

        machine.loop(machine.thread, words, self.plan.threads, put)

    def write(self, out, *found):
        """Writes the selected positions to the row `out`, ascending."""
        machine = self.machine
        bitmap, chunks = self.mark_selected(*found)
        warps = self.plan.threads // 32
        each = (chunks + (warps - 1)) // warps
        begin = (machine.warp * each).min(chunks)
        end = (begin + each).min(chunks)

        def word_of(chunk):
            return machine.load_shared(bitmap + chunk * 32 + machine.lane)

        [count] = machine.loop(begin, end, 1, lambda i, count: [count + machine.bit_count(word_of(i))], [0])
        [base], _ = count_before(machine, [count], WARP_SUMS, self.rank)

        def write_chunk(chunk, base):
            word = word_of(chunk)
            own = machine.bit_count(word)
            through = base + warp_scan(machine, own)
            first = self.begin + (chunk * 32 + machine.lane) * 32

            def write_lowest(word, at):
                lowest = word & (machine.word(0) - word)
                machine.store_global(out, at, first + (machine.word(31) - machine.leading_zeros(lowest)))
                return word ^ lowest, at + 1

            machine.while_loop(lambda word, at: word.ne(0), write_lowest, [word, through - own])
            return [base + machine.warp_sum(own)]

        machine.loop(begin, end, 1, write_chunk, [base])
