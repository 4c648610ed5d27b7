"""Exact selection on Hopper GPUs (Pallas Mosaic GPU).

`few_rows` holds a row in the registers of a cluster. `row_selection` reads rows part by part. Where registers hold no
more than short rows, the length of each row decides.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.hopper import MULTIPROCESSORS
from pallas_kernels.gpu.machine import SHARED_WORDS, launch
from pallas_kernels.select_topk.mosaic_gpu.few_rows import WORDS as HELD_WORDS
from pallas_kernels.select_topk.mosaic_gpu.few_rows import HeldRow, HeldRowPlan, few_rows_plan, select_few_rows
from pallas_kernels.select_topk.mosaic_gpu.row_reader import RowPlan, row_length, write_all_bits, write_short_row
from pallas_kernels.select_topk.mosaic_gpu.row_selection import RowSelection

_MAX_K = 4096
"""Largest k that the kernels take."""

_STEP = 128
"""Bitmaps are written up to a multiple of this number of positions."""

_SMALL_TEAMS_SIZE = 32_768
"""Most scores of a row for which four teams of 256 threads share a block that writes bitmaps."""

_SHORT_CHUNKS = 4
"""Loads of four scores by each thread that hold a short row: up to 32,768 scores in a cluster of four blocks.

More hold longer rows, and take all of them longer.
"""


def row_body(machine, scores, lengths, positions, row, rank, *, rows, plan, short=None):
    """Runs in each thread: selects row `row`. `rank` is the block's number in its cluster.

    Args:
      short: the plan by which a cluster holds rows of up to its size, if it does.
    """
    row, rank = machine.word(row), machine.word(rank)
    length = row_length(machine, lengths, row, rows, plan.size)
    out = machine.row(positions, row, plan.k)
    if machine.teams > 1:
        with machine.when(machine.team.eq(1) & machine.turn.eq(0)):
            machine.delay(length // 4)
    with machine.when(length <= plan.k):
        write_short_row(machine, out, length, rank, plan.k)
    own = machine.row(scores, row, plan.size)
    if short is not None:
        with machine.when((length > plan.k) & (length <= short.size)):
            held = HeldRow(machine, own, length, rank, short)
            held.write(out, *held.find())
    with machine.when(length > (plan.k if short is None else max(plan.k, short.size))):
        selection = RowSelection(machine, own, length, rank, plan)
        selection.write(out, *selection.find())


def bits_body(machine, scores, lengths, reach, bits, row, rank, *, rows, groups, plan, width):
    """As `row_body`, but writes bitmaps, see `select_bits`. A block has whole rows."""
    row = machine.word(row)
    # No bound is told here: where a row can be no longer than one turn, ptxas would keep more in memory.
    length = machine.load_global(machine.row(lengths, 0, rows), row)
    out = machine.row(bits, row, width)

    def words():
        """Words of the row. They are read where they are needed, and take no register until then."""
        longest = machine.load_global(machine.row(reach, 0, groups), row // (rows // groups))
        return (longest + (_STEP - 1)) // _STEP * (_STEP // 32)

    if machine.teams > 1:
        with machine.when(machine.team.eq(1) & machine.turn.eq(0)):
            machine.delay(length // 4)
    with machine.when(length <= plan.k):
        write_all_bits(machine, out, length, words())
    with machine.when(length > plan.k):
        selection = RowSelection(machine, machine.row(scores, row, plan.size), length, rank, plan)
        found = selection.find()
        selection.write_bits(out, words(), *found)


def make_plan(rows: int, size: int, k: int, cluster: int | None = None) -> tuple[RowPlan, int]:
    """The plan for `rows` rows, and the number of rows that a block works on at once.

    Raises:
      NotImplementedError: shared memory is too small for a row's bitmap.
    """
    cluster = cluster or next((c for c in (8, 4, 2) if rows * c <= MULTIPROCESSORS), 1)
    # Enough samples that about 32 of the k highest scores are among them.
    samples = next((n for n in (1024, 2048) if n * k >= 32 * size), 4096)
    plan = RowPlan(size, k, cluster=cluster, spill=max(2048, k), samples=samples)
    if cluster == 1 and rows > MULTIPROCESSORS and 2 * plan.words <= SHARED_WORDS:
        return plan, 2
    plan = dataclasses.replace(plan, stages=8)
    if plan.words > SHARED_WORDS:
        raise NotImplementedError(f"rows of {size} scores are too long for their bitmaps to fit shared memory")
    return plan, 1


def select_topk(scores: jax.Array, lengths: jax.Array, k: int, *, cluster: int | None = None) -> jax.Array:
    """Positions of the `k` highest scores among the first `lengths` of each row; see `api.select_topk`.

    Scores at positions from `lengths` on are not used.

    Args:
      scores: float32 `[..., s]`, s a multiple of 4; no NaN among the first `lengths`.
      lengths: int32 `[...]`; numbers out of the range from 0 to s count as the nearest in it.
      k: number of positions to select, from 1 to 4096.
      cluster: number of blocks that read a row, each a part of it. None chooses, and holds few rows in registers.

    Returns:
      int32 `[..., k]` positions in ascending order, then -1 where a row has fewer than k.

    Raises:
      NotImplementedError: dtypes or sizes that the kernels do not take.
    """
    size = scores.shape[-1]
    _check(scores, k)
    rows = scores.size // size
    flat, limits = scores.reshape(rows, size), lengths.reshape(rows)
    held = few_rows_plan(rows, size, k) if cluster is None else None
    if held is not None:
        return select_few_rows(flat, limits, held).reshape(*lengths.shape, k)
    plan, teams = make_plan(rows, size, k, cluster)
    short = None
    if cluster is None and plan.cluster > 1:
        short = HeldRowPlan(size, k, plan.cluster, plan.threads).shortened(_SHORT_CHUNKS)
    body = functools.partial(row_body, rows=rows, plan=plan, short=short)
    out_type = jax.ShapeDtypeStruct((rows, k), jnp.int32)
    words = plan.words if short is None else max(plan.words, HELD_WORDS)
    run = launch(body, out_type, rows, plan.cluster, plan.threads, words, teams)
    return run(flat, limits).reshape(*lengths.shape, k)


def bits_plan(rows: int, size: int, k: int) -> tuple[RowPlan, int]:
    """As `make_plan`, for bitmaps of many rows: four small teams a block where rows are short.

    Raises:
      NotImplementedError: shared memory is too small for a row's bitmap.
    """
    plan = RowPlan(size, k, 256, slots=10, spill=max(2048, k), stages=2, samples=1024)
    if size <= _SMALL_TEAMS_SIZE and 4 * plan.words <= SHARED_WORDS:
        return plan, 4
    return make_plan(rows, size, k, 1)


def select_bits(scores: jax.Array, lengths: jax.Array, reach: jax.Array, k: int) -> jax.Array:
    """The selection of `select_topk` as bitmaps, for many rows.

    Args:
      scores: float32 `[t, s]`, as for `select_topk`.
      lengths: int32 `[t]`, from 0 to s.
      reach: int32 `[g]`, the longest length of each t / g neighbouring rows.
      k: number of positions to select, from 1 to 4096.

    Returns:
      int32 `[t, w]`, w the multiple of 4 that has a bit for every position: bit i of word j is set if position
      `32 * j + i` is selected. Words behind the group's `reach`, rounded up to a multiple of 128 positions, are
      undefined.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take.
    """
    rows, size = scores.shape
    _check(scores, k)
    plan, teams = bits_plan(rows, size, k)
    width = -(-size // _STEP) * (_STEP // 32)
    body = functools.partial(bits_body, rows=rows, groups=len(reach), plan=plan, width=width)
    out_type = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    return launch(body, out_type, rows, plan.cluster, plan.threads, plan.words, teams)(scores, lengths, reach)


def _check(scores: jax.Array, k: int) -> None:
    """Raises NotImplementedError for what no kernel takes."""
    size = scores.shape[-1]
    if scores.dtype != jnp.float32:
        raise NotImplementedError("scores must be float32")
    if size % 4 or not 4 <= size <= 1 << 22:
        raise NotImplementedError("the number of scores of a row must be a multiple of 4, at most 4M")
    if not scores.size:
        raise NotImplementedError("no rows")
    if not 1 <= k <= _MAX_K:
        raise NotImplementedError(f"k must be from 1 to {_MAX_K}")
