"""The union of the selections of neighbouring queries, on Hopper GPUs (Pallas Mosaic GPU).

A cluster of blocks works on a group of 16 queries. Each block keeps a halfword of shared memory for every position of
its part of the context, and sets the bits of the queries that select the position: with atomic operations from lists of
positions, and by transposing from bitmaps. Then the blocks exchange their numbers of selected positions, and write the
selected positions: first those that only the first 8 queries select, then those that only the other 8 select, then
those of both. The first two parts are whole steps of attention. What is left of them begins the third.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.simt import Value, count_before, warp_scan
from pallas_kernels.sparse_attention.mosaic_gpu.gather import GROUP, STEP

THREADS = 1024
# Addresses in shared memory, in words.
COUNTS, BITS = 0, 128
_CHUNK = 256  # Positions that a warp handles together: 8 per lane.
_MAX_WORDS = 49_152
_BATCH = 8
_FIELD = 10
"""Bits of a count where three share a word. It is at most the 256 positions of a chunk, or those of a lane."""


def union_body(
    machine,
    indices,
    page_table,
    slots,
    members,
    counts,
    index,
    rank,
    *,
    size,
    top_k,
    **how,
):
    """Runs in each thread: writes the union of group `index`. `rank` is the block's number in the cluster.

    `how` is passed to `_write`.
    """
    index, rank = machine.word(index), machine.word(rank)
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
    longest = machine.load_shared(machine.lane.min(machine.threads // 32 - 1) + COUNTS)
    chunks, first = _part(machine, machine.warp_max(longest).min(size), rank)
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
    refs = page_table, slots, members, counts
    _write(machine, *refs, index, rank, first, chunks, size=size, **how)


def bits_body(
    machine,
    bits,
    reach,
    page_table,
    slots,
    members,
    counts,
    index,
    rank,
    *,
    size,
    width,
    **how,
):
    """As `union_body`, from the queries' bitmaps of `width` words; see `unions_of_bits`."""
    index, rank = machine.word(index), machine.word(rank)
    end = machine.load_global(machine.row(reach, index, 1), 0).min(size)
    chunks, first = _part(machine, end, rank)
    words = machine.row(bits, index, GROUP * width)

    def mark(i):
        at = (first >> 5) + i
        inside = at * 32 < end
        own = [machine.load_global(words, at.min(width - 1) + query * width) for query in range(GROUP)]
        columns = _transpose([machine.select(inside, word, 0) for word in own])
        for half in range(2):
            own = [column >> 16 * half & 0xFFFF for column in columns]
            pairs = [low | high << 16 for low, high in zip(own[::2], own[1::2], strict=True)]
            machine.store_shared_vector(i * 16 + (BITS + 8 * half), pairs)

    machine.loop(machine.thread, chunks * (_CHUNK // 32), machine.threads, mark)
    machine.barrier()
    refs = page_table, slots, members, counts
    _write(machine, *refs, index, rank, first, chunks, size=size, **how)


def _part(machine, longest, rank):
    """The chunks of each block of a cluster that works on `longest` positions, and this block's first position."""
    chunks = (longest + (_CHUNK * machine.cluster - 1)) // (_CHUNK * machine.cluster)
    return chunks, rank * chunks * _CHUNK


def _transpose(words):
    """Bits of 16 words: bit j of the low half of word i goes to bit i of the low half of word j; high halves too."""
    words = list(words)
    for distance, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        for i in range(16):
            if not i & distance:
                differ = (words[i] >> distance ^ words[i + distance]) & mask
                words[i + distance] = words[i + distance] ^ differ
                words[i] = words[i] ^ (differ << distance)
    return words


def _write(
    machine,
    page_table,
    slots,
    members,
    counts,
    index,
    rank,
    first,
    chunks,
    *,
    size,
    limit,
    page_size,
    table_groups,
    split,
):
    """Writes the lists of a group from the bits of this block's chunks, which begin at position `first`.

    Each row of the page table serves `table_groups` groups. `split` is that of `build_unions`.
    """
    warps = machine.threads // 32
    each = (chunks + (warps - 1)) // warps
    begin = (machine.warp * each).min(chunks)
    end = (begin + each).min(chunks)

    def selected(chunk):
        """Which of a lane's 8 positions the first 8 queries select, and which the other 8: bit i is for position i."""
        flags = machine.word(0)
        # A byte that is not 0 sets its highest bit when 127 is added to its lower ones, or has it.
        for i, word in enumerate(machine.load_shared_vector((chunk * 32 + machine.lane) * 4 + BITS, 4)):
            bytes_in_use = ((word & 0x7F7F7F7F) + 0x7F7F7F7F | word) >> 7 & 0x01010101
            flags = flags | ((bytes_in_use | bytes_in_use >> 15) & 0x0303) << 2 * i
        halves = flags & 0xFF, flags >> 8
        return halves if split else (halves[0] | halves[1],) * 2

    def in_parts(first, other):
        """The numbers of positions of each part in one word."""
        both = first & other
        parts = machine.bit_count(first ^ both), machine.bit_count(other ^ both), machine.bit_count(both)
        return parts[0] | parts[1] << _FIELD | parts[2] << 2 * _FIELD

    def three(word):
        mask = (1 << _FIELD) - 1
        return [word & mask, word >> _FIELD & mask, word >> 2 * _FIELD]

    [count] = machine.loop(begin, end, 1, lambda chunk, count: [count + in_parts(*selected(chunk))], [0])
    before, totals = count_before(machine, three(count), COUNTS, rank)
    only_first, only_other, _ = totals
    first_steps, other_steps = only_first // STEP * STEP, only_other // STEP * STEP
    starts = [machine.word(0), first_steps, only_first + only_other]
    # What is left of a part lies further behind: after all steps, and that of the second after that of the first.
    ends = [first_steps, first_steps + other_steps, machine.word(0)]
    moved = [other_steps, only_first - first_steps, machine.word(0)]
    slot_row, member_row = (machine.row(ref, index, limit) for ref in (slots, members))
    pages = size // page_size
    table = machine.row(page_table, index // table_groups, pages)

    def slot_of(position):
        page = machine.load_global(table, (position // page_size).min(pages - 1))
        return page * page_size + position - position // page_size * page_size

    def write(chunk, *bases):
        lane_first = chunk * 32 + machine.lane
        position, halves = first + lane_first * 8, selected(chunk)
        own = in_parts(*halves)
        slot = slot_of(position) if page_size % 8 == 0 else None

        def write_lowest(left, earlier):
            lowest = left & (machine.word(0) - left)
            i = machine.word(31) - machine.leading_zeros(lowest)
            in_first, in_other = ((half & lowest).ne(0) for half in halves)

            def by_part(only_first, only_other, both):
                return machine.select(in_first & in_other, both, machine.select(in_first, only_first, only_other))

            field = by_part(0, _FIELD, 2 * _FIELD)
            at = by_part(*bases) + (earlier >> field & ((1 << _FIELD) - 1))
            at = at + machine.select(at >= by_part(*ends), by_part(*moved), 0)
            members_of = machine.load_shared(lane_first * 4 + (i >> 1) + BITS) >> (i & 1) * 16 & 0xFFFF
            with machine.when(at < limit):
                machine.store_global(slot_row, at, slot_of(position + i) if slot is None else slot + i)
                machine.store_global(member_row, at, members_of)
            return [left ^ lowest, earlier + (machine.word(1) << field)]

        selects = [halves[0] | halves[1], warp_scan(machine, own) - own]
        machine.while_loop(lambda left, earlier: left.ne(0), write_lowest, selects)
        return [base + own for base, own in zip(bases, three(machine.warp_sum(own)), strict=True)]

    machine.loop(begin, end, 1, write, [start + own for start, own in zip(starts, before, strict=True)])
    with machine.when(machine.thread.eq(0) & rank.eq(0)):
        rest = functools.reduce(Value.__add__, totals) - first_steps - other_steps
        for i, count in enumerate([first_steps, other_steps, rest]):
            machine.store_global(machine.row(counts, index, 3), i, count)


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


def _launch(body, *arrays, page_table, page_size, limit, split):
    """Runs a body for each group. The last array has a row for each; the rest is as for `build_unions`."""
    groups, size = len(arrays[-1]), page_table.shape[1] * page_size
    cluster, words = union_plan(groups, size)
    how = {"size": size, "limit": limit, "page_size": page_size, "split": split}
    body = functools.partial(body, table_groups=groups // len(page_table), **how)
    keys = jax.ShapeDtypeStruct((groups, limit), jnp.int32)
    out_type = (keys, keys, jax.ShapeDtypeStruct((groups, 3), jnp.int32))
    return launch(body, out_type, groups, cluster, THREADS, words)(*arrays, page_table)


def build_unions(
    indices: jax.Array, page_table: jax.Array, *, page_size: int, limit: int, split: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The keys that at least one query of a group of 16 neighbours selects, and the queries that select each key.

    Args:
      indices: int32 `[b, t, top_k]`, the positions that a query selects, in any order; -1 is ignored. t is a multiple
        of 16.
      page_table: int32 `[b, m]`.
      page_size: positions of one page.
      limit: most keys of one group; `16 * top_k` is always enough. Further keys are dropped.
      split: whether keys that only the first 8 queries of a group select, or only the other 8, are parts of their own.

    Returns:
      slots int32 `[b * t / 16, limit]`, rows of the flattened pages;
      members int32 `[b * t / 16, limit]`, bit i is set if query i of the group selects the key;
      counts int32 `[b * t / 16, 3]`, the numbers of keys in three parts of a group's list, before any are dropped.
      Only the first 8 queries select keys of the first part, and only the other 8 those of the second. The lengths of
      both are multiples of 128. The third part has all other keys: up to 127 of the first 8 queries, up to 127 of the
      other 8, then those of both. Without `split` it has all keys. Each of these is in the order of positions.
      Entries of slots and members behind the last part are undefined.

    Raises:
      NotImplementedError: t is no multiple of 16, or the context is too long.
    """
    batch, queries, top_k = indices.shape
    if queries % GROUP:
        raise NotImplementedError(f"the number of queries must be a multiple of {GROUP}")
    groups = batch * queries // GROUP
    body, lists = functools.partial(union_body, top_k=top_k), indices.reshape(groups, -1)
    return _launch(body, lists, page_table=page_table, page_size=page_size, limit=limit, split=split)


def unions_of_bits(
    bits: jax.Array, reach: jax.Array, page_table: jax.Array, *, page_size: int, limit: int, split: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The lists of `build_unions` from bitmaps.

    Args:
      bits: int32 `[t, w]`, a bitmap for each query, t a multiple of 16; bit i of word j is for position `32 * j + i`.
      reach: int32 `[t / 16]`, the number of positions that a group sees. Bits from there to the next multiple of 32 are
        0, and words behind are not used.
      page_table: int32 `[b, m]`; t is a multiple of 16 * b.
      page_size, limit, split: as for `build_unions`.

    Raises:
      NotImplementedError: the context is too long.
    """
    body = functools.partial(bits_body, width=bits.shape[1])
    return _launch(body, bits, reach, page_table=page_table, page_size=page_size, limit=limit, split=split)
