"""Indexer scores on TPUs, in Pallas Mosaic TPU.

A grid step scores a block of queries against a step of keys. The keys' pages are copied one by one, through the page
table, to one of two buffers. The next step's pages are copied while a step is computed. Queries are in rows, in the
order [head, query], and keys in lanes, so the sum over heads adds whole vector registers. Gates are spread over lanes
once per block of queries. One query per sequence, as in decode, has a kernel of its own: `decode`.

A TPU's memory has rows of 128 elements, so two keys of 64 share a row. They are separated in registers
(`_one_key_a_row`), which costs little beside the products of 16 heads. The products fill half of a 128 x 128 systolic
array and a quarter of a 256 x 256 one, because a key has only 64 elements for the array's depth. That bounds prefill.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.indexer_scores.mosaic_tpu import decode
from pallas_kernels.tpu import LANES, result_like, vmem_limit

_TILE = 256  # Keys of one product: the width of the larger systolic arrays.
_QUERIES = 256  # Queries of one block.
_PRODUCT_QUERIES = 64  # Queries of one product: registers hold their sums over heads.
_KEYS = 4096  # Keys of one step; while it is computed, the next step's keys are copied.
_UNROLL = 8  # Tiles of keys.


def indexer_scores(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    page_table: jax.Array,
    query_start: jax.Array,
    *,
    scale: float,
    key_scales: jax.Array | None = None,
    fill: bool = True,
    skip_below: int = 0,
) -> jax.Array:
    """See `api.indexer_scores`. It ignores `fill` and `skip_below`, and scores and fills all.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take.
    """
    del fill, skip_below
    batch, queries, heads, dim = q.shape
    page_size, pages = keys.shape[1], page_table.shape[1]
    if q.dtype != keys.dtype or q.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        raise NotImplementedError(
            f"queries {q.dtype} and keys {keys.dtype}: both must be bfloat16 or both float8_e4m3fn"
        )
    if dim not in (LANES // 2, LANES):
        raise NotImplementedError(f"takes keys of 64 or 128 elements, not of {dim}")
    rows = page_size * dim // LANES
    least = 32 // keys.dtype.itemsize  # Rows of a tile of memory.
    most = decode.TILE if queries == 1 else _KEYS
    if rows % least or most % page_size:
        raise NotImplementedError(f"takes pages of {least * LANES // dim} to {most} positions, not of {page_size}")
    q = q.astype(jnp.bfloat16)  # Holds float8 exactly.
    # The same bytes as rows of 128, the unit of copies and registers.
    keys = keys.reshape(-1, rows, LANES)
    table, query_start = jnp.clip(page_table, 0, keys.shape[0] - 1), query_start.astype(jnp.int32)
    if queries == 1:
        gates = weights[:, 0].astype(jnp.float32) * scale
        scores = decode.decode_scores(q[:, 0], gates, keys, table, query_start, key_scales, page_size=page_size)
        return scores[:, None]
    block = min(_QUERIES, pl.cdiv(queries, 16) * 16)
    blocks = pl.cdiv(queries, block)
    padding = (0, block * blocks - queries)
    q = jnp.pad(jnp.swapaxes(q, 1, 2), ((0, 0), (0, 0), padding, (0, LANES - dim)))
    gates = jnp.pad(weights.astype(jnp.float32) * scale, ((0, 0), padding, (0, 0)))
    length = pages * page_size
    step = min(_KEYS, pl.cdiv(length, _TILE) * _TILE)
    table = jnp.pad(table, ((0, 0), (0, -pages % (step // page_size))))
    # A position's scale is its score's. They are few bytes, so XLA puts them into the order of positions.
    scales = [] if key_scales is None else [key_scales.astype(jnp.float32)[table].reshape(batch, 1, -1)]
    call = pl.pallas_call(
        functools.partial(_kernel, page_size=page_size, step=step, block=block, dim=dim),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, blocks, pl.cdiv(length, step)),
            in_specs=[
                pl.BlockSpec((None, 1, table.shape[1]), lambda b, i, j, start: (b, 0, 0), memory_space=pltpu.SMEM),
                pl.BlockSpec((None, heads, block, LANES), lambda b, i, j, start: (b, 0, i, 0)),
                pl.BlockSpec((None, block, heads), lambda b, i, j, start: (b, i, 0)),
                pl.BlockSpec(memory_space=pltpu.HBM),
                *[pl.BlockSpec((None, 1, step), lambda b, i, j, start: (b, 0, j)) for _ in scales],
            ],
            out_specs=pl.BlockSpec((None, block, step), lambda b, i, j, start: (b, i, j)),
            scratch_shapes=[
                pltpu.VMEM((2, step * dim // LANES, LANES), keys.dtype),
                pltpu.VMEM((heads, block, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=result_like(q, (batch, queries, length), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            # The kernel needs no more. XLA keeps other arrays of a step in the rest.
            vmem_limit_bytes=min(vmem_limit(), 32 * 2**20),
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * queries * length * heads * dim,
            bytes_accessed=batch * length * (queries * 4 + blocks * dim * keys.dtype.itemsize),
            transcendentals=0,
        ),
        name="indexer_scores",
    )
    return call(query_start, table[:, None], q, gates, keys, *scales)


def _query_start(start_ref, b):
    return start_ref[b]


def _kernel(
    start_ref,
    table_ref,
    q_ref,
    gates_ref,
    keys_ref,
    *refs,
    page_size,
    step,
    block,
    dim,
):
    *scales, out_ref, buffer, spread, arrived = refs
    b, i, j = (pl.program_id(axis) for axis in range(3))
    first_query = _query_start(start_ref, b) + i * block
    # Queries that see nothing also get one step, with all keys masked.
    seen_steps = jnp.maximum((first_query + block - 1) // step, 0) + 1
    per_step, rows = step // page_size, page_size * dim // LANES

    def copies(step_index, each):
        slot = step_index % 2
        for p in range(per_step):
            page = table_ref[0, step_index * per_step + p]
            target = buffer.at[slot, pl.ds(p * rows, rows)]
            each(pltpu.make_async_copy(keys_ref.at[page], target, arrived.at[slot]))

    def load(step_index):
        copies(step_index, lambda copy: copy.start())

    @pl.when(j == 0)
    def _():
        for n in range(spread.shape[0]):
            spread[n] = jnp.broadcast_to(gates_ref[:, n : n + 1], spread.shape[1:])
        load(j)

    @pl.when(j + 1 < jnp.minimum(seen_steps, pl.num_programs(2)))
    def _():
        load(j + 1)

    @pl.when(j >= seen_steps)
    def _():
        out_ref[...] = jnp.full(out_ref.shape, -jnp.inf, jnp.float32)

    @pl.when(j < seen_steps)
    def _():
        slot = j % 2
        whole = buffer.at[slot]
        pltpu.make_async_copy(whole, whole, arrived.at[slot]).wait()
        tiles = step // _TILE

        @pl.loop(0, tiles, unroll=math.gcd(tiles, _UNROLL))
        def _(tile):
            first = pl.multiple_of(tile * _TILE, _TILE)
            keys = buffer[slot, pl.ds(pl.multiple_of(first * dim // LANES, _TILE // 2), _TILE * dim // LANES)]
            keys = keys.astype(jnp.bfloat16) if dim == LANES else _one_key_a_row(keys)
            of_keys = [scale[:, pl.ds(first, _TILE)] for scale in scales]
            for row in range(0, block, _PRODUCT_QUERIES):
                of_queries = pl.ds(row, min(_PRODUCT_QUERIES, block - row))
                dots = lax.dot_general(
                    q_ref[:, of_queries].reshape(-1, LANES),
                    keys,
                    (((1,), (1,)), ((), ())),
                    precision=lax.Precision.DEFAULT,
                    preferred_element_type=jnp.float32,
                )
                gates = spread[:, of_queries]
                dots = jnp.maximum(dots.reshape(*gates.shape[:2], _TILE), 0.0)
                parts = [dots[..., lanes : lanes + LANES] * gates for lanes in range(0, _TILE, LANES)]
                scores = jnp.concatenate([jnp.sum(part, axis=0) for part in parts], axis=1)
                for scale in of_keys:
                    scores *= scale
                positions = j * step + first + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                visible = positions <= first_query + row + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
                out_ref[of_queries, pl.ds(first, _TILE)] = jnp.where(visible, scores, -jnp.inf)


def _one_key_a_row(pairs: jax.Array) -> jax.Array:
    """`[r, 128]` with two keys of 64 per row, to bf16 `[2 * r, 128]` with one key and zeros per row."""
    bits = lax.bitcast_convert_type(pairs.astype(jnp.float32), jnp.uint32)
    # A 32-bit word of a register holds the elements of two rows.
    words = (bits >> 16) | pltpu.roll(bits, LANES // 2, 1)
    lane = lax.broadcasted_iota(jnp.int32, words.shape, 1)
    return pltpu.bitcast(jnp.where(lane < LANES // 2, words, 0), jnp.bfloat16)
