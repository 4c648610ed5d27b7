"""Portable dense attention: chunks of queries against chunks of keys, with an online softmax."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import paging, portable
from pallas_kernels.meshes import vary_like

_QUERY_CHUNK = 512
_KEY_CHUNK = 512
_WORKSPACE_BYTES = 64 * 2**20
_GPU_WORKSPACE_BYTES = 256 * 2**20
_GRADIENT_BYTES = 2**30
"""Most bytes of the scores of queries whose gradients are computed at once; there are a few such arrays."""


def _attend(
    q: jax.Array,
    load_chunk: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    last_visible: jax.Array,
    chunk_size: int,
    num_chunks: int,
    *,
    scale: float,
    on_gpu: bool,
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
    state = (
        jnp.zeros(grouped.shape, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.full(shape, -jnp.inf, jnp.float32),
    )
    state = vary_like(state, q)
    if num_chunks == 1:
        out, total, largest = step(jnp.int32(0), state)
    else:
        seen = jnp.minimum((jnp.max(last_visible) + chunk_size) // chunk_size, num_chunks)
        out, total, largest = jax.lax.fori_loop(0, num_chunks if on_gpu else seen, step, state)
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

    out, lse = portable.map_blocks(lambda chunk: attend(*chunk), (split(q, 0), split(last_visible, -1)), q)
    return join(out), join(lse)


def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float) -> jax.Array:
    """See `api.flash_attention`. It has a gradient, which takes memory for the scores of some queries at a time."""
    return _flash_attention(scale, q, k, v, jnp.minimum(lengths, k.shape[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash_attention(scale: float, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    return _flash_attention_forward(scale, q, k, v, lengths)[0]


def _flash_attention_forward(
    scale: float, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    gpu, elsewhere = (functools.partial(_attend_in_chunks, scale, on_gpu) for on_gpu in (True, False))
    out, lse = portable.on_gpus(gpu, elsewhere, q, k, v, lengths)
    return out, (q, k, v, lengths, out, lse)


def _attend_in_chunks(
    scale: float, on_gpu: bool, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    chunk_size = min(_KEY_CHUNK, k.shape[1])
    padding = ((0, 0), (0, -k.shape[1] % chunk_size), (0, 0), (0, 0))
    padded_k, padded_v = jnp.pad(k, padding), jnp.pad(v, padding)

    def load_chunk(chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = chunk * chunk_size
        keys, values = (jax.lax.dynamic_slice_in_dim(x, start, chunk_size, axis=1) for x in (padded_k, padded_v))
        return keys, values

    def attend(q: jax.Array, last_visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        number = padded_k.shape[1] // chunk_size
        return _attend(q, load_chunk, last_visible, chunk_size, number, scale=scale, on_gpu=on_gpu)

    last_visible = jnp.broadcast_to(lengths[:, None] - 1, q.shape[:2])
    return _map_query_chunks(attend, q, last_visible)


def _flash_attention_backward(
    scale: float, saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """`dS = P (dO V^T - rowsum(O dO))`: FlashAttention, arXiv 2205.14135, algorithm 4, for blocks of queries."""
    q, k, v, lengths, out, lse = saved
    batch, queries, heads, dim = q.shape
    shape = (k.shape[2], heads // k.shape[2])
    seen = jnp.arange(k.shape[1]) < lengths[:, None, None, None, None]
    rows = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    at_once = max(1, _GRADIENT_BYTES // (4 * batch * heads * k.shape[1]))
    blocks = -(-queries // at_once)
    size = -(-queries // blocks)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, blocks * size - queries)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, blocks, size, *shape, *x.shape[3:]), 1, 0)

    def run(sums: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        q, d_out, lse, rows = block
        lse, rows = (jnp.moveaxis(x, 1, 3)[..., None] for x in (lse, rows))
        logits = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * scale
        probabilities = jnp.where(seen, jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0)), 0.0)
        d_p = jnp.einsum("btkgd,bskd->bkgts", d_out, v, preferred_element_type=jnp.float32)
        d_s = (probabilities * (d_p - rows) * scale).astype(q.dtype)
        d_k = jnp.einsum("bkgts,btkgd->bskd", d_s, q, preferred_element_type=jnp.float32)
        d_v = jnp.einsum("bkgts,btkgd->bskd", probabilities.astype(v.dtype), d_out, preferred_element_type=jnp.float32)
        d_q = jnp.einsum("bkgts,bskd->btkgd", d_s, k, preferred_element_type=jnp.float32)
        return (sums[0] + d_k, sums[1] + d_v), d_q.astype(q.dtype)

    zeros = vary_like((jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)), q)
    items = tuple(map(split, (q, d_out.astype(q.dtype), lse, rows)))
    if blocks > 1:
        (d_k, d_v), d_q = jax.lax.scan(run, zeros, items)
    else:
        (d_k, d_v), d_q = run(zeros, tuple(x[0] for x in items))
        d_q = d_q[None]
    d_q = jnp.moveaxis(d_q, 0, 1).reshape(batch, -1, heads, dim)[:, :queries]
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_flash_attention.defvjp(_flash_attention_forward, _flash_attention_backward)


def paged_flash_attention(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    query_start: jax.Array,
    kv_scales: jax.Array | None = None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_flash_attention`. It has a gradient, which takes memory for the scores of one chunk of keys."""
    capacity = page_table.shape[1] * kv.shape[1]
    last_visible = jnp.minimum(query_start[:, None] + jnp.arange(q.shape[1]), capacity - 1)
    page_table = jnp.clip(page_table, 0, kv.shape[0] - 1)
    if kv_scales is None:
        return _paged_flash_attention(scale, q, kv, page_table, last_visible)
    return _attend_to_pages(scale, *jax.lax.stop_gradient((q, kv)), page_table, last_visible, kv_scales)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _paged_flash_attention(
    scale: float, q: jax.Array, kv: jax.Array, page_table: jax.Array, last_visible: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _paged_flash_attention_forward(scale, q, kv, page_table, last_visible)[0]


def _paged_flash_attention_forward(
    scale: float, q: jax.Array, kv: jax.Array, page_table: jax.Array, last_visible: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    found = _attend_to_pages(scale, q, kv, page_table, last_visible, None)
    return found, (q, kv, page_table, last_visible, *found)


def _attend_to_pages(
    scale: float,
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    last_visible: jax.Array,
    kv_scales: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    gpu, elsewhere = (functools.partial(_attend_in_pages, scale, on_gpu) for on_gpu in (True, False))
    return portable.on_gpus(gpu, elsewhere, q, kv, page_table, last_visible, kv_scales)


def _attend_in_pages(
    scale: float,
    on_gpu: bool,
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    last_visible: jax.Array,
    kv_scales: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    (batch, queries, heads, _), page_size = q.shape, kv.shape[1]
    # A position costs its logits, and a copy of its keys and values.
    bytes_per_position = batch * (min(queries, _QUERY_CHUNK) * heads * 8 + 2 * paging.scaled_row_bytes(kv, q.dtype))
    workspace = _GPU_WORKSPACE_BYTES if on_gpu else _WORKSPACE_BYTES
    pages_per_chunk = paging.pages_per_chunk(page_table, page_size, bytes_per_position, workspace)
    chunk_size = pages_per_chunk * page_size
    table = paging.pad_to_chunks(page_table, pages_per_chunk)

    def load_chunk(chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _keys_and_values(kv, kv_scales, paging.pages_of_chunk(table, chunk, pages_per_chunk), q.dtype)

    def attend(q: jax.Array, last_visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        number = table.shape[1] // pages_per_chunk
        return _attend(q, load_chunk, last_visible, chunk_size, number, scale=scale, on_gpu=on_gpu)

    return _map_query_chunks(attend, q, last_visible)


def _paged_flash_attention_backward(
    scale: float, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    gpu, elsewhere = (functools.partial(_paged_gradients, scale, on_gpu) for on_gpu in (True, False))
    return *portable.on_gpus(gpu, elsewhere, saved, cotangents), None, None


def _paged_gradients(
    scale: float, on_gpu: bool, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """As `_flash_attention_backward`, for chunks of keys, with the gradient of the log-sum-exps beside."""
    q, kv, page_table, last_visible, out, lse = saved
    batch, queries, heads, dim = q.shape
    page_size, kv_heads = kv.shape[1], kv.shape[2] // 2
    d_out, d_lse = (x.astype(jnp.float32) for x in cotangents)
    d_rest = d_lse - jnp.sum(out.astype(jnp.float32) * d_out, axis=-1)
    shape = (batch, queries, kv_heads, heads // kv_heads)
    q_by_head, d_out = q.reshape(*shape, dim), d_out.reshape(*shape, dim)
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0).reshape(*shape, 1)
    d_rest = d_rest.reshape(*shape, 1)
    pages_per_chunk = paging.pages_per_chunk(page_table, page_size, 4 * batch * queries * heads, _GRADIENT_BYTES)
    table = paging.pad_to_chunks(page_table, pages_per_chunk)
    chunk_size = pages_per_chunk * page_size
    number = table.shape[1] // pages_per_chunk
    seen = jnp.clip(jnp.max(last_visible) // chunk_size + 1, 0, number)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def add_chunk(chunk: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        pages = paging.pages_of_chunk(table, chunk, pages_per_chunk)
        keys, values = _keys_and_values(kv, None, pages, q.dtype)
        seen = chunk * chunk_size + jnp.arange(chunk_size) <= last_visible[..., None]
        logits = dot("btkgd,bskd->btkgs", q_by_head, keys) * scale
        probabilities = jnp.where(seen[:, :, None, None], jnp.exp(logits - lse), 0.0)
        d_s = probabilities * (dot("btkgd,bskd->btkgs", d_out, values) + d_rest) * scale
        d_keys, d_values = dot("btkgs,btkgd->bskd", d_s, q_by_head), dot("btkgs,btkgd->bskd", probabilities, d_out)
        d_pages = jnp.concatenate([d_keys, d_values], axis=2).reshape(*pages.shape, *kv.shape[1:])
        return sums[0] + dot("btkgs,bskd->btkgd", d_s, keys), sums[1].at[pages].add(d_pages)

    sums = vary_like((jnp.zeros(q_by_head.shape, jnp.float32), jnp.zeros(kv.shape, jnp.float32)), q)
    d_q, d_kv = jax.lax.fori_loop(0, number if on_gpu else seen, add_chunk, sums)
    return d_q.reshape(q.shape).astype(q.dtype), d_kv.astype(kv.dtype)


_paged_flash_attention.defvjp(_paged_flash_attention_forward, _paged_flash_attention_backward)


def _keys_and_values(
    kv: jax.Array, kv_scales: jax.Array | None, pages: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """The keys and the values `[b, s, k, d]` of pages int32 `[b, i]`."""
    gathered = paging.scaled(kv[pages], None if kv_scales is None else kv_scales[pages], dtype)
    keys, values = jnp.split(gathered.reshape(pages.shape[0], -1, *kv.shape[2:]), 2, axis=2)
    return keys, values
