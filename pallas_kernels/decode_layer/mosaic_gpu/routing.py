"""What attention adds, the norm before the experts, the router, its softmax and the choice of experts, in one launch.

A cluster takes eight tokens, a block of it 16 experts. Each block adds and norms the tokens itself. The blocks send
what they have of a token's logits to one of them, where a warp chooses.

Where one cluster has all tokens, it gives the rows by expert too. Then every block gets all logits and chooses for all
tokens, which costs no time: a warp has a token in any case. So each block knows the place of every row, and they share
the stores with no further word to each other. Of more tokens, `ordering` sorts the rows in a second launch.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.decode_layer.mosaic_gpu import products
from pallas_kernels.decode_layer.mosaic_gpu.ordering import (
    NO_KEY,
    OrderShape,
    group_size,
    order,
    own_expert,
    place_of,
    row_key,
)
from pallas_kernels.decode_layer.mosaic_gpu.products import TOKENS, TileProduct
from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.simt import float_bits
from pallas_kernels.gpu.tensor_machine import TensorMachine

MOST_CHOSEN = 32
EXPERTS = products.OUTPUTS
"""Of a block."""

_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class RouteShape:
    """How a launch is made.

    Attributes:
      rows, size, experts, top_k: numbers of tokens, of their inputs, of experts, and of those chosen.
      eps: of the norm.
      normalise: whether weights sum to 1.
      own: how many experts are here; None for all.
    """

    rows: int
    size: int
    experts: int
    top_k: int
    eps: float
    normalise: bool
    own: int | None

    @property
    def order(self) -> OrderShape:
        """Of the launch that sorts the rows."""
        return OrderShape(self.rows, self.size, self.experts, self.top_k, self.own)

    @property
    def cluster(self) -> int:
        return self.experts // EXPERTS

    @property
    def groups(self) -> int:
        return -(-self.rows // TOKENS)

    @property
    def updates(self) -> int:
        """Where shared memory holds what is added to the tokens, and then the sums. Before it are the normed tokens."""
        return TOKENS * products.row_pitch(self.size)

    @property
    def factors(self) -> int:
        """Where it holds the norm's weights."""
        return 2 * self.updates

    @property
    def sums(self) -> int:
        """Where it holds the warps' sums."""
        return self.factors + self.size // 2

    @property
    def logits(self) -> int:
        """Where it holds the logits of the tokens that the block chooses for."""
        return self.sums + products.SUMS_WORDS

    @property
    def sorts(self) -> bool:
        """Whether one cluster has all tokens, and sorts their rows too."""
        return self.groups == 1

    @property
    def keys(self) -> int:
        """Rows of all tokens."""
        return self.rows * self.top_k

    @property
    def key_words(self) -> int:
        """Where it holds the keys that rows are sorted by."""
        return self.logits + TOKENS * self.experts

    @property
    def words(self) -> int:
        return self.key_words + (self.keys if self.sorts else 0)


def choose(
    x: jax.Array, update: jax.Array, norm: jax.Array, router: jax.Array, flags: jax.Array, shape: RouteShape
) -> tuple[jax.Array, ...]:
    """Launches `api.route`, with flags of tokens as `own_expert`; without `shape.sorts` that is two launches."""
    of_rows = shape.rows, shape.top_k
    out_type = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct(of_rows, jnp.int32),
        jax.ShapeDtypeStruct(of_rows, jnp.float32),
    )
    if shape.sorts:
        out_type += (
            jax.ShapeDtypeStruct((shape.keys, shape.size), x.dtype),
            jax.ShapeDtypeStruct(of_rows, jnp.int32),
            jax.ShapeDtypeStruct((shape.order.groups,), jnp.int32),
        )
    body = functools.partial(route_body, shape=shape)
    launched = launch(
        body, out_type, shape.groups, shape.cluster, products.THREADS, shape.words, machine_type=TensorMachine
    )
    found = tuple(launched(x, update, norm, router, flags))
    if shape.sorts:
        return found
    _, normed, experts, _ = found
    return *found, *order(normed, experts, flags, shape.order)


def route_body(machine, x, update, norm, router, flags, y, normed, experts, weights, *rest, shape):
    """Runs in each thread of a cluster. `rest` ends with the cluster's number, and that of the block in it."""
    *sorted_rows, block, rank = rest
    rank, first = machine.word(rank), machine.word(block) * TOKENS
    words, pitch = shape.size // 2, products.row_pitch(shape.size)
    # A warp has a token. The block whose turn it is stores what is of a token alone.
    token = machine.warp
    exists = first + token < shape.rows
    row = machine.select(exists, first + token, 0)
    owner = token - token // shape.cluster * shape.cluster
    stores = owner.eq(rank)

    # Everything is asked for before anything is waited for, and first what is needed first.
    places = [machine.lane * 4 + word for word in range(0, words, 128)]
    held_at = [token * pitch + place for place in places]
    for ref, begin in ((x, 0), (update, shape.updates)):
        source = machine.row(ref, row, words)
        for place, at in zip(places, held_at, strict=True):
            machine.copy_shared4(at + begin, source, place, exists)
    for begin in range(0, words, 4 * products.THREADS):
        place = machine.thread * 4 + begin
        machine.copy_shared4(place + shape.factors, machine.row(norm, 0, words), place, place < words)
    machine.commit_copies()
    matrix = machine.row(router, 0, shape.experts * words)
    load = functools.partial(machine.load_global_now, size=4)
    product = TileProduct(machine, matrix, rank * EXPERTS, shape.size, load)
    (flag,) = machine.load_global_now(machine.row(flags, 0, shape.rows), row, 1)
    machine.barrier()  # ptxas would wait for the copies in the midst of the loads.
    machine.wait_copies(0)
    machine.barrier()

    with machine.when(exists):
        given, added = ([machine.load_shared_vector(at + i, 4) for at in held_at] for i in (0, shape.updates))
        factors = [machine.load_shared_vector(place + shape.factors, 4) for place in places]
        sums = [products.add_bfloat16(machine, *pair) for pair in zip(given, added, strict=True)]
        own = products.normalise_token(machine, sums, factors, shape.size, float_bits(shape.eps))
        for at, four, scaled in zip(held_at, sums, own, strict=True):
            machine.store_shared_vector(at + shape.updates, four)
            machine.store_shared_vector(at, scaled)
    machine.barrier()
    product.share(product.sums(0, pitch), shape.sums)
    machine.barrier()

    send_logits(machine, product, token, owner, rank, shape)
    held = [machine.load_shared_vector(at, 4) for at in held_at]
    machine.cluster_barrier()
    with machine.when(exists if shape.sorts else exists & stores):
        with machine.when(stores):
            # Not before: the barrier would wait for the stores.
            sums = [machine.load_shared_vector(at + shape.updates, 4) for at in held_at]
            store_token(machine, machine.row(y, row, words), places, sums)
            store_token(machine, machine.row(normed, row, words), places, held)
        chosen, found = choose_experts(machine, token * shape.experts + shape.logits, shape)
        mine = machine.lane < shape.top_k
        at = machine.lane.min(shape.top_k - 1)
        machine.store_global_where(machine.row(experts, row, shape.top_k), at, chosen, mine & stores)
        here, number = own_expert(machine, flag, chosen, shape.own)
        found = machine.select(here, found, 0)
        machine.store_global_where(machine.row(weights, row, shape.top_k), at, found, mine & stores)
        if shape.sorts:
            index = token * shape.top_k + machine.lane
            with machine.when(mine):
                key = row_key(machine, here, number, index, shape.order.groups)
                machine.store_shared(index + shape.key_words, key)
    if shape.sorts:
        machine.barrier()
        sort_tokens(machine, sorted_rows, token, rank, places, held, shape)


def send_logits(machine, product, token, owner, rank, shape):
    """Sends what this block has of the token's logits to every block that chooses for it."""
    output = machine.lane & EXPERTS - 1
    logit = product.total(shape.sums, token, output)
    at = token * shape.experts + rank * EXPERTS + output + shape.logits
    if not shape.sorts:
        with machine.when(machine.lane < EXPERTS):
            machine.store_peer(at, owner, logit)
        return
    # Half of the lanes send to half of the blocks each. A block that is alone gets the same word from both.
    each = max(1, shape.cluster // 2)
    to = (machine.lane >> 4) * (each if shape.cluster > 1 else 0)
    for i in range(each):
        machine.store_peer(at, to + i, logit)


def store_token(machine, out, places, held):
    """Stores a token, of which a lane has the words of some places."""
    for place, four in zip(places, held, strict=True):
        machine.store_global4(out, place, four)


def sort_tokens(machine, results, token, rank, places, held, shape):
    """Stores `results`, the rows by expert: all blocks know all keys, and each takes slots and experts of its own."""
    (rows, row_of, group_sizes), keys = results, []
    for begin in range(0, shape.keys, 32):
        index = machine.lane + begin
        key = machine.load_shared(index.min(shape.keys - 1) + shape.key_words)
        keys.append(machine.select(index < shape.keys, key, NO_KEY))
    first_lane = machine.lane.eq(0)
    with machine.when(token < shape.rows):
        for turn in range(0, shape.top_k, shape.cluster):
            slot = rank + turn
            with machine.when(slot < shape.top_k):
                key = machine.load_shared(token * shape.top_k + slot + shape.key_words)
                place = place_of(machine, keys, key)
                store_token(machine, machine.row(rows, place, shape.size // 2), places, held)
                machine.store_global_where(machine.row(row_of, token, shape.top_k), slot, place, first_lane)
    each = EXPERTS // products.WARPS
    expert = rank * EXPERTS + machine.warp * each
    sizes = [group_size(machine, keys, expert + i) for i in range(each)]
    groups = shape.order.groups
    with machine.when(first_lane if shape.own is None else first_lane & (expert < groups)):
        machine.store_global_pair(machine.row(group_sizes, 0, groups), expert, *sizes)


def choose_experts(machine, start, shape):
    """Softmax of a token's logits in shared memory from `start` on, and its best experts; a warp runs this.

    Lane i gets the expert that is the i-th, and its weight.
    """
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
    return chosen, found
