"""How the threads of a team or cluster read a row of scores, and the layout of what they keep in shared memory."""

import dataclasses
import math
from typing import NamedTuple

from pallas_kernels.gpu.simt import Value

HIGHEST = 0xFFFFFFFF
BINS = 2048
# Addresses in a team's shared memory, in words. The histogram of BINS words comes first.
WARP_SUMS, FOUND, COUNTERS, RING = BINS, BINS + 36, BINS + 40, BINS + 64


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """How rows are read, and the layout of a team's shared memory, in words.

    Attributes:
      size: scores of a row.
      k: scores that are selected.
      threads: threads of a team, a power of two.
      cluster: blocks that work on a row together, each a team.
      slots: room of each thread for collected scores.
      spill: room for further collected scores, shared by all threads; at least k.
      stages: number of steps that copies run ahead of reading.
      samples: scores of the sample, at most `slots * threads`.
    """

    size: int
    k: int
    threads: int = 512
    cluster: int = 1
    slots: int = 14
    spill: int = 2048
    stages: int = 4
    samples: int = 4096

    @property
    def bitmap(self) -> int:
        """Words of the bitmap of one block's part of a row."""
        return math.ceil((self.size / self.cluster + 4) / 1024) * 32

    @property
    def totals(self) -> int:
        """Start of the cluster's histogram. Before it is the ring of copies, which the bitmap replaces in the end."""
        return RING + max(self.stages * self.threads * 4, self.bitmap)

    @property
    def buffer(self) -> int:
        """Start of the collected scores and positions."""
        return self.totals + (BINS if self.cluster > 1 else 0)

    @property
    def spilled(self) -> int:
        """Start of the collected scores and positions that did not fit the threads' slots."""
        return self.buffer + 2 * self.slots * self.threads

    @property
    def words(self) -> int:
        """Size of a team's shared memory."""
        return max(self.spilled + 2 * self.spill, self.buffer + self.bitmap)


def raw_key(score):
    """From the bits of float32 scores, unsigned integers in the same order; -0.0 is directly below 0.0."""
    return score ^ (score.sar(31) | 0x80000000)


def sort_key(score):
    """As `raw_key`, but 0.0 and -0.0 give the same integer."""
    return join_zeros(raw_key(score))


def join_zeros(key):
    """`key`, with the key of -0.0 replaced by the key of 0.0."""
    return key.machine.select(key.eq(0x7FFFFFFF), 0x80000000, key)


def row_length(machine, lengths, row, rows, size):
    """The length of row `row` of `rows`; one that is out of range becomes the nearest from 0 to `size`."""
    length = machine.load_global(machine.row(lengths, 0, rows), row)
    return machine.select(length > 0x7FFFFFFF, 0, length.min(size))


def write_short_row(machine, out, length, rank, k):
    """Writes the result of a row of at most k scores: all its positions, then -1."""

    def put(at):
        machine.store_global(out, at, machine.select(at < length, at, HIGHEST))

    machine.loop(rank * machine.threads + machine.thread, k, machine.cluster * machine.threads, put)


def write_all_bits(machine, out, length, words):
    """Writes the bitmap of a row of which all positions are selected, `words` words."""

    def put(at):
        left = length - (at * 32).min(length)
        some = (machine.word(1) << left.min(31)) - 1
        machine.store_global(out, at, machine.select(left >= 32, HIGHEST, some))

    machine.loop(machine.thread, words, machine.threads, put)


class Collected(NamedTuple):
    """The scores that a pass over a row has collected in shared memory.

    Attributes:
      inside: number of scores of the row that the pass wanted.
      fits: 1 if all blocks had room for theirs, else 0.
      held: number of scores in this thread's slots.
      spilled: number of scores that this block spilled.
      flip: the word that the scores are xored with.
    """

    inside: Value
    fits: Value
    held: Value
    spilled: Value
    flip: Value


class RowReader:
    """A row, as each thread of a cluster sees it."""

    def __init__(self, machine, row, length, rank, plan):
        self.machine, self.row, self.length, self.rank, self.plan = machine, row, length, rank, plan
        blocks = machine.cluster
        part = (length + (4 * blocks - 1)) // (4 * blocks) * 4 if blocks > 1 else length
        self.end = (rank * part + part).min(length) if blocks > 1 else length
        self.begin = (rank * part).min(self.end) if blocks > 1 else machine.word(0)

    # Ways to visit scores.

    def positions(self, turn):
        """The first of the four scores that this thread reads in each step of a turn of `stages` steps.

        A thread's place changes from step to step. Otherwise scores that repeat along a row would fill the slots of a
        few threads.
        """
        each, stages = self.plan.threads * 4, self.plan.stages
        start = self.begin + turn * (each * stages)
        offset = self.machine.thread * 4 ^ (turn * 148 & (each - 4))
        return [start + i * each + (offset ^ (i * 212 & (each - 4))) for i in range(stages)]

    def stage(self, i):
        return (self.machine.thread + i * self.plan.threads) * 4 + RING

    def copy(self, stage, position):
        """Starts to copy four scores to a stage. Each thread copies the scores that it will read."""
        self.machine.copy_shared4(self.stage(stage), self.row, position, position < self.end)
        self.machine.commit_copies()

    def start_copies(self):
        """Starts the copies of the first turn."""
        for stage, position in enumerate(self.positions(self.machine.word(0))):
            self.copy(stage, position)

    def visit_row(self, visit, carry=(), started=False):
        """`carry = visit(position, [4 scores], [4 conditions] or None, *carry)` over this block's part of the row."""
        machine, stages = self.machine, self.plan.stages
        if not started:
            self.start_copies()
        turns = (self.end - self.begin) // (self.plan.threads * 4 * stages)

        def visit_turn(turn, *carry):
            for stage, (position, following) in enumerate(
                zip(self.positions(turn), self.positions(turn + 1), strict=True)
            ):
                machine.wait_copies(stages - 1)
                scores = machine.load_shared_vector(self.stage(stage), 4)
                carry = visit(position, scores, None, *carry) or ()
                self.copy(stage, following)
            return carry

        carry = machine.loop(0, turns, 1, visit_turn, carry)
        machine.wait_copies(0)
        each = self.plan.threads * 4
        for stage, position in enumerate(self.positions(turns)):

            def visit_rest(*carry, stage=stage, position=position):
                scores = machine.load_shared_vector(self.stage(stage), 4)
                return visit(position, scores, [position + i < self.end for i in range(4)], *carry) or ()

            rest = self.begin + (turns * stages + stage) * each < self.end
            carry = machine.branch(rest, visit_rest, carry)
        return carry

    def count_row(self, bin_of):
        """Adds the row's scores to the histogram; `bin_of(position, key) -> (bin, condition)`."""

        def visit(position, scores, valid):
            for i, score in enumerate(scores):
                address, condition = bin_of(position + i, sort_key(score))
                self.machine.count_shared(address, condition & valid[i] if valid else condition)

        self.visit_row(visit)

    def slot(self, i):
        """Address of the i-th score that this thread holds. The next word is the score's position."""
        return (i * self.plan.threads + self.machine.thread) * 2 + self.plan.buffer

    def visit_collected(self, collected, visit):
        """`visit(position, key)` for everything collected by this block."""
        machine = self.machine

        def visit_at(address):
            flipped, position = machine.load_shared_vector(address, 2)
            visit(position, sort_key(flipped ^ collected.flip))

        machine.loop(0, collected.held, 1, lambda i: visit_at(self.slot(i)))
        machine.loop(
            machine.thread, collected.spilled, self.plan.threads, lambda i: visit_at(i * 2 + self.plan.spilled)
        )

    def count_collected(self, collected, bin_of):
        """Adds the collected scores to the histogram."""
        self.visit_collected(collected, lambda *entry: self.machine.count_shared(*bin_of(*entry)))

    def count_samples(self, bin_of):
        """Adds the sample to the histogram."""
        machine, threads = self.machine, self.plan.threads
        each = self.plan.samples // threads
        width = min(each, 4)
        for i in range(0, each, width):
            for key in machine.load_shared_vector(
                (machine.thread + i // width * threads) * width + self.plan.buffer, width
            ):
                machine.count_shared(*bin_of(None, key))
