"""Dense attention on TPUs: a kernel of our own over pages, and JAX's splash attention without pages.

JAX's kernels over pages (`paged_attention`, `ragged_paged_attention`) expect another order of heads in a page, and
return no log-sum-exp. Splash attention expects contiguous keys, and queries that are scaled before they are rounded. In
our kernel a block of queries streams the pages through VMEM once for all key heads; all query heads of a key head are
side by side. It copies the next two chunks' pages while it multiplies the current chunk. The vision encoder's keys are
contiguous, so it uses splash attention.

`tpu_attention` multiplies a chunk, with transposed scores.

In decode a key head has few rows, and a product takes the time that its keys take to get into the matrix unit. So one
product takes all key heads. A query's row is zero where other heads' keys are, and its own head's values are picked
from the result. Zeros add nothing to the time: without them a unit of 256 x 256 would be half empty.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention

from pallas_kernels import paging, tpu_attention
from pallas_kernels.meshes import varying_axes
from pallas_kernels.tpu import LANES, MASKED, check_attention, result_like, vmem_limit

_QUERIES = 256
"""Queries that share one reading of the pages."""
_ROWS = 512
"""Rows that are multiplied at once. A row is one head of one query."""
_CHUNK = 1024
"""Positions copied at once."""
_BUFFERS = 3
"""Chunks in VMEM: one is multiplied, one is arriving, and the copies of one are waiting behind it."""
_PACKED_ROWS = 128
"""Most rows of all heads together for which one product takes all key heads."""
_SPLASH_BLOCK = 512


def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float) -> jax.Array:
    """See `api.flash_attention`. The queries are scaled, and then rounded to their dtype.

    Raises:
      NotImplementedError: a dtype other than bfloat16, or arrays of which JAX tracks over which mesh axes they vary.
    """
    queries, keys, dim = q.shape[1], k.shape[1], q.shape[3]
    if q.dtype != jnp.bfloat16 or k.dtype != q.dtype:
        raise NotImplementedError(f"takes bfloat16, not {q.dtype} and {k.dtype}")
    if varying_axes(q):
        raise NotImplementedError("JAX's splash attention runs only in jax.shard_map(..., check_vma=False)")
    sizes = [(n, min(_SPLASH_BLOCK, -(-n // LANES) * LANES)) for n in (queries, keys)]
    padding, blocks = [-n % block for n, block in sizes], [block for _, block in sizes]

    def by_head(x: jax.Array, padding: int) -> jax.Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, -dim % LANES)))

    mask = splash_attention.FullMask((queries + padding[0], keys + padding[1]))
    attend = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * q.shape[2]),
        block_sizes=splash_attention.BlockSizes(block_q=blocks[0], block_kv=blocks[1]),
    )
    # Segment 0 has the keys that exist and all queries. Segment 1 has the other keys and no query.
    there = jnp.arange(keys + padding[1]) >= jnp.minimum(lengths, keys)[:, None]
    segments = splash_attention.SegmentIds(
        q=jnp.zeros((q.shape[0], queries + padding[0]), jnp.int32), kv=there.astype(jnp.int32)
    )
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    arrays = by_head(scaled, padding[0]), by_head(k, padding[1]), by_head(v, padding[1])
    out = jax.lax.map(lambda image: attend(*image), (*arrays, segments))[:, :, :queries, :dim].swapaxes(1, 2)
    # Splash attention leaves a query undefined that sees no key.
    return jnp.where(lengths[:, None, None, None] > 0, out, 0)


def paged_flash_attention(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    query_start: jax.Array,
    kv_scales: jax.Array | None = None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_flash_attention`.

    Raises:
      NotImplementedError: scales, or dtypes or sizes that the kernel does not take.
    """
    if kv_scales is not None:
        raise NotImplementedError("keys and values have scales")
    batch, queries, heads, dim = q.shape
    kv_heads, page_size = kv.shape[2] // 2, kv.shape[1]
    check_attention(q, kv)
    group = heads // kv_heads
    if _ROWS % group or _CHUNK % page_size:
        raise NotImplementedError(f"{heads} heads on {kv_heads}, pages of {page_size}")
    if scale <= 0:
        # The kernel looks for the largest product, and scales it later.
        q, scale = q * jnp.sign(scale).astype(q.dtype), abs(scale) or 1.0
    unit = _ROWS // group if queries * group > _ROWS else 8 // math.gcd(8, group)
    block = min(_QUERIES, -(-queries // unit) * unit)
    padded = -(-queries // block) * block
    context = page_table.shape[1] * page_size
    chunk = min(_CHUNK, -(-context // LANES) * LANES)
    table = paging.pad_to_chunks(jnp.clip(page_table, 0, kv.shape[0] - 1), chunk // page_size)
    blocked = jnp.pad(q, ((0, 0), (0, padded - queries), (0, 0), (0, 0)))
    blocked = blocked.reshape(batch, padded // block, block, kv_heads, group, dim).transpose(0, 1, 3, 2, 4, 5)
    blocked = blocked.reshape(batch, padded // block, kv_heads, block * group, dim)
    if block * heads <= _PACKED_ROWS:
        own_head = jnp.eye(kv_heads, dtype=bool)[:, None, :, None]
        blocked = jnp.where(own_head, blocked[..., None, :], 0)
        blocked = blocked.reshape(batch, padded // block, 1, block * heads, kv_heads * dim)
    sizes = {"group": group, "block": block, "chunk": chunk, "context": context}
    out, lse = _attend(blocked, kv, table, query_start, **sizes, scale=scale)
    out = out.reshape(batch, -1, kv_heads, block, group, dim).transpose(0, 1, 3, 2, 4, 5)
    lse = lse.reshape(batch, -1, kv_heads, block, group).transpose(0, 1, 3, 2, 4)
    return out.reshape(batch, padded, heads, dim)[:, :queries], lse.reshape(batch, padded, heads)[:, :queries]


def _query_start(start: Any, sequence: jax.Array) -> jax.Array | int:
    return start[sequence]


@functools.partial(jax.jit, static_argnames=("group", "block", "chunk", "context", "scale"))
def _attend(
    q: jax.Array,
    kv: jax.Array,
    table: jax.Array,
    query_start: jax.Array,
    *,
    group: int,
    block: int,
    chunk: int,
    context: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q `[b, blocks, k / pack, pack * block * group, pack * d]` for `pack` key heads at once.

    Returns:
      `[b, blocks, k / pack, pack * block * group, d]`; log-sum-exps `[b, blocks, k / pack, 1, pack * block * group]`.
    """
    batch, blocks, parts, rows, depth = q.shape
    page_size, kv_heads, dim = kv.shape[1], kv.shape[2] // 2, kv.shape[3]
    turns, chunk_pages = table.shape[1] * page_size // chunk, chunk // page_size
    tile = min(rows, _ROWS)

    def kernel(query_start, table, q, kv, out, lse, pages, keys, values, acc, largest, total, even, odd, done):
        state, scores = (acc, largest, total), (even, odd)
        sequence, turn = pl.program_id(0), pl.program_id(2)
        first_query = _query_start(query_start, sequence) + pl.program_id(1) * block
        # A query that sees nothing also gets one turn, with all keys masked.
        count = jnp.clip((first_query + block - 1) // chunk + 1, 1, turns)
        buffer = jax.lax.rem(turn, _BUFFERS)

        def start(turn: jax.Array | int) -> None:
            buffer = jax.lax.rem(turn, _BUFFERS)
            for page in range(chunk_pages):
                source = kv.at[table[0, turn * chunk_pages + page]]
                target = pages.at[buffer, pl.ds(page * page_size, page_size)]
                pltpu.make_async_copy(source, target, done.at[buffer]).start()

        @pl.when(turn == 0)
        def _():
            start(0)
            for ahead in range(1, _BUFFERS - 1):
                pl.when(ahead < count)(functools.partial(start, ahead))
            tpu_attention.reset(state)

        def mask(scores: jax.Array, first: Any, first_key: int) -> jax.Array:
            row = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            query = jax.lax.div(jax.lax.rem(row, block * group), group)
            position = turn * chunk + first_key + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            return jnp.where(position <= jnp.minimum(first_query + query, context - 1), scores, MASKED)

        def multiply(masked: bool) -> None:
            tpu_attention.split(pages.at[buffer], keys, values)
            tpu_attention.attend_to_chunk(
                q.at[0, 0], keys, values, state, scores, scale=scale, mask=mask if masked else None
            )

        @pl.when(turn < count)
        def _():
            # The next chunk's copies have been started, so memory does not idle while this core waits.
            whole = pages.at[buffer]
            pltpu.make_async_copy(whole, whole, done.at[buffer]).wait()
            pl.when(turn + _BUFFERS - 1 < count)(lambda: start(turn + _BUFFERS - 1))
            all_visible = (turn + 1) * chunk <= jnp.minimum(first_query + 1, context)
            pl.when(all_visible)(lambda: multiply(False))
            pl.when(jnp.logical_not(all_visible))(lambda: multiply(True))

        @pl.when(turn + 1 == count)
        def _():
            tpu_attention.finish(state, out.at[0, 0], lse.at[0, 0], scale=scale)

    def of_block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, *shape), lambda b, i, *_: (b, i) + (0,) * len(shape))

    pairs = batch * blocks * rows * parts * turns * chunk
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, blocks, turns),
            in_specs=[
                # One sequence's pages: those of 64 sequences of 256K tokens do not fit the scalar memory.
                pl.BlockSpec((None, 1, table.shape[1]), lambda b, *_: (b, 0, 0), memory_space=pltpu.SMEM),
                of_block(parts, rows, depth),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=[of_block(parts, rows, dim), of_block(parts, 1, rows)],
            scratch_shapes=[
                pltpu.VMEM((_BUFFERS, chunk, 2 * kv_heads, dim), kv.dtype),
                pltpu.VMEM((parts, chunk, depth), kv.dtype),
                pltpu.VMEM((parts, depth, chunk), kv.dtype),
                *tpu_attention.state_shapes(parts, depth, rows),
                *tpu_attention.score_shapes(chunk, tile),
                pltpu.SemaphoreType.DMA((_BUFFERS,)),
            ],
        ),
        out_shape=[
            result_like(q, (batch, blocks, parts, rows, dim), q.dtype),
            result_like(q, (batch, blocks, parts, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit(),
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * depth,
            bytes_accessed=batch * blocks * turns * chunk * 2 * kv_heads * dim * kv.dtype.itemsize,
            transcendentals=pairs,
        ),
        name="paged_flash_attention",
    )(query_start, table[:, None], q, kv)
