"""Per-thread (SIMT) kernel bodies: 32-bit values with operators, and sums over threads.

A kernel body is a Python function of a machine and of `Value`s. The machine loads, stores, branches and synchronises.
`machine.Machine` emits instructions for a GPU; the tests have a machine that computes with NumPy. All integers are
unsigned 32-bit words. Addresses in shared memory are words from the start of one scratch buffer.
"""

import numpy as np


class Value:
    """A 32-bit word or a boolean of one thread."""

    def __init__(self, machine, raw):
        self.machine, self.raw = machine, raw

    def _binary(self, name, other):
        return self.machine.binary(name, self, other)

    def __add__(self, other):
        return self._binary("add", other)

    def __sub__(self, other):
        return self._binary("sub", other)

    def __mul__(self, other):
        return self._binary("mul", other)

    def __floordiv__(self, other):
        return self._binary("div", other)

    def __and__(self, other):
        return self._binary("and", other)

    def __or__(self, other):
        return self._binary("or", other)

    def __xor__(self, other):
        return self._binary("xor", other)

    def __lshift__(self, other):
        return self._binary("shl", other)

    def __rshift__(self, other):
        return self._binary("shr", other)

    def sar(self, other):
        """Arithmetic shift to the right."""
        return self._binary("sar", other)

    def __lt__(self, other):
        return self.machine.compare("lt", self, other)

    def __le__(self, other):
        return self.machine.compare("le", self, other)

    def __gt__(self, other):
        return self.machine.compare("gt", self, other)

    def __ge__(self, other):
        return self.machine.compare("ge", self, other)

    def eq(self, other):
        return self.machine.compare("eq", self, other)

    def ne(self, other):
        return self.machine.compare("ne", self, other)

    def min(self, other):
        return self.machine.select(self < other, self, other)

    def max(self, other):
        return self.machine.select(self > other, self, other)


def float_bits(value: float) -> int:
    """The word that holds a float32 number."""
    return int(np.float32(value).view(np.uint32))


def warp_scan(machine, value):
    """The sum of `value` over the lanes up to and including this one."""
    for distance in (1, 2, 4, 8, 16):
        lower = machine.shuffle_up(value, distance)
        value = value + machine.select(machine.lane >= distance, lower, 0)
    return value


def count_before(machine, counts, scratch, rank):
    """For each of `counts`, the sum over all lanes of earlier warps of the cluster, and the sum over all its warps.

    Uses 33 words of shared memory for each, from `scratch` on. `rank` is the block's number in the cluster.
    """
    warps = machine.threads // 32
    own = [machine.warp_sum(count) for count in counts]
    places = [scratch + 33 * i for i in range(len(counts))]
    with machine.when(machine.lane.eq(0)):
        for place, count in zip(places, own, strict=True):
            machine.store_shared(machine.warp + place, count)
    machine.barrier()
    own = [machine.load_shared(machine.lane.min(warps - 1) + place) for place in places]
    before = [machine.warp_sum(machine.select(machine.lane < machine.warp, count, 0)) for count in own]
    totals = [machine.warp_sum(machine.select(machine.lane < warps, count, 0)) for count in own]
    if machine.cluster > 1:
        for place, total in zip(places, totals, strict=True):
            machine.store_shared(place + 32, total)
        machine.cluster_barrier()
        own = [machine.load_peer(place + 32, machine.lane.min(machine.cluster - 1)) for place in places]
        earlier = [machine.warp_sum(machine.select(machine.lane < rank, count, 0)) for count in own]
        before = [a + b for a, b in zip(before, earlier, strict=True)]
        totals = [machine.warp_sum(machine.select(machine.lane < machine.cluster, count, 0)) for count in own]
        machine.cluster_barrier()
    return before, totals
