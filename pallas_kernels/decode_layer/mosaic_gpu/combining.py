"""The weighted sum of what a token's experts gave, the residual, and the norm of the next layer, in one launch.

A block takes a token, and a thread 8 neighbouring numbers of it, of all rows. Time is that of two loads in a row, the
places and then the rows: a thread has all its rows on their way together.
"""

import dataclasses
import functools

import jax

from pallas_kernels.decode_layer.mosaic_gpu import products
from pallas_kernels.decode_layer.mosaic_gpu.exchange import SUMMED, Exchange
from pallas_kernels.decode_layer.mosaic_gpu.products import STEP, THREADS, WARPS
from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.simt import float_bits
from pallas_kernels.gpu.tensor_machine import TensorMachine

MOST_EXPERTS = 32
_SUMS = 4 * THREADS
"""Where shared memory holds the warps' sums of squares. Before it are the threads' factors of the norm."""
_SIGN = 0x80000000


@dataclasses.dataclass(frozen=True)
class CombineShape:
    """The sizes of a launch: tokens of all devices, inputs and a token's experts; eps of the norm; devices."""

    rows: int
    size: int
    experts: int
    eps: float
    devices: int = 1

    @property
    def warps(self) -> int:
        """How many warps of a block have numbers."""
        return self.size // STEP

    @property
    def own_rows(self) -> int:
        """The tokens of one device."""
        return self.rows // self.devices


def combine(
    rows: jax.Array,
    row_of: jax.Array,
    weights: jax.Array,
    x: jax.Array,
    norm: jax.Array,
    addresses: jax.Array | None,
    shape: CombineShape,
) -> tuple[jax.Array, ...]:
    """Launches `api.combine_experts`; with several devices it takes what `peers.peer_addresses` has for this one."""
    out = jax.ShapeDtypeStruct((shape.own_rows, shape.size), x.dtype)
    arrays = (rows, row_of, weights, x, norm) if addresses is None else (rows, row_of, weights, x, norm, addresses)
    body = functools.partial(combine_body if addresses is None else combine_over_devices_body, shape=shape)
    launched = launch(body, (out, out), shape.rows, 1, THREADS, _SUMS + WARPS, machine_type=TensorMachine)
    return launched(*arrays)


def combine_body(machine, rows, row_of, weights, x, norm, y, normed, block, rank, *, shape):
    """Runs in each thread of block number `block`, which is that of its token."""
    del rank
    token = _Token(machine, x, norm, block, shape)
    mixed = token.mix(rows, row_of, weights)
    token.finish(mixed, y, normed, block)


def combine_over_devices_body(machine, rows, row_of, weights, x, norm, addresses, y, normed, block, rank, *, shape):
    """As `combine_body`. Each device has sums of its own experts; a token's device adds them up, in order of ranks."""
    del rank
    exchange = Exchange(machine, addresses, SUMMED, block, shape.own_rows, shape.devices)
    token = _Token(machine, x, norm, block, shape)
    mixed = token.mix(rows, row_of, weights)
    with machine.when(token.there):
        exchange.send(exchange.owner, mixed, token.at)
    with machine.when(exchange.is_owner):
        # A thread behind the last number waits for that one's words too.
        parts = [products.unpack(machine, exchange.receive(device, token.at)) for device in range(shape.devices)]
        sums = [functools.reduce(functools.partial(machine.float_op, "add"), each) for each in zip(*parts, strict=True)]
        token.finish(products.pack(machine, sums), y, normed, exchange.own_token)
    machine.barrier()
    exchange.finish()


class _Token:
    """A block's token, as each thread sees it.

    Attributes:
      there, at: whether the thread has four words of the token, and which.
    """

    def __init__(self, machine, x, norm, token, shape):
        words = shape.size // 2
        self.machine, self.token, self.shape, self.words = machine, token, shape, words
        # Warps behind the last number load that one's words, and their results go nowhere.
        self.there, self.at = machine.thread < words // 4, (machine.thread * 4).min(words - 4)
        self.x, self.norm = x, norm

    def mix(self, rows, row_of, weights):
        """The weighted sum of the rows of the token's experts, rounded, as words of two numbers."""
        machine, shape, op = self.machine, self.shape, self.machine.float_op
        places = _load(machine, row_of, self.token, shape.experts)
        shares = _load(machine, weights, self.token, shape.experts)
        self.before = machine.load_global4(machine.row(self.x, self.token, self.words), self.at)
        # Factors come from far: no kernel has used them before. ptxas puts off loads and copies to where they are
        # waited for, but no copy beyond a barrier that the rows' loads stay behind. Here threads wait for the places
        # anyway.
        machine.copy_shared4(machine.thread * 4, machine.row(self.norm, 0, self.words), self.at, self.there)
        machine.commit_copies()
        machine.barrier()
        last = shape.rows * shape.experts - 1
        taken = []
        for place in places:
            place = machine.select(place < _SIGN, place.min(last), 0)
            taken.append(machine.load_global4_in_order(machine.row(rows, place, self.words), self.at))

        mixed = [op("mul", shares[0], number) for number in products.unpack(machine, taken[0])]
        for share, row in zip(shares[1:], taken[1:], strict=True):
            mixed = [op("fma", share, *pair) for pair in zip(products.unpack(machine, row), mixed, strict=True)]
        return products.pack(machine, mixed)

    def finish(self, mixed, y, normed, row):
        """Adds the residual and gives the norm, to row `row` of both results."""
        machine, op = self.machine, self.machine.float_op
        sums = products.add_bfloat16(machine, self.before, mixed)
        with machine.when(self.there):
            machine.store_global4(machine.row(y, row, self.words), self.at, sums)

        sums = products.unpack(machine, sums)
        squares = op("mul", sums[0], sums[0])
        for number in sums[1:]:
            squares = op("fma", number, number, squares)
        squares = products.lane_sum(machine, squares)
        with machine.when(machine.lane.eq(0)):
            machine.store_shared(machine.warp + _SUMS, squares)
        machine.wait_copies(0)
        machine.barrier()
        parts = machine.load_shared_vector(_SUMS, WARPS)[: self.shape.warps]
        total = functools.reduce(functools.partial(op, "add"), parts)
        scale = products.mean_scale(machine, total, self.shape.size, float_bits(self.shape.eps))
        factors = products.unpack(machine, machine.load_shared_vector(machine.thread * 4, 4))
        scaled = [op("mul", op("mul", number, scale), factor) for number, factor in zip(sums, factors, strict=True)]
        with machine.when(self.there):
            machine.store_global4(machine.row(normed, row, self.words), self.at, products.pack(machine, scaled))


def _load(machine, array, token, size):
    """The words of a token's row of `size` words, all of them in each thread."""
    row = machine.row(array, token, size)
    if size % 4:
        return [machine.load_global(row, i) for i in range(size)]
    return [word for i in range(0, size, 4) for word in machine.load_global4(row, i)]
