"""Attention to lists of positions on TPUs, as in decode: one copy from HBM for every selected position.

The keys and values of all heads of a position are one contiguous row of its page, a `[2 * k, d]` tile. So a selected
position costs one copy. A query's list is cut into chunks. Before the kernel waits for a chunk and multiplies it, it
starts all copies of the next chunk, or of the next query's first chunk. Addresses are (row, 0, 0) of the pool and never
flat element numbers, which exceed 2^31.

One query alone fills few rows of a matrix unit. For prefill, where neighbouring queries can share reads,
`topk_attention` has a kernel of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import paging
from pallas_kernels.tpu import LANES, MASKED, check_attention, precision, result_like

_CHUNK = 512
_UNROLL = 8


def sparse_attention(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    page_table: jax.Array,
    kv_scales: jax.Array | None = None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.sparse_attention`.

    Raises:
      NotImplementedError: scales, or dtypes or sizes that the kernel does not take.
    """
    if kv_scales is not None:
        raise NotImplementedError("keys and values have scales")
    batch, queries, heads, dim = q.shape
    kv_heads, top_k = kv.shape[2] // 2, indices.shape[-1]
    check_attention(q, kv)
    total = batch * queries
    chunk = min(_CHUNK, -(-top_k // LANES) * LANES)
    padding = -top_k % chunk
    indices = jnp.where(indices < page_table.shape[1] * kv.shape[1], indices, -1)
    lists = jnp.pad(indices.reshape(total, top_k), ((0, 0), (0, padding)), constant_values=-1)
    table = jnp.clip(page_table, 0, kv.shape[0] - 1)
    slots = paging.slots(table, jnp.maximum(lists, 0).reshape(batch, queries, -1), kv.shape[1])
    # Chunks behind the last valid entry are neither copied nor multiplied.
    lengths = jnp.max(jnp.where(lists >= 0, jnp.arange(top_k + padding) + 1, 0), axis=-1)
    out, lse = _attend(
        q.reshape(total, kv_heads, heads // kv_heads, dim),
        kv.reshape(-1, 2 * kv_heads, dim),
        slots.reshape(total, 1, -1),
        lists[:, None],
        jnp.maximum((lengths + chunk - 1) // chunk, 1).astype(jnp.int32),
        chunk=chunk,
        scale=scale,
    )
    return out.reshape(q.shape), lse[..., 0].reshape(q.shape[:3])


@functools.partial(jax.jit, static_argnames=("chunk", "scale"))
def _attend(
    q: jax.Array,
    rows: jax.Array,
    slots: jax.Array,
    lists: jax.Array,
    chunks: jax.Array,
    *,
    chunk: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q `[r, k, g, d]` to `rows [slots, 2 * k, d]`; entries of `lists [r, 1, l]` below 0 are ignored."""
    total, kv_heads, group, dim = q.shape
    length = slots.shape[-1]
    dot = functools.partial(jax.lax.dot_general, precision=precision(q.dtype), preferred_element_type=jnp.float32)

    def kernel(chunks, q, slots, next_slots, lists, rows, out, lse, buffers, acc, largest, total_weight, turn, done):
        row, count = pl.program_id(0), chunks[pl.program_id(0)]

        def start(slots, first: jax.Array | int, buffer: jax.Array) -> None:
            def step(i: jax.Array, _: None) -> None:
                for j in range(_UNROLL):
                    place = i * _UNROLL + j
                    source = rows.at[slots[0, 0, first + place]]
                    pltpu.make_async_copy(source, buffers.at[buffer, place], done.at[buffer]).start()

            jax.lax.fori_loop(0, chunk // _UNROLL, step, None)

        @pl.when(row == 0)
        def _():
            turn[0] = 0
            start(slots, 0, jnp.int32(0))

        acc[...] = jnp.zeros_like(acc)
        largest[...] = jnp.full_like(largest, MASKED)
        total_weight[...] = jnp.zeros_like(total_weight)

        def multiply(c: jax.Array) -> None:
            buffer = turn[0]

            @pl.when(c + 1 < count)
            def _():
                start(slots, (c + 1) * chunk, 1 - buffer)

            @pl.when((c + 1 == count) & (row + 1 < total))
            def _():
                start(next_slots, 0, 1 - buffer)

            # One wait for the bytes of all copies of the chunk.
            pltpu.make_async_copy(buffers.at[buffer], buffers.at[buffer], done.at[buffer]).wait()
            values = buffers[buffer].reshape(chunk, 2 * kv_heads * dim)
            counts = lists[0, :, pl.ds(pl.multiple_of(c * chunk, chunk), chunk)] >= 0
            for head in range(kv_heads):
                key = values[:, head * dim : (head + 1) * dim]
                value = values[:, (kv_heads + head) * dim : (kv_heads + head + 1) * dim]
                logits = dot(q[0, head], key, (((1,), (1,)), ((), ()))) * scale
                logits = jnp.where(counts, logits, MASKED)
                new_largest = jnp.maximum(largest[head][:, :1], jnp.max(logits, axis=1, keepdims=True))
                weights = jnp.where(counts, jnp.exp(logits - new_largest), 0.0)
                correction = jnp.exp(largest[head][:, :1] - new_largest)
                part = dot(weights.astype(value.dtype), value, (((1,), (0,)), ((), ())))
                acc[head] = acc[head] * correction + part
                total_weight[head] = total_weight[head] * correction + jnp.sum(weights, axis=1, keepdims=True)
                largest[head] = jnp.broadcast_to(new_largest, largest.shape[1:])
            turn[0] = 1 - buffer

        # The compiler estimates by the number of turns, so it is constant. Turns that are not needed do nothing.
        def step(c: jax.Array, _: None) -> None:
            pl.when(c < count)(lambda: multiply(c))

        jax.lax.fori_loop(0, length // chunk, step, None)
        weight = total_weight[...]
        out[0] = (acc[...] / jnp.where(weight > 0, weight, 1.0)[:, :, :1]).astype(out.dtype)
        lse[0] = jnp.where(weight > 0, largest[...] + jnp.log(weight), -jnp.inf)

    def of_row(*shape: int, space: pltpu.MemorySpace = pltpu.VMEM, ahead: int = 0) -> pl.BlockSpec:
        block = (1, *shape)
        return pl.BlockSpec(
            block, lambda i, *_: (jnp.minimum(i + ahead, total - 1),) + (0,) * len(shape), memory_space=space
        )

    elements = total * length * kv_heads
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(total,),
            in_specs=[
                of_row(kv_heads, group, dim),
                of_row(1, length, space=pltpu.SMEM),
                of_row(1, length, space=pltpu.SMEM, ahead=1),
                of_row(1, length),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=[of_row(kv_heads, group, dim), of_row(kv_heads, group, LANES)],
            scratch_shapes=[
                pltpu.VMEM((2, chunk, 2 * kv_heads, dim), rows.dtype),
                pltpu.VMEM((kv_heads, group, dim), jnp.float32),
                pltpu.VMEM((kv_heads, group, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, group, LANES), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            result_like(q, q.shape, q.dtype),
            result_like(q, (total, kv_heads, group, LANES), jnp.float32),
        ],
        cost_estimate=pl.CostEstimate(
            flops=4 * elements * group * dim,
            bytes_accessed=2 * elements * dim * rows.dtype.itemsize,
            transcendentals=elements * group,
        ),
    )(chunks, q, slots, slots, lists, rows)
