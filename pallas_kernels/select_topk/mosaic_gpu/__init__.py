"""Exact selection on Hopper GPUs (Pallas Mosaic GPU): the positions of the highest scores of each row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.hopper import MULTIPROCESSORS
from pallas_kernels.gpu.machine import SHARED_WORDS, launch
from pallas_kernels.select_topk.mosaic_gpu.few_rows import few_rows_plan, select_few_rows
from pallas_kernels.select_topk.mosaic_gpu.row_reader import HIGHEST, Plan
from pallas_kernels.select_topk.mosaic_gpu.row_selection import RowSelection

_MAX_K = 4096


def row_body(machine, scores, lengths, positions, row, rank, *, rows, plan):
    """Selects row `row`; `rank` is the block's number in its cluster."""
    row, rank = machine.word(row), machine.word(rank)
    length = machine.load_global(machine.row(lengths, 0, rows), row)
    out = machine.row(positions, row, plan.k)
    if machine.teams > 1:
        with machine.when(machine.team.eq(1) & machine.turn.eq(0)):
            machine.delay(length // 4)
    with machine.when(length <= plan.k):

        def put(at):
            machine.store_global(out, at, machine.select(at < length, at, HIGHEST))

        machine.loop(rank * machine.threads + machine.thread, plan.k, machine.cluster * machine.threads, put)
    with machine.when(length > plan.k):
        selection = RowSelection(machine, machine.row(scores, row, plan.size), length, rank, plan)
        selection.write(out, *selection.find())


def make_plan(rows: int, size: int, k: int, cluster: int | None = None) -> tuple[Plan, int]:
    """How rows are worked on, and the rows of a block; or refuses."""
    cluster = cluster or next((c for c in (8, 4, 2) if rows * c <= MULTIPROCESSORS), 1)
    # As many as let some 32 of the k highest be among them.
    samples = next((n for n in (1024, 2048) if n * k >= 32 * size), 4096)
    plan = Plan(size, k, cluster=cluster, spill=max(2048, k), samples=samples)
    if cluster == 1 and rows > MULTIPROCESSORS and 2 * plan.words <= SHARED_WORDS:
        return plan, 2
    plan = dataclasses.replace(plan, stages=8)
    if plan.words > SHARED_WORDS:
        raise NotImplementedError(f"rows of {size} scores are too long for their bitmaps to fit shared memory")
    return plan, 1


def select_topk(scores: jax.Array, lengths: jax.Array, k: int, *, cluster: int | None = None) -> jax.Array:
    """Positions of the `k` highest scores among the first `lengths` of each row; all of them when there are fewer.

    Exact and deterministic: of equal scores (0.0 equals -0.0) the lower position wins. What lies at or behind the
    length is not looked at.

    Args:
      scores: float32 `[..., s]`, s a multiple of 4; no NaN among the first `lengths`.
      lengths: int32 `[...]`, from 0 to s.
      k: how many to select, from 1 to 4096.
      cluster: blocks that read a row part by part; None chooses, and few rows are held in registers.

    Returns:
      int32 `[..., k]` positions in ascending order, then -1 where a row has fewer than k.
    """
    size = scores.shape[-1]
    if scores.dtype != jnp.float32:
        raise NotImplementedError("scores must be float32")
    if size % 4 or not 4 <= size <= 1 << 22:
        raise NotImplementedError("the number of scores of a row must be a multiple of 4, at most 4M")
    if not scores.size:
        raise NotImplementedError("no rows")
    if not 1 <= k <= _MAX_K:
        raise NotImplementedError(f"k must be from 1 to {_MAX_K}")
    rows = scores.size // size
    flat, limits = scores.reshape(rows, size), lengths.reshape(rows)
    held = few_rows_plan(rows, size, k) if cluster is None else None
    if held is not None:
        return select_few_rows(flat, limits, held).reshape(*lengths.shape, k)
    plan, teams = make_plan(rows, size, k, cluster)
    body = functools.partial(row_body, rows=rows, plan=plan)
    out_type = jax.ShapeDtypeStruct((rows, k), jnp.int32)
    run = launch(body, out_type, rows, plan.cluster, plan.threads, plan.words, teams)
    return run(flat, limits).reshape(*lengths.shape, k)
