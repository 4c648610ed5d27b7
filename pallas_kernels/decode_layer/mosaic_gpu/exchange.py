"""Exchange of tokens between GPUs, inside kernels: no collective of XLA ends the CUDA graph of a step.

A block has one token of all devices. Whoever has the token writes it into the memory of those that need it, and these
wait for it there. Each pair of words travels with a flag, as in NCCL's protocol for short messages, so nobody waits for
a second message that says that the first is there.

A flag is the number of the exchange of that token's place, which every device counts for itself. Two turns of memory
alternate: a device that begins the next exchange has finished the last one, and one that has received something of an
exchange knows that its sender has begun it. So nothing is written where somebody may still read.
"""

import dataclasses
import functools

import jax

from pallas_kernels.decode_layer.mosaic_gpu import products
from pallas_kernels.decode_layer.mosaic_gpu.products import THREADS
from pallas_kernels.gpu import peers
from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.tensor_machine import TensorMachine

GATHERED, SUMMED = 0, 1
_SHARED_WORDS = 32
"""A launch has some; `gather` uses none."""


class Exchange:
    """One token's exchange, as each thread of its block sees it.

    Args:
      addresses: this device's row of `peers.peer_addresses`.
      kind: `GATHERED` or `SUMMED`.
      token: its place among the tokens of all devices.
      own_tokens: how many each device has.
      devices: how many there are.
    """

    def __init__(self, machine, addresses, kind, token, own_tokens, devices):
        self.machine, self.kind, self.token = machine, kind, token
        self.table = machine.row(addresses, 0, 2 * devices + 1)
        self.rank, self.owner = machine.load_global(self.table, 0), token // own_tokens
        self.own_token = token - self.rank * own_tokens
        self.memory = self._memory(self.rank)
        self.counter = token + peers.counter_of(devices, kind)
        (count,) = machine.load_global_now(self.memory, self.counter, 1)
        self.flag = count + 1

    @property
    def is_owner(self):
        return self.owner.eq(self.rank)

    def send(self, device, words, at):
        """Sends four words of the token, from word `at` on, to a device: a number or a value."""
        self.machine.send4(self._memory(device), self._place(self.rank, at), words, self.flag)

    def receive(self, sender, at):
        """Four words of the token from a device."""
        return self.machine.receive4(self.memory, self._place(sender, at), self.flag)

    def finish(self):
        """Counts the exchange, after all threads of the block have got the flag."""
        with self.machine.when(self.machine.thread.eq(0)):
            self.machine.store_global(self.memory, self.counter, self.flag)

    def _memory(self, device):
        at = self.machine.word(device) * 2
        return self.machine.row_at(*(self.machine.load_global(self.table, at + half) for half in (1, 2)))

    def _place(self, sender, at):
        place = self.machine.word(sender) + 1 if self.kind == SUMMED else self.machine.word(0)
        return peers.place_of(place, self.flag & 1, self.token) + at * 2


@dataclasses.dataclass(frozen=True)
class GatherShape:
    """The sizes of a launch: a device's tokens, their inputs, and devices."""

    tokens: int
    size: int
    devices: int


def gather(x: jax.Array, update: jax.Array, addresses: jax.Array, shape: GatherShape) -> jax.Array:
    """Launches `api.gather_tokens`."""
    rows = shape.tokens * shape.devices
    out = jax.ShapeDtypeStruct((rows, shape.size), x.dtype)
    body = functools.partial(gather_body, shape=shape)
    return launch(body, out, rows, 1, THREADS, _SHARED_WORDS, machine_type=TensorMachine)(x, update, addresses)


def gather_body(machine, x, update, addresses, out, block, rank, *, shape):
    """Runs in each thread of block number `block`, which is that of its token."""
    del rank
    words = shape.size // 2
    exchange = Exchange(machine, addresses, GATHERED, block, shape.tokens, shape.devices)
    with machine.when(machine.thread < words // 4):
        at = machine.thread * 4
        with machine.when(exchange.is_owner):
            token, added = (
                machine.load_global4(machine.row(array, exchange.own_token, words), at) for array in (x, update)
            )
            token = products.add_bfloat16(machine, token, added)
            for device in range(shape.devices):
                exchange.send(device, token, at)
        machine.store_global4(machine.row(out, block, words), at, exchange.receive(exchange.owner, at))
    machine.barrier()
    exchange.finish()
