"""The nucleus of a row on Hopper GPUs (Pallas Mosaic GPU): histograms of how far logits lie below the highest one.

A cluster of blocks has a row, and reads it from memory, which the L2 cache holds, in every pass.

1. The first pass finds the highest logit. A logit's distance to it becomes a key, an integer that rises with it.
2. The second pass counts the keys of each of 1,024 bins, and adds up their probabilities, relative to that at the
   bin's beginning and in units of 2^-16. Integers have the same sum in any order, so results never vary.
3. Every block adds the bins of all blocks up in the same order. Prefix sums give the bin of the last of top_k tokens.
   Passes that look into that bin alone follow, until it holds one key.
4. That gives the probability of the tokens that top_k leaves, and what top_p wants of it. Then the same bins are
   searched for the first one at which top_p or top_k is reached.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.hopper import MULTIPROCESSORS
from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.simt import float_bits, warp_scan
from pallas_kernels.gpu.tensor_machine import TensorMachine

BINS, THREADS = 1024, 512
_EACH = BINS // THREADS
"""Bins that a thread adds up."""

_FIRST_SHIFT, _BITS = 22, 10
"""A bin of the first histogram has 2^22 keys; each further histogram divides one bin into 2^10."""

_UNIT = 1 << 16
_MOST_LOADS = 5
"""Loads of four logits that a thread has on their way."""

# Up to 16 a key is the distance in units of 2^-27, rounded up; above, it follows the bits of the distance.
_NEAR, _SCALE = 16.0, 2.0**27
_NEAR_KEY = 1 << 31
_ALL_KEYS = 0xFFFFFFFF
_INFINITE, _MINUS_INFINITE = float_bits(math.inf), float_bits(-math.inf)
_INFINITE_KEY = _NEAR_KEY + _INFINITE - float_bits(_NEAR)
_LOG2E = float_bits(math.log2(math.e))

# Addresses in shared memory, in words. In order: counts and sums of two histograms, used in turn; counts, sums and
# first bins of warps; what was found; the highest logits of the blocks.
_SUMS = BINS
_TURN = 2 * BINS
_WARPS = 2 * _TURN
_FOUND = _WARPS + 3 * (THREADS // 32)
_HIGHEST = _FOUND + 8
_WORDS = _HIGHEST + 16


@dataclasses.dataclass(frozen=True)
class NucleusPlan:
    """How a row is spread over a cluster.

    Attributes:
      size: logits of the row.
      cluster: blocks that read it.
    """

    size: int
    cluster: int

    @property
    def loads(self) -> int:
        """Loads of four logits of each thread."""
        return -(-self.size // (self.cluster * THREADS * 4))


def nucleus_plan(rows: int, size: int) -> NucleusPlan:
    """The plan with the widest cluster that the GPU has room for.

    Raises:
      NotImplementedError: sizes that the kernel does not take.
    """
    if not rows or size % 4 or size < 4:
        raise NotImplementedError("the number of logits of a row must be a multiple of 4")
    cluster = 16 if rows <= 4 else 8 if rows * 8 <= MULTIPROCESSORS else 4
    plan = NucleusPlan(size, cluster)
    # All keys of a block may be in one bin, and its sum is a word.
    if plan.loads * THREADS * 4 * _UNIT >= 1 << 32:
        raise NotImplementedError(f"rows of {size} logits are too long for {cluster} blocks")
    return plan


def nucleus(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `api.nucleus`.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take. The device is not checked.
    """
    rows, size = logits.shape
    plan = nucleus_plan(rows, size)
    out_type = (jax.ShapeDtypeStruct((rows,), jnp.float32),) * 2
    body = functools.partial(nucleus_body, rows=rows, plan=plan)
    run = launch(body, out_type, rows, plan.cluster, THREADS, _WORDS, machine_type=TensorMachine)
    return tuple(run(logits, top_k, top_p, active))


def nucleus_body(machine, logits, top_k, top_p, active, highest, span, row, rank, *, rows, plan):
    """Runs in each thread of the cluster of a row; `rank` is the block's number in it."""
    row, rank = machine.word(row), machine.word(rank)
    is_active = machine.load_global(machine.row(active, 0, rows), row)
    writes = machine.thread.eq(0) & rank.eq(0)

    def write(top, reach):
        for ref, value in ((highest, top), (span, reach)):
            machine.store_global_where(machine.row(ref, 0, rows), row, value, writes)

    with machine.when(is_active.eq(0)):
        write(machine.word(0), machine.word(_INFINITE))
    with machine.when(is_active.ne(0)):
        limit = machine.load_global(machine.row(top_k, 0, rows), row)
        share = machine.load_global(machine.row(top_p, 0, rows), row)
        search = Search(machine, machine.row(logits, row, plan.size), rank, plan)
        write(search.top, search.span(machine.select(limit.eq(0), plan.size, limit.min(plan.size)), share))
        # No block may leave while others read its histogram.
        machine.cluster_barrier()


class Search:
    """A row, as each thread of its cluster sees it."""

    def __init__(self, machine, row, rank, plan):
        self.machine, self.row, self.rank, self.plan = machine, row, rank, plan
        self.first = (rank * THREADS + machine.thread) * 4
        self.clear(0)
        self.top = self.find_highest()

    # The row.

    def each(self, use, carry=()):
        """`carry = use(logit, *carry)` for each of this thread's logits; -inf stands behind the row's end."""
        machine, plan = self.machine, self.plan
        at_once = -(-plan.loads // -(-plan.loads // _MOST_LOADS))
        stride = plan.cluster * THREADS * 4

        def turn(start, *carry):
            places = [self.first + start + i * stride for i in range(at_once)]
            loaded = [machine.load_global4_where(self.row, at.min(plan.size - 4), at < plan.size) for at in places]
            for at, four in zip(places, loaded, strict=True):
                for logit in four:
                    carry = use(machine.select(at < plan.size, logit, _MINUS_INFINITE), *carry)
            return carry

        return machine.loop(0, plan.loads * stride, at_once * stride, turn, carry)

    def find_highest(self):
        machine = self.machine
        op = functools.partial(machine.float_op, "max")

        def over_lanes(value):
            for mask in (16, 8, 4, 2, 1):
                value = op(value, machine.shuffle_xor(value, mask))
            return value

        [highest] = self.each(lambda logit, highest: [op(logit, highest)], [machine.word(_MINUS_INFINITE)])
        highest = over_lanes(highest)
        with machine.when(machine.lane.eq(0)):
            machine.store_shared(machine.warp + _WARPS, highest)
        machine.barrier()
        highest = over_lanes(machine.load_shared(machine.lane.min(THREADS // 32 - 1) + _WARPS))
        with machine.when(machine.thread < machine.cluster):
            machine.store_peer(self.rank + _HIGHEST, machine.thread.min(machine.cluster - 1), highest)
        machine.cluster_barrier()
        return over_lanes(machine.load_shared(machine.lane.min(machine.cluster - 1) + _HIGHEST))

    # Keys.

    def distance(self, logit):
        return self.machine.float_op("add", self.top, logit ^ 0x80000000)

    def key(self, distance):
        """Rises with a distance from 0 to infinity; NaN has a higher one."""
        near = self.machine.round_up(self.machine.float_op("mul", distance, float_bits(_SCALE)))
        return self.machine.select(distance <= float_bits(_NEAR), near, distance - float_bits(_NEAR) + _NEAR_KEY)

    def reach(self, key):
        """The largest distance that has this key or a lower one."""
        machine = self.machine
        near = machine.float_op("mul", machine.to_float(key), float_bits(1 / _SCALE))
        far = key.min(_INFINITE_KEY) - _NEAR_KEY + float_bits(_NEAR)
        return machine.select(key <= _NEAR_KEY, near, far)

    def likelihood(self, distance):
        """The exponential of minus a distance."""
        machine = self.machine
        return machine.float_op("exp2", machine.float_op("mul", distance ^ 0x80000000, _LOG2E))

    # Histograms.

    def clear(self, turn):
        """Empties this thread's bins of the histograms of a turn."""
        machine = self.machine
        for start in (0, _SUMS):
            at = machine.word(turn) * _TURN + machine.thread * _EACH + start
            machine.store_shared_vector(at, [machine.word(0)] * _EACH)

    def histogram(self, turn, low, width, shift):
        """Counts and sums of this thread's bins over the cluster, of keys from `low` to `low + width`.

        A bin has `2 ** shift` keys. The sums are float32.
        """
        machine = self.machine
        base = turn * _TURN

        def add(logit):
            distance = self.distance(logit)
            offset = self.key(distance) - low
            with machine.when(offset <= width):
                index = offset >> shift
                begin = self.reach(low + (index << shift))
                # 1 at the bin's beginning. Infinite distances give NaN, which becomes 0.
                share = self.likelihood(machine.float_op("add", distance, begin ^ 0x80000000))
                units = machine.round_nearest(machine.float_op("mul", share, float_bits(_UNIT)))
                machine.add_shared(base + index, 1)
                machine.add_shared(base + index + _SUMS, units)
            return ()

        self.each(add)
        machine.cluster_barrier()
        # All blocks have left the turn before, whose bins the next one takes.
        self.clear(turn ^ 1)
        mine = machine.thread * _EACH
        counts, sums = [machine.word(0)] * _EACH, [machine.word(0)] * _EACH
        for rank in range(self.plan.cluster):
            for i, count in enumerate(machine.load_peer_vector(base + mine, _EACH, rank)):
                counts[i] = counts[i] + count
            for i, units in enumerate(machine.load_peer_vector(base + mine + _SUMS, _EACH, rank)):
                sums[i] = machine.float_op("add", sums[i], machine.to_float(units))
        for i in range(_EACH):
            begin = self.likelihood(self.reach(low + (mine + i << shift)))
            scaled = machine.float_op("mul", machine.float_op("mul", sums[i], float_bits(1 / _UNIT)), begin)
            # Nothing is in bins behind the last key, which have no beginning.
            sums[i] = machine.select(counts[i].eq(0), 0, scaled)
        return counts, sums

    def first_bin(self, counts, sums, before, mass_before, wanted, target):
        """The first bin with which a number of tokens, or a probability, is reached.

        Args:
          counts, sums: as `histogram` gives them.
          before, mass_before: tokens, and their probability, before the first bin.
          wanted, target: the number of tokens and the probability.

        Returns:
          the bin, `BINS` if there is none; tokens before it and in it; their probabilities.
        """
        machine, op = self.machine, functools.partial(self.machine.float_op, "add")
        count, mass = sum(counts[1:], counts[0]), functools.reduce(op, sums)
        count_scan, mass_scan = warp_scan(machine, count), self.float_scan(mass)
        with machine.when(machine.lane.eq(31)):
            machine.store_shared(machine.warp + _WARPS, count_scan)
            machine.store_shared(machine.warp + (_WARPS + THREADS // 32), mass_scan)
        machine.barrier()
        lane = machine.lane.min(THREADS // 32 - 1)
        earlier = machine.lane < machine.warp
        others = machine.select(earlier, machine.load_shared(lane + _WARPS), 0)
        of_others = machine.select(earlier, machine.load_shared(lane + (_WARPS + THREADS // 32)), 0)
        start = machine.warp_sum(others) + before + count_scan - count
        previous = machine.select(machine.lane.eq(0), 0, machine.shuffle_up(mass_scan, 1))
        mass_start = op(op(mass_before, self.float_sum(of_others)), previous)
        # Each bin with tokens and probability before it. The sums rise from bin to bin of a thread and of a warp.
        found, places = machine.word(BINS), []
        for i in range(_EACH):
            places.append((start, mass_start, counts[i], sums[i]))
            start, mass_start = start + counts[i], op(mass_start, sums[i])
            # Probabilities are not negative, so their words have their order.
            reached = (counts[i].ne(0)) & ((start >= wanted) | (mass_start >= target))
            found = machine.select(reached & found.eq(BINS), machine.thread * _EACH + i, found)
        least = machine.warp_min(found)
        with machine.when(machine.lane.eq(0)):
            machine.store_shared(machine.warp + (_WARPS + 2 * (THREADS // 32)), least)
        machine.barrier()
        least = machine.warp_min(machine.load_shared(lane + (_WARPS + 2 * (THREADS // 32))))
        for i, place in enumerate(places):
            with machine.when(least.eq(machine.thread * _EACH + i)):
                for slot, value in enumerate(place):
                    machine.store_shared(slot + _FOUND, value)
        machine.barrier()
        return least, [machine.load_shared(machine.word(slot) + _FOUND) for slot in range(4)]

    def float_scan(self, value):
        """The sum of `value` over the lanes up to and including this one."""
        machine = self.machine
        for distance in (1, 2, 4, 8, 16):
            lower = machine.shuffle_up(value, distance)
            value = machine.float_op("add", value, machine.select(machine.lane >= distance, lower, 0))
        return value

    def float_sum(self, value):
        for mask in (16, 8, 4, 2, 1):
            value = self.machine.float_op("add", value, self.machine.shuffle_xor(value, mask))
        return value

    # The search.

    def narrow(self, turn, bins, wanted, target):
        """Searches the first histogram, and then the bins that it finds, until one has a single key or token.

        Args:
          turn: of the next histogram.
          bins: counts and sums of the first one.

        Returns:
          the next turn, the last key, tokens before its bin and in it, and their probabilities.
        """
        machine = self.machine

        def enter(counts, sums, low, width, shift, state):
            found, places = self.first_bin(counts, sums, state[0], state[1], wanted, target)
            none = found.eq(BINS)
            # Rounding may leave all of a bin below what it has as a whole: then all of it counts.
            state = [machine.select(none, old, new) for old, new in zip(state, places, strict=True)]
            low = machine.select(none, low, low + (found << shift))
            width = machine.select(none, width, (machine.word(1) << shift) - 1)
            going = machine.select(none | shift.eq(0) | state[2].eq(1), 0, 1)
            # With all of the bin there are as many tokens as are wanted, and no probability ends before.
            whole = (state[0] + state[2]).eq(wanted) & machine.word(target).eq(_INFINITE)
            return low, width, machine.select(whole, 0, going), state

        def step(turn, low, width, shift, _, *state):
            shift = machine.select(shift > _BITS, shift - _BITS, 0)
            counts, sums = self.histogram(turn, low, width, shift)
            low, width, going, state = enter(counts, sums, low, width, shift, list(state))
            return [turn ^ 1, low, width, shift, going, *state]

        shift = machine.word(_FIRST_SHIFT)
        nothing = [machine.word(0)] * 2 + [machine.word(_ALL_KEYS)] + [machine.word(0)]
        counts, sums = bins
        low, width, going, state = enter(counts, sums, machine.word(0), machine.word(_ALL_KEYS), shift, nothing)
        turn, low, width, _, _, *state = machine.while_loop(
            lambda turn, low, width, shift, going, *state: going.ne(0), step, [turn, low, width, shift, going, *state]
        )
        return turn, low + width, state

    def span(self, limit, share):
        """How far below the highest logit the tokens are that stay: of `limit`, those that reach a share of 1."""
        machine, op = self.machine, self.machine.float_op
        bins = self.histogram(machine.word(0), machine.word(0), machine.word(_ALL_KEYS), machine.word(_FIRST_SHIFT))
        turn, last, (before, mass_before, inside, mass) = self.narrow(
            machine.word(1), bins, limit, machine.word(_INFINITE)
        )
        # Of equally likely tokens at the end only as many count as top_k leaves.
        part = op("div", machine.to_float(limit - before), machine.to_float(inside))
        total = op("fma", mass, part, mass_before)
        target = op("mul", total, share)

        def search(last):
            _, nucleus_last, _ = self.narrow(turn, bins, limit, target)
            return [nucleus_last.min(last)]

        [last] = machine.branch(share < float_bits(1.0), search, [last])
        return self.reach(last)
