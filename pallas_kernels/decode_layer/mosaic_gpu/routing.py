"""The norm before the experts, the router, its softmax and the choice of experts, in one launch.

A cluster takes eight tokens, a block of it 16 experts. Each block norms the tokens itself. The blocks send what they
have of a token's logits to one of them, where a warp chooses.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.decode_layer.mosaic_gpu import products
from pallas_kernels.decode_layer.mosaic_gpu.products import TileProduct
from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.simt import float_bits
from pallas_kernels.gpu.tensor_machine import TensorMachine

EXPERTS, TOKENS = 16, 8
_AHEAD, _LOG2E = 8, math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class RouteShape:
    """The sizes of a launch: tokens, inputs, experts and those chosen; eps of the norm; whether weights sum to 1."""

    rows: int
    size: int
    experts: int
    top_k: int
    eps: float
    normalise: bool

    @property
    def cluster(self) -> int:
        return self.experts // EXPERTS

    @property
    def groups(self) -> int:
        return -(-self.rows // TOKENS)

    @property
    def sums(self) -> int:
        """Where shared memory holds the warps' sums. Before it are the normed tokens."""
        return TOKENS * products.row_pitch(self.size)

    @property
    def logits(self) -> int:
        """Where it holds the logits of the tokens that the block chooses for."""
        return self.sums + products.sums_words(1, TOKENS)

    @property
    def words(self) -> int:
        return self.logits + TOKENS * self.experts


def choose(x: jax.Array, norm: jax.Array, router: jax.Array, shape: RouteShape) -> tuple[jax.Array, ...]:
    """Launches `api.route`."""
    out_type = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((shape.rows, shape.top_k), jnp.int32),
        jax.ShapeDtypeStruct((shape.rows, shape.top_k), jnp.float32),
    )
    body = functools.partial(route_body, shape=shape)
    launched = launch(
        body, out_type, shape.groups, shape.cluster, products.THREADS, shape.words, machine_type=TensorMachine
    )
    return launched(x, norm, router)


def route_body(machine, x, norm, router, normed, experts, weights, block, rank, *, shape):
    """Runs in each thread of cluster number `block`; `rank` is the block's number in it."""
    rank, first = machine.word(rank), machine.word(block) * TOKENS
    words, pitch = shape.size // 2, products.row_pitch(shape.size)
    start = rank * EXPERTS + (machine.lane >> 2)
    matrix = machine.row(router, 0, shape.experts * words)
    product = TileProduct(machine, matrix, [[start, start + 8]], shape.size, TOKENS, _AHEAD)
    products.normalise(machine, x, norm, first, TOKENS, shape.rows, shape.size, float_bits(shape.eps), 0)
    machine.barrier()
    product.share(product.sums(product.shared_tokens(0, pitch)), shape.sums)
    machine.barrier()

    # A warp has a token, and the block whose turn it is chooses for it.
    token = machine.warp
    owner = token - token // shape.cluster * shape.cluster
    with machine.when(machine.lane < EXPERTS):
        logit = product.total(shape.sums, token, machine.lane.min(EXPERTS - 1))
        machine.store_peer(token * shape.experts + rank * EXPERTS + machine.lane + shape.logits, owner, logit)
    machine.cluster_barrier()
    chosen_here = owner.eq(rank) & (first + token < shape.rows)
    row = machine.select(chosen_here, first + token, 0)
    with machine.when(chosen_here):
        out = machine.row(normed, row, words)
        for word in range(0, words, 128):
            place = machine.lane * 4 + word
            held = machine.load_shared_vector(token * pitch + place, 4)
            for i in (0, 2):
                machine.store_global_pair(out, place + i, *held[i : i + 2])
        choose_experts(machine, experts, weights, row, token * shape.experts + shape.logits, shape)


def choose_experts(machine, experts, weights, row, start, shape):
    """Softmax of a token's logits in shared memory from `start` on, and its best experts; a warp runs this."""
    op, each = machine.float_op, max(1, shape.experts // 32)
    first = machine.lane * each
    own = machine.load_shared_vector(first.min(shape.experts - each) + start, each)
    there = first < shape.experts
    own = [machine.select(there, x, 0xFF800000) for x in own]
    highest = functools.reduce(functools.partial(op, "max"), own)
    for mask in (16, 8, 4, 2, 1):
        highest = op("max", highest, machine.shuffle_xor(highest, mask))
    scale = float_bits(_LOG2E)
    own = [op("exp2", op("mul", op("add", x, highest ^ 0x80000000), scale)) for x in own]
    total = products.lane_sum(machine, functools.reduce(functools.partial(op, "add"), own))
    # As words, numbers from 0 up have the order of the numbers. One that was taken becomes 0, and 0 is below all.
    own = [machine.select(there, op("div", x, total) + 1, 0) for x in own]
    chosen, found = machine.word(0), machine.word(0)
    for turn in range(shape.top_k):
        best = functools.reduce(lambda a, b: a.max(b), own)
        best = machine.warp_max(best)
        places = [machine.select(x.eq(best), first + i, 0xFFFFFFFF) for i, x in enumerate(own)]
        place = machine.warp_min(functools.reduce(lambda a, b: a.min(b), places))
        own = [machine.select(place.eq(first + i), 0, x) for i, x in enumerate(own)]
        mine = machine.lane.eq(turn)
        chosen, found = machine.select(mine, place, chosen), machine.select(mine, best - 1, found)
    if shape.normalise:
        found = op("div", found, products.lane_sum(machine, found))
    mine = machine.lane < shape.top_k
    at = machine.lane.min(shape.top_k - 1)
    machine.store_global_where(machine.row(experts, row, shape.top_k), at, chosen, mine)
    machine.store_global_where(machine.row(weights, row, shape.top_k), at, found, mine)
