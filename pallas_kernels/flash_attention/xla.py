"""Portable dense attention: chunks of queries against chunks of keys, with an online softmax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import paging

_QUERY_CHUNK = 512
_KEY_CHUNK = 512
_WORKSPACE_BYTES = 64 * 2**20


def _attend(
    q: jax.Array,
    load_chunk: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    last_visible: jax.Array,
    chunk_size: int,
    num_chunks: int,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q `[b, t, n, d]`; query t sees positions up to `last_visible[b, t]`.

    `load_chunk(i)` gives the keys and values `[b, chunk_size, k, d]` of positions `i * chunk_size` and on.
    """
    batch, queries, heads, dim = q.shape
    kv_heads = jax.eval_shape(load_chunk, jnp.int32(0))[0].shape[2]
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, dim)

    def step(chunk: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, total, largest = state
        keys, values = load_chunk(chunk)
        logits = jnp.einsum("btkgd,bskd->btkgs", grouped, keys, preferred_element_type=jnp.float32) * scale
        visible = chunk * chunk_size + jnp.arange(chunk_size) <= last_visible[..., None]
        logits = jnp.where(visible[:, :, None, None], logits, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1))
        # A row that has seen nothing yet keeps zeros: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN.
        reference = jnp.where(jnp.isfinite(new_largest), new_largest, 0.0)
        probabilities = jnp.exp(logits - reference[..., None])
        correction = jnp.exp(largest - reference)
        part = jnp.einsum(
            "btkgs,bskd->btkgd", probabilities.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        total = total * correction + jnp.sum(probabilities, axis=-1)
        return out * correction[..., None] + part, total, new_largest

    shape = grouped.shape[:-1]
    state = (jnp.zeros(grouped.shape, jnp.float32), jnp.zeros(shape), jnp.full(shape, -jnp.inf))
    if num_chunks == 1:
        out, total, largest = step(jnp.int32(0), state)
    else:
        chunks = jnp.minimum((jnp.max(last_visible) + chunk_size) // chunk_size, num_chunks)
        out, total, largest = jax.lax.fori_loop(0, chunks, step, state)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    lse = largest + jnp.log(total)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:3])


def _map_query_chunks(
    attend: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]], q: jax.Array, last_visible: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`attend(q, last_visible)` over chunks of the query axis."""
    queries = q.shape[1]
    if queries <= _QUERY_CHUNK:
        return attend(q, last_visible)
    padding = -queries % _QUERY_CHUNK

    def split(x: jax.Array, fill: int) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, _QUERY_CHUNK, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :queries]

    out, lse = jax.lax.map(lambda chunk: attend(*chunk), (split(q, 0), split(last_visible, -1)))
    return join(out), join(lse)


def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float) -> jax.Array:
    chunk_size = min(_KEY_CHUNK, k.shape[1])
    padding = ((0, 0), (0, -k.shape[1] % chunk_size), (0, 0), (0, 0))
    k, v = jnp.pad(k, padding), jnp.pad(v, padding)

    def load_chunk(chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = chunk * chunk_size
        keys, values = (jax.lax.dynamic_slice_in_dim(x, start, chunk_size, axis=1) for x in (k, v))
        return keys, values

    def attend(q: jax.Array, last_visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _attend(q, load_chunk, last_visible, chunk_size, k.shape[1] // chunk_size, scale=scale)

    last_visible = jnp.broadcast_to(lengths[:, None] - 1, q.shape[:2])
    return _map_query_chunks(attend, q, last_visible)[0]


def paged_flash_attention(
    q: jax.Array, kv: jax.Array, page_table: jax.Array, query_start: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    batch, queries, heads, dim = q.shape
    page_size = kv.shape[1]
    # A position costs its logits, and a copy of its keys and values.
    bytes_per_position = batch * (min(queries, _QUERY_CHUNK) * heads * 8 + 2 * kv.shape[2] * dim * kv.dtype.itemsize)
    pages_per_chunk = paging.pages_per_chunk(page_table, page_size, bytes_per_position, _WORKSPACE_BYTES)
    chunk_size = pages_per_chunk * page_size
    table = paging.pad_to_chunks(page_table, pages_per_chunk)

    def load_chunk(chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = kv[paging.pages_of_chunk(table, chunk, pages_per_chunk)].reshape(batch, chunk_size, -1, dim)
        keys, values = jnp.split(rows, 2, axis=2)
        return keys, values

    def attend(q: jax.Array, last_visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _attend(q, load_chunk, last_visible, chunk_size, table.shape[1] // pages_per_chunk, scale=scale)

    return _map_query_chunks(attend, q, query_start[:, None] + jnp.arange(queries))
