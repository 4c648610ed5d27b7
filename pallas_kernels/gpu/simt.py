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


def count_before(machine, count, scratch, rank):
    """The sum of `count` over all lanes of earlier warps of the cluster, and the sum over all its warps.

    Uses 33 words of shared memory from `scratch` on. `rank` is the block's number in the cluster.
    """
    warps = machine.threads // 32
    count = machine.warp_sum(count)
    with machine.when(machine.lane.eq(0)):
        machine.store_shared(machine.warp + scratch, count)
    machine.barrier()
    count = machine.load_shared(machine.lane.min(warps - 1) + scratch)
    before = machine.warp_sum(machine.select(machine.lane < machine.warp, count, 0))
    total = machine.warp_sum(machine.select(machine.lane < warps, count, 0))
    if machine.cluster > 1:
        machine.store_shared(scratch + 32, total)
        machine.cluster_barrier()
        count = machine.load_peer(scratch + 32, machine.lane.min(machine.cluster - 1))
        before = before + machine.warp_sum(machine.select(machine.lane < rank, count, 0))
        total = machine.warp_sum(machine.select(machine.lane < machine.cluster, count, 0))
        machine.cluster_barrier()
    return before, total
