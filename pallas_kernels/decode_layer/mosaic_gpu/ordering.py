"""Rows of tokens by their experts: the keys that rows are sorted by, and a launch that sorts those of many tokens.

A row's key is its expert, and behind it the number of the token and its slot. So no two are equal, and a row's place is
the number of smaller keys. In the launch a block takes a token and a thread 8 neighbouring numbers of it. Every block
reads all keys, and they share the places and the sizes of groups with no word to each other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.decode_layer.mosaic_gpu.products import THREADS, WARPS
from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.tensor_machine import TensorMachine

MOST_KEYS = 2048
"""At most these rows are sorted."""
NO_KEY = 0xFFFFFFFF
"""Is above all keys, and of no expert."""


@dataclasses.dataclass(frozen=True)
class OrderShape:
    """The sizes of a launch: tokens, inputs, experts, those that a token has, and those that are here if not all."""

    rows: int
    size: int
    experts: int
    top_k: int
    own: int | None

    @property
    def groups(self) -> int:
        """Experts that are here."""
        return self.experts if self.own is None else self.own

    @property
    def keys(self) -> int:
        return self.rows * self.top_k

    @property
    def places(self) -> int:
        """Where shared memory holds the places of the token's rows. Before it are the keys, a few for each thread."""
        return -(-self.keys // THREADS) * THREADS

    @property
    def words(self) -> int:
        return self.places + -(-self.top_k // 4) * 4


def order(normed: jax.Array, experts: jax.Array, flags: jax.Array, shape: OrderShape) -> tuple[jax.Array, ...]:
    """Gives `rows`, `row_of` and `group_sizes` of `api.Routed` in one launch, with flags of tokens as `own_expert`."""
    out_type = (
        jax.ShapeDtypeStruct((shape.keys, shape.size), normed.dtype),
        jax.ShapeDtypeStruct(experts.shape, jnp.int32),
        jax.ShapeDtypeStruct((shape.groups,), jnp.int32),
    )
    body = functools.partial(order_body, shape=shape)
    launched = launch(body, out_type, shape.rows, 1, THREADS, shape.words, machine_type=TensorMachine)
    return tuple(launched(normed, experts, flags))


def order_body(machine, normed, experts, flags, rows, row_of, group_sizes, block, rank, *, shape):
    """Runs in each thread of block number `block`, which is that of its token."""
    del rank
    token, words, last = machine.word(block), shape.size // 2, shape.keys - 1
    chosen, flags = machine.row(experts, 0, shape.keys), machine.row(flags, 0, shape.rows)
    indices = [machine.thread + begin for begin in range(0, shape.places, THREADS)]
    # All loads are on their way together.
    found = []
    for index in indices:
        near = index.min(last)
        found += machine.load_global_now(chosen, near, 1), machine.load_global_now(flags, near // shape.top_k, 1)
    # Threads behind the last number load that one's words, and store nothing.
    there, at = machine.thread < words // 4, (machine.thread * 4).min(words - 4)
    held = machine.load_global_now(machine.row(normed, token, words), at, 4)
    for index, (expert,), (flag,) in zip(indices, found[::2], found[1::2], strict=True):
        key = row_key(machine, *own_expert(machine, flag, expert, shape.own), index, shape.groups)
        machine.store_shared(index, machine.select(index <= last, key, NO_KEY))
    machine.barrier()

    starts = range(0, shape.places, 128)
    keys = [key for start in starts for key in machine.load_shared_vector(machine.lane * 4 + start, 4)]
    slots = [machine.warp + turn for turn in range(0, shape.top_k, WARPS)]
    own = []
    for slot in slots:
        # Warps without a slot count for the last one again.
        near = slot.min(shape.top_k - 1)
        own.append(place_of(machine, keys, machine.load_shared(token * shape.top_k + near)))
        machine.store_shared(near + shape.places, own[-1])
    machine.barrier()
    places = [place for i in range(shape.places, shape.words, 4) for place in machine.load_shared_vector(i, 4)]
    with machine.when(there):
        for place in places[: shape.top_k]:
            machine.store_global4(machine.row(rows, place, words), at, held)

    # While the rows are stored, warps count groups.
    first_lane = machine.lane.eq(0)
    for slot, place in zip(slots, own, strict=True):
        stores = first_lane & (slot < shape.top_k)
        machine.store_global_where(machine.row(row_of, token, shape.top_k), slot, place, stores)
    for turn in range(0, shape.groups, WARPS * shape.rows):
        expert = machine.warp * shape.rows + token + turn
        stores = first_lane & (expert < shape.groups)
        size = group_size(machine, keys, expert)
        machine.store_global_where(machine.row(group_sizes, 0, shape.groups), expert, size, stores)


def own_expert(machine, flag, expert, own):
    """Whether an expert of a token is here, and its number among those that are.

    Args:
      flag: 0 if the token is not valid. If not all experts are here, it is otherwise the first one's number and 1.
      own: how many are here; None for all.
    """
    if own is None:
        return flag.ne(0), expert
    number = expert - (flag - 1)
    return flag.ne(0) & (number < own), number


def row_key(machine, here, expert, index, groups):
    """The key of row number `index`; those of experts that are not here are behind all `groups`."""
    return machine.select(here, expert, groups) * MOST_KEYS + index


def place_of(machine, keys, key):
    """How many of the keys that a warp's lanes have are below a key."""
    return _count(machine, [other < key for other in keys])


def group_size(machine, keys, expert):
    """How many of the keys that a warp's lanes have are of an expert."""
    return _count(machine, [(key // MOST_KEYS).eq(expert) for key in keys])


def _count(machine, conditions):
    ones = [machine.select(condition, 1, 0) for condition in conditions]
    return machine.warp_sum(functools.reduce(lambda a, b: a + b, ones))
