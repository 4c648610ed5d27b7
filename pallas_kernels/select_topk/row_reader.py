"""Reading a row of scores by the threads of a team or cluster, and what they keep of it in shared memory."""

import dataclasses
import math

HIGHEST = 0xFFFFFFFF
BINS = 2048
# The first words of a team's shared memory.
WARP_SUMS, FOUND, COUNTERS, RING = BINS, BINS + 36, BINS + 40, BINS + 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """How rows are worked on, and what lies where in the shared memory of a team, in words.

    Attributes:
      size: scores of a row.
      k: how many of them are selected.
      threads: threads of a team, a power of two.
      cluster: blocks that work on a row together, each a team.
      slots: collected scores that each thread has room for.
      spill: collected scores that there is more room for, shared by all threads; at least k.
      stages: steps that copies run ahead of reading.
      samples: scores sampled, at most `slots * threads`.
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
        """Words of the bitmap of a block's part of a row."""
        return math.ceil((self.size / self.cluster + 4) / 1024) * 32

    @property
    def totals(self) -> int:
        """Start of the histogram of all blocks; before it the ring, whose place the bitmap takes in the end."""
        return RING + max(self.stages * self.threads * 4, self.bitmap)

    @property
    def buffer(self) -> int:
        """Start of the collected scores and positions."""
        return self.totals + (BINS if self.cluster > 1 else 0)

    @property
    def spilled(self) -> int:
        return self.buffer + 2 * self.slots * self.threads

    @property
    def words(self) -> int:
        return max(self.spilled + 2 * self.spill, self.buffer + self.bitmap)


def raw_key(score):
    """Unsigned integers in the order of the float32 scores whose bits are given, -0.0 directly below 0.0."""
    return score ^ (score.sar(31) | 0x80000000)


def sort_key(score):
    """As `raw_key`, but 0.0 and -0.0 give the same."""
    return join_zeros(raw_key(score))


def join_zeros(key):
    return key.machine.select(key.eq(0x7FFFFFFF), 0x80000000, key)


class RowReader:
    """A row, as each thread of the blocks of a cluster sees it."""

    def __init__(self, machine, row, length, rank, plan):
        self.machine, self.row, self.length, self.rank, self.plan = machine, row, length, rank, plan
        blocks = machine.cluster
        share = (length + (4 * blocks - 1)) // (4 * blocks) * 4 if blocks > 1 else length
        self.end = (rank * share + share).min(length) if blocks > 1 else length
        self.begin = (rank * share).min(self.end) if blocks > 1 else machine.word(0)

    # Ways to visit scores.

    def position(self, step):
        """The first of the four scores that this thread reads in a step.

        Which thread reads which four changes from step to step, or what repeats along a row would fill a few threads'
        slots.
        """
        each = self.plan.threads * 4
        return self.begin + step * each + (self.machine.thread * 4 ^ (step * 148 & (each - 4)))

    def stage(self, stage):
        return (stage * self.plan.threads + self.machine.thread) * 4 + RING

    def copy_step(self, step, stage):
        position = self.position(step)
        self.machine.copy_shared4(self.stage(stage), self.row, position, position < self.end)
        self.machine.commit_copies()

    def start_copies(self):
        for step in range(self.plan.stages):
            self.copy_step(self.machine.word(step), self.machine.word(step))

    def visit_row(self, visit, carry=(), started=False):
        """`carry = visit(position, [4 scores], [4 conditions] or None, *carry)` over this block's part of the row."""
        machine, stages = self.machine, self.plan.stages
        if not started:
            self.start_copies()
        steps = (self.end - self.begin) // (self.plan.threads * 4)

        def visit_step(step, stage, *carry):
            machine.wait_copies(stages - 1)
            scores = machine.load_shared_vector(self.stage(stage), 4)
            carry = visit(self.position(step), scores, None, *carry) or ()
            self.copy_step(step + stages, stage)
            return [machine.select(stage.eq(stages - 1), 0, stage + 1), *carry]

        stage, *carry = machine.loop(0, steps, 1, visit_step, [0, *carry])
        machine.wait_copies(0)
        position, scores = self.position(steps), machine.load_shared_vector(self.stage(stage), 4)
        return visit(position, scores, [position + i < self.end for i in range(4)], *carry)

    def count_row(self, bin_of):
        """Adds the row's scores to the histogram; `bin_of(position, key) -> (bin, condition)`."""

        def visit(position, scores, valid):
            for i, score in enumerate(scores):
                address, condition = bin_of(position + i, sort_key(score))
                self.machine.count_shared(address, condition & valid[i] if valid else condition)

        self.visit_row(visit)

    def slot(self, i):
        """Address of the i-th score, and behind it its position, that this thread holds."""
        return (i * self.plan.threads + self.machine.thread) * 2 + self.plan.buffer

    def visit_collected(self, held, spilled, visit):
        """`visit(position, key)` for everything collected by this block."""
        machine = self.machine

        def visit_at(address):
            score, position = machine.load_shared_vector(address, 2)
            visit(position, sort_key(score))

        machine.loop(0, held, 1, lambda i: visit_at(self.slot(i)))
        machine.loop(machine.thread, spilled, self.plan.threads, lambda i: visit_at(i * 2 + self.plan.spilled))

    def count_collected(self, held, spilled, bin_of):
        """Adds what was collected to the histogram."""
        self.visit_collected(held, spilled, lambda *entry: self.machine.count_shared(*bin_of(*entry)))

    def count_samples(self, bin_of):
        machine, threads = self.machine, self.plan.threads
        each = self.plan.samples // threads
        width = min(each, 4)
        for i in range(0, each, width):
            for key in machine.load_shared_vector(
                (machine.thread + i // width * threads) * width + self.plan.buffer, width
            ):
                machine.count_shared(*bin_of(None, key))
