"""What neighbouring rows select together, on Hopper GPUs (Pallas Mosaic GPU).

`build_unions` reads the scores of a group of rows once more, at the same positions in all of them. A warp owns a run of
positions, keeps their membership bits in shared memory, and after the blocks of the cluster have exchanged their counts
writes what is selected by at least one row to its place. `select_topk` is the same with groups of one row.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.select_topk.thresholds import HIGHEST, check_scores
from pallas_kernels.simt import Value, launch

# Shared memory, in words.
ROWS, WARP_COUNTS, BLOCK_COUNT, BITS = 0, 64, 96, 128


def union_body(
    machine,
    scores,
    thresholds,
    last_ties,
    lengths,
    positions,
    members,
    counts,
    index,
    rank,
    *,
    rows,
    size,
    group,
    limit,
):
    """Writes what rows `index * group` to `index * group + group - 1` select; `members` is None to leave it out."""
    unroll = 16 // group if group > 1 else 8
    chunk, words = 128 * unroll, unroll * 4 * group // 32
    warps = machine.threads // 32
    index, rank = machine.word(index), machine.word(rank)
    with machine.when(machine.thread < group):
        at = index * group + machine.thread
        machine.store_shared_vector(
            machine.thread * 4 + ROWS,
            [machine.load_global(machine.row(ref, 0, rows), at) for ref in (thresholds, last_ties, lengths)]
            + [machine.word(0)],
        )
    machine.barrier()
    longest = functools.reduce(Value.max, (machine.load_shared(ROWS + 4 * r + 2) for r in range(group)))
    chunks = (longest + (chunk - 1)) // chunk
    each = (chunks + (machine.cluster * warps - 1)) // (machine.cluster * warps)
    most = math.ceil(math.ceil(size / chunk) / (machine.cluster * warps))
    begin = ((rank * warps + machine.warp) * each).min(chunks)
    end = (begin + each).min(chunks)
    pointers = [machine.row(scores, index * group + r, size) for r in range(group)]

    def bits_at(i):
        return (((i - begin) + machine.warp * most) * 32 + machine.lane) * words + BITS

    def mark(i, count):
        first = i * chunk + machine.lane * 4
        packed = [machine.word(0)] * words
        pairs = [(u, r) for u in range(unroll) for r in range(group)]
        # A read past the end of a row becomes one of its last scores, which its length then hides.
        loaded = [machine.load_global4(pointers[r], (first + u * 128).min(size - 4)) for u, r in pairs]
        for (u, r), scores in zip(pairs, loaded, strict=True):
            threshold, last, length, _ = machine.load_shared_vector(ROWS + 4 * r, 4)
            for j, score in enumerate(scores):
                position, bit = first + (u * 128 + j), (u * 4 + j) * group + r
                chosen = machine.compare_floats("gt", score, threshold) | (
                    machine.compare_floats("eq", score, threshold) & (position <= last)
                )
                packed[bit // 32] = packed[bit // 32] | machine.select(chosen & (position < length), 1 << bit % 32, 0)
        for bit in range(0, unroll * 4 * group, group):
            any_row = packed[bit // 32] & ((1 << group) - 1 << bit % 32)
            count = count + machine.select(any_row.ne(0), 1, 0)
        return packed, count

    def mark_and_keep(i, count):
        packed, count = mark(i, count)
        machine.store_shared_vector(bits_at(i), packed)
        return [count]

    [count] = machine.loop(begin, end, 1, mark_and_keep, [0])
    count = machine.warp_sum(count)
    with machine.when(machine.lane.eq(0)):
        machine.store_shared(machine.warp + WARP_COUNTS, count)
    machine.barrier()
    count = machine.load_shared(machine.lane.min(warps - 1) + WARP_COUNTS)
    before = machine.warp_sum(machine.select(machine.lane < machine.warp.min(warps), count, 0))
    total = machine.warp_sum(machine.select(machine.lane < warps, count, 0))
    if machine.cluster > 1:
        machine.store_shared(BLOCK_COUNT, total)
        machine.cluster_barrier()
        count = machine.load_peer(BLOCK_COUNT, machine.lane.min(machine.cluster - 1))
        before = before + machine.warp_sum(machine.select(machine.lane < rank, count, 0))
        total = machine.warp_sum(machine.select(machine.lane < machine.cluster, count, 0))
        machine.cluster_barrier()
    position_row = machine.row(positions, index, limit)
    member_row = None if members is None else machine.row(members, index, limit)

    def write(i, base):
        packed = machine.load_shared_vector(bits_at(i), words)
        for u in range(unroll):
            selected = []
            for j in range(4):
                bit = (u * 4 + j) * group
                selected.append(packed[bit // 32] >> bit % 32 & (1 << group) - 1)
            own = functools.reduce(Value.__add__, (machine.select(word.ne(0), 1, 0) for word in selected))
            inclusive = own
            for distance in (1, 2, 4, 8, 16):
                lower = machine.shuffle_up(inclusive, distance)
                inclusive = inclusive + machine.select(machine.lane >= distance, lower, 0)
            at = base + inclusive - own
            for j, word in enumerate(selected):
                with machine.when(word.ne(0) & (at < limit)):
                    machine.store_global(position_row, at, i * chunk + machine.lane * 4 + (u * 128 + j))
                    if members is not None:
                        machine.store_global(member_row, at, word)
                at = at + machine.select(word.ne(0), 1, 0)
            base = base + machine.warp_sum(own)
        return [base]

    machine.loop(begin, end, 1, write, [before])

    def fill(at):
        machine.store_global(position_row, at, HIGHEST if members is None else 0)
        if members is not None:
            machine.store_global(member_row, at, 0)

    machine.loop(total + rank * machine.threads + machine.thread, limit, machine.cluster * machine.threads, fill)
    if counts is not None:
        with machine.when(machine.thread.eq(0) & rank.eq(0)):
            machine.store_global(machine.row(counts, 0, rows // group), index, total)


def union_cluster(groups, group, size, cluster, threads):
    """Blocks per group of rows, and the words of shared memory each needs."""
    cluster = cluster or next((c for c in (1, 2, 4) if groups * c >= 128 and size * group <= c << 20), 8)
    chunk = 128 * (16 // group if group > 1 else 8)
    most = math.ceil(math.ceil(size / chunk) / (cluster * threads // 32))
    words = BITS + threads * most * (chunk // 32 * group // 32)
    if words * 4 > 200_000:
        raise NotImplementedError("rows are too long for the membership bits to fit shared memory")
    return cluster, words


def build_unions(
    scores: jax.Array,
    threshold: jax.Array,
    last_tie: jax.Array,
    lengths: jax.Array,
    *,
    group: int = 16,
    limit: int = 32768,
    threads: int = 512,
    cluster: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The positions that at least one of `group` neighbouring rows selects, and which rows select each.

    Args:
      scores: float32 `[rows, size]`, rows a multiple of `group`.
      threshold, last_tie: from `select_threshold`, `[rows]`.
      lengths: int32 `[rows]`.
      group: 2, 4, 8 or 16.
      limit: room for positions; `group * k` is always enough. Positions beyond it are dropped.

    Returns:
      positions int32 `[rows / group, limit]`, ascending; members int32, same shape, bit i set where row i of the group
      selects the position; both 0 behind the counts. counts int32 `[rows / group]`.
    """
    check_scores(scores)
    rows, size = scores.shape
    if group not in (2, 4, 8, 16) or rows % group:
        raise NotImplementedError("group must be 2, 4, 8 or 16 and divide the number of rows")
    cluster, words = union_cluster(rows // group, group, size, cluster, threads)
    body = functools.partial(union_body, rows=rows, size=size, group=group, limit=limit)
    entries = jax.ShapeDtypeStruct((rows // group, limit), jnp.int32)
    out_type = (entries, entries, jax.ShapeDtypeStruct((rows // group,), jnp.int32))
    return launch(body, out_type, rows // group, cluster, threads, words)(scores, threshold, last_tie, lengths)
