"""The weighted sum of what a token's experts gave, the residual, and the norm of the next layer, in one launch.

A block takes a token, and a thread 8 neighbouring numbers of it, of all rows. Time is that of two loads in a row, the
places and then the rows: a thread has all its rows on their way together.
"""

import dataclasses
import functools

import jax

from pallas_kernels.decode_layer.mosaic_gpu import products
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
    """The sizes of a launch: tokens, inputs and a token's experts; eps of the norm."""

    rows: int
    size: int
    experts: int
    eps: float

    @property
    def warps(self) -> int:
        """How many warps of a block have numbers."""
        return self.size // STEP


def combine(
    rows: jax.Array, row_of: jax.Array, weights: jax.Array, x: jax.Array, norm: jax.Array, shape: CombineShape
) -> tuple[jax.Array, ...]:
    """Launches `api.combine_experts`."""
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    body = functools.partial(combine_body, shape=shape)
    launched = launch(body, (out, out), shape.rows, 1, THREADS, _SUMS + WARPS, machine_type=TensorMachine)
    return launched(rows, row_of, weights, x, norm)


def combine_body(machine, rows, row_of, weights, x, norm, y, normed, block, rank, *, shape):
    """Runs in each thread of block number `block`, which is that of its token."""
    del rank
    op, token, words = machine.float_op, machine.word(block), shape.size // 2
    places = _load(machine, row_of, token, shape.experts)
    shares = _load(machine, weights, token, shape.experts)
    # Warps behind the last number load that one's words, and their results go nowhere.
    there, at = machine.thread < words // 4, (machine.thread * 4).min(words - 4)
    before = machine.load_global4(machine.row(x, token, words), at)
    # Factors come from far: no kernel has used them before. ptxas puts off loads and copies to where they are waited
    # for, but no copy beyond a barrier that the rows' loads stay behind. Here threads wait for the places anyway.
    machine.copy_shared4(machine.thread * 4, machine.row(norm, 0, words), at, there)
    machine.commit_copies()
    machine.barrier()
    last = shape.rows * shape.experts - 1
    taken = []
    for place in places:
        place = machine.select(place < _SIGN, place.min(last), 0)
        taken.append(machine.load_global4_in_order(machine.row(rows, place, words), at))

    mixed = [op("mul", shares[0], number) for number in products.unpack(machine, taken[0])]
    for share, row in zip(shares[1:], taken[1:], strict=True):
        mixed = [op("fma", share, *pair) for pair in zip(products.unpack(machine, row), mixed, strict=True)]
    sums = products.add_bfloat16(machine, before, products.pack(machine, mixed))
    with machine.when(there):
        machine.store_global4(machine.row(y, token, words), at, sums)

    sums = products.unpack(machine, sums)
    squares = op("mul", sums[0], sums[0])
    for number in sums[1:]:
        squares = op("fma", number, number, squares)
    squares = products.lane_sum(machine, squares)
    with machine.when(machine.lane.eq(0)):
        machine.store_shared(machine.warp + _SUMS, squares)
    machine.wait_copies(0)
    machine.barrier()
    parts = machine.load_shared_vector(_SUMS, WARPS)[: shape.warps]
    total = functools.reduce(functools.partial(op, "add"), parts)
    scale = products.mean_scale(machine, total, shape.size, float_bits(shape.eps))
    factors = products.unpack(machine, machine.load_shared_vector(machine.thread * 4, 4))
    scaled = [op("mul", op("mul", number, scale), factor) for number, factor in zip(sums, factors, strict=True)]
    with machine.when(there):
        machine.store_global4(machine.row(normed, token, words), at, products.pack(machine, scaled))


def _load(machine, array, token, size):
    """The words of a token's row of `size` words, all of them in each thread."""
    row = machine.row(array, token, size)
    if size % 4:
        return [machine.load_global(row, i) for i in range(size)]
    return [word for i in range(0, size, 4) for word in machine.load_global4(row, i)]
