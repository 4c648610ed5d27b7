"""The union of the selections of neighbouring queries, on Hopper GPUs (Pallas Mosaic GPU).

A cluster of blocks works on a group of 16 queries. Each block keeps a halfword of shared memory for every position of
its part of the context, and sets the bits of the queries that select the position. Then the blocks exchange their
numbers of selected positions, and write the selected positions in order.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.simt import Value, count_before, warp_scan
from pallas_kernels.sparse_attention.mosaic_gpu.gather import GROUP

THREADS = 1024
# Addresses in shared memory, in words.
COUNTS, BITS = 0, 64
_CHUNK = 256  # Positions that a warp handles together: 8 per lane.
_MAX_WORDS = 49_152
_BATCH = 8


def union_body(
    machine, indices, page_table, slots, members, counts, index, rank, *, size, top_k, limit, page_size, table_groups
):
    """Runs in each thread: writes the union of group `index`. `rank` is the block's number in the cluster.

    Each row of the page table serves `table_groups` groups.
    """
    index, rank = machine.word(index), machine.word(rank)
    warps = machine.threads // 32
    lists = machine.row(indices, index, GROUP * top_k)
    width = 4 if top_k % 4 == 0 else 1
    entries = GROUP * top_k // width

    def visit_lists(visit, carry=()):
        """`carry = visit(query, positions, exists, *carry)` over all lists, `width` positions at a time."""

        def visit_batch(first, *carry):
            ats = [first + i * machine.threads for i in range(_BATCH)]
            inside = [at.min(entries - 1) * width for at in ats]
            if width == 4:
                batch = [machine.load_global4(lists, at) for at in inside]
            else:
                batch = [[machine.load_global(lists, at)] for at in inside]
            for at, entry, positions in zip(ats, inside, batch, strict=True):
                carry = visit(entry // top_k, positions, at < entries, *carry) or ()
            return carry

        return machine.loop(machine.thread, entries, _BATCH * machine.threads, visit_batch, carry)

    def highest(query, positions, exists, longest):
        return [functools.reduce(Value.max, [position + 1 for position in positions], longest)]  # -1 + 1 is 0.

    [longest] = visit_lists(highest, [0])
    longest = machine.warp_max(longest)
    with machine.when(machine.lane.eq(0)):
        machine.store_shared(machine.warp + COUNTS, longest)
    machine.barrier()
    longest = machine.warp_max(machine.load_shared(machine.lane.min(warps - 1) + COUNTS)).min(size)
    chunks = (longest + (_CHUNK * machine.cluster - 1)) // (_CHUNK * machine.cluster)
    first = rank * chunks * _CHUNK
    zeros = [machine.word(0)] * 4
    machine.loop(
        machine.thread,
        chunks * (_CHUNK // 8),
        machine.threads,
        lambda i: machine.store_shared_vector(i * 4 + BITS, zeros),
    )
    machine.barrier()

    def mark(query, positions, exists):
        for position in positions:
            at = position - first
            bit = machine.word(1) << (query + (at & 1) * 16)
            machine.or_shared_where((at >> 1) + BITS, bit, exists & (at < chunks * _CHUNK))

    visit_lists(mark)
    machine.barrier()
    each = (chunks + (warps - 1)) // warps
    begin = (machine.warp * each).min(chunks)
    end = (begin + each).min(chunks)

    def members_of(chunk):
        words = machine.load_shared_vector((chunk * 32 + machine.lane) * 4 + BITS, 4)
        return [half for word in words for half in (word & 0xFFFF, word >> 16)]

    def selected(halves):
        return functools.reduce(Value.__add__, (machine.select(half.ne(0), 1, 0) for half in halves))

    [count] = machine.loop(begin, end, 1, lambda chunk, count: [count + selected(members_of(chunk))], [0])
    base, total = count_before(machine, count, COUNTS, rank)
    slot_row, member_row = (machine.row(ref, index, limit) for ref in (slots, members))
    pages = size // page_size
    table = machine.row(page_table, index // table_groups, pages)

    def slot_of(position):
        page = machine.load_global(table, (position // page_size).min(pages - 1))
        return page * page_size + position - position // page_size * page_size

    def write(chunk, base):
        halves = members_of(chunk)
        own = selected(halves)
        through = base + warp_scan(machine, own)
        at, position = through - own, first + (chunk * 32 + machine.lane) * 8
        slot = slot_of(position) if page_size % 8 == 0 else None
        for i, half in enumerate(halves):
            with machine.when(half.ne(0) & (at < limit)):
                machine.store_global(slot_row, at, slot_of(position + i) if slot is None else slot + i)
                machine.store_global(member_row, at, half)
            at = at + machine.select(half.ne(0), 1, 0)
        return [base + machine.warp_sum(own)]

    machine.loop(begin, end, 1, write, [base])
    with machine.when(machine.thread.eq(0) & rank.eq(0)):
        machine.store_global(machine.row(counts, index, 1), 0, total)


def union_plan(groups: int, size: int) -> tuple[int, int]:
    """Blocks per group, and words of shared memory per block.

    Raises:
      NotImplementedError: the context is too long.
    """

    def words(cluster: int) -> int:
        return math.ceil(size / (_CHUNK * cluster)) * _CHUNK // 2

    cluster = next((c for c in (1, 2, 4) if groups * c >= 128 and words(c) <= 2**15), 8)
    if words(cluster) > _MAX_WORDS:
        raise NotImplementedError(f"contexts of {size} positions are too long for unions of selections")
    return cluster, BITS + words(cluster)


def build_unions(
    indices: jax.Array, page_table: jax.Array, *, page_size: int, limit: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The keys that at least one query of a group of 16 neighbours selects, and the queries that select each key.

    Args:
      indices: int32 `[b, t, top_k]`, the positions that a query selects, in any order; -1 is ignored. t is a multiple
        of 16.
      page_table: int32 `[b, m]`.
      page_size: positions of one page.
      limit: most keys of one group; `16 * top_k` is always enough. Further keys are dropped.

    Returns:
      slots int32 `[b * t / 16, limit]`, rows of the flattened pages in the order of their positions;
      members int32 `[b * t / 16, limit]`, bit i is set if query i of the group selects the key;
      counts int32 `[b * t / 16]`, the number of keys before any are dropped.
      Entries of slots and members from a group's count on are undefined.

    Raises:
      NotImplementedError: t is no multiple of 16, or the context is too long.
    """
    batch, queries, top_k = indices.shape
    if queries % GROUP:
        raise NotImplementedError(f"the number of queries must be a multiple of {GROUP}")
    groups, size = batch * queries // GROUP, page_table.shape[1] * page_size
    cluster, words = union_plan(groups, size)
    body = functools.partial(
        union_body, size=size, top_k=top_k, limit=limit, page_size=page_size, table_groups=groups // batch
    )
    keys = jax.ShapeDtypeStruct((groups, limit), jnp.int32)
    out_type = (keys, keys, jax.ShapeDtypeStruct((groups,), jnp.int32))
    return launch(body, out_type, groups, cluster, THREADS, words)(indices.reshape(groups, -1), page_table)
