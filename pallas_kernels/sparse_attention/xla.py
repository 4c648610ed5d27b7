"""Portable sparse attention: gathers the selected rows of a few queries at a time.

On GPUs, queries of a short context attend to all its rows under a mask, where that moves fewer bytes.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import paging, portable
from pallas_kernels.meshes import vary_like

_WORKSPACE_BYTES = 64 * 2**20
_GPU_WORKSPACE_BYTES = 256 * 2**20
_LOGIT_BYTES = 20
"""Bytes that a GPU moves for one head and key of masked attention: a logit four times, its probability twice."""
_GATHERED_TIMES = 3
"""How often a GPU moves a gathered row: it reads, writes, and reads it."""

_Results = tuple[jax.Array, jax.Array]


def sparse_attention(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    page_table: jax.Array,
    kv_scales: jax.Array | None = None,
    *,
    scale: float,
) -> _Results:
    """See `api.sparse_attention`. It has a gradient, which gathers the rows again.

    Memory: `_WORKSPACE_BYTES`, on GPUs `_GPU_WORKSPACE_BYTES`, or what one query of each sequence takes.
    """
    indices = jnp.where(indices < page_table.shape[1] * kv.shape[1], indices, -1)
    page_table = jnp.clip(page_table, 0, kv.shape[0] - 1)
    if kv_scales is None:
        return _sparse_attention(scale, q, kv, indices, page_table)
    return _attend(scale, *jax.lax.stop_gradient((q, kv)), indices, page_table, kv_scales)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sparse_attention(scale: float, q: jax.Array, kv: jax.Array, indices: jax.Array, page_table: jax.Array) -> _Results:
    return _forward(scale, q, kv, indices, page_table)[0]


def _forward(
    scale: float, q: jax.Array, kv: jax.Array, indices: jax.Array, page_table: jax.Array
) -> tuple[_Results, tuple[jax.Array, ...]]:
    found = _attend(scale, q, kv, indices, page_table, None)
    return found, (q, kv, indices, page_table, *found)


def _attend(
    scale: float,
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    page_table: jax.Array,
    kv_scales: jax.Array | None,
) -> _Results:
    gpu = _attend_to_all if _all_is_less(q, kv, indices, page_table) else _gather(_GPU_WORKSPACE_BYTES)
    gpu, elsewhere = (functools.partial(run, scale) for run in (gpu, _gather(_WORKSPACE_BYTES)))
    return portable.on_gpus(gpu, elsewhere, q, kv, indices, page_table, kv_scales)


def _gather(workspace: int) -> Any:
    return functools.partial(_attend_to_gathered, workspace)


def _attend_to_gathered(
    workspace: int,
    scale: float,
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    page_table: jax.Array,
    kv_scales: jax.Array | None,
) -> _Results:
    batch, queries, heads, dim = q.shape
    kv_heads = kv.shape[2] // 2
    top_k = indices.shape[-1]
    rows = kv.reshape(-1, 2 * kv_heads, dim)
    scales = None if kv_scales is None else kv_scales.reshape(-1, 2 * kv_heads)

    def attend(one: tuple[jax.Array, jax.Array, jax.Array]) -> _Results:
        query, address, valid = one  # [n, d], [top_k], [top_k]
        gathered = paging.scaled(rows[address], None if scales is None else scales[address], query.dtype)
        keys, values = jnp.split(gathered, 2, axis=1)
        grouped = query.reshape(kv_heads, heads // kv_heads, dim)
        logits = jnp.einsum("kgd,skd->kgs", grouped, keys, preferred_element_type=jnp.float32) * scale
        probabilities, lse = _softmax(jnp.where(valid, logits, -jnp.inf))
        out = jnp.einsum("kgs,skd->kgd", probabilities.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return out.reshape(heads, dim).astype(query.dtype), lse.reshape(heads)

    total = batch * queries
    addresses = _addresses(kv, indices, page_table).reshape(total, top_k)
    inputs = (q.reshape(total, heads, dim), addresses, (indices >= 0).reshape(total, top_k))
    at_once = _at_once(total, top_k, paging.scaled_row_bytes(kv, q.dtype), workspace)
    blocks = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), _pad(inputs, -total % at_once))
    out, lse = portable.map_blocks(jax.vmap(attend), blocks, q)
    return out.reshape(-1, heads, dim)[:total].reshape(q.shape), lse.reshape(-1, heads)[:total].reshape(q.shape[:3])


def _all_is_less(q: jax.Array, kv: jax.Array, indices: jax.Array, page_table: jax.Array) -> bool:
    """Whether attention to all rows under a mask moves fewer bytes on a GPU, and a copy of them fits the workspace."""
    (batch, queries, heads, _), capacity = q.shape, page_table.shape[1] * kv.shape[1]
    row = paging.scaled_row_bytes(kv, q.dtype)
    fits = batch * capacity * row <= _GPU_WORKSPACE_BYTES
    return fits and _moves_less(queries, heads, capacity, indices.shape[-1], row)


def _moves_less(queries: int, heads: int, capacity: int, top_k: int, row_bytes: int) -> bool:
    masked = capacity * (queries * heads * _LOGIT_BYTES + row_bytes)
    return masked < queries * top_k * _GATHERED_TIMES * row_bytes


def _masked_at_once(batch: int, queries: int, heads: int, capacity: int) -> int:
    """Queries of each sequence whose logits under a mask fill the workspace; at least one, at most all."""
    return min(queries, max(1, _GPU_WORKSPACE_BYTES // (batch * heads * capacity * 4)))


def gpu_bytes(queries: int, heads: int, capacity: int, top_k: int, row_bytes: int, itemsize: int) -> int:
    """Bytes that attention of one sequence takes on GPUs besides arguments and results.

    Args:
      queries, heads, top_k: how many.
      capacity: positions of the page table.
      row_bytes: of a position's keys and values, as `paging.scaled_row_bytes` gives them.
      itemsize: bytes of a probability.
    """
    if capacity * row_bytes <= _GPU_WORKSPACE_BYTES and _moves_less(queries, heads, capacity, top_k, row_bytes):
        logits = _masked_at_once(1, queries, heads, capacity) * heads * capacity
        return logits * (4 + itemsize) + capacity * row_bytes
    # The rows, their keys once more in the order of the product, and the logits.
    return _at_once(queries, top_k, row_bytes, _GPU_WORKSPACE_BYTES) * top_k * (row_bytes * 3 // 2 + 4 * heads)


def _attend_to_all(
    scale: float,
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    page_table: jax.Array,
    kv_scales: jax.Array | None,
) -> _Results:
    batch, queries, heads, dim = q.shape
    kv_heads, capacity = kv.shape[2] // 2, page_table.shape[1] * kv.shape[1]
    gathered = paging.scaled(kv[page_table], None if kv_scales is None else kv_scales[page_table], q.dtype)
    keys, values = jnp.split(gathered.reshape(batch, capacity, 2 * kv_heads, dim), 2, axis=2)

    def attend(some: tuple[jax.Array, jax.Array]) -> _Results:
        q, indices = some  # [b, i, n, d], [b, i, top_k]
        chosen = vary_like(jnp.zeros((*indices.shape[:2], capacity), bool), indices)
        sequence, query = (x[..., None] for x in jnp.indices(indices.shape[:2]))
        chosen = chosen.at[sequence, query, jnp.where(indices < 0, capacity, indices)].set(True, mode="drop")
        grouped = q.reshape(*q.shape[:2], kv_heads, heads // kv_heads, dim)
        logits = jnp.einsum("bikgd,bskd->bkigs", grouped, keys, preferred_element_type=jnp.float32) * scale
        probabilities, lse = _softmax(jnp.where(chosen[:, None, :, None], logits, -jnp.inf))
        out = jnp.einsum(
            "bkigs,bskd->bikgd", probabilities.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        return out.reshape(q.shape).astype(q.dtype), jnp.moveaxis(lse, 1, 2).reshape(q.shape[:3])

    turns = math.ceil(queries / _masked_at_once(batch, queries, heads, capacity))
    padding = -queries % turns

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, turns, -1, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :queries]

    return jax.tree.map(join, portable.map_blocks(attend, (split(q), split(indices)), q))


def _softmax(logits: jax.Array) -> _Results:
    """Softmax along the last axis, and its log-sum-exp; zeros and -inf where all are -inf."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), lse


def _backward(scale: float, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """`dS = P (dO V^T - rowsum(O dO) + dL)`, L the log-sum-exps: FlashAttention, arXiv 2205.14135, algorithm 4."""
    q, kv, indices, page_table, out, lse = saved
    addresses, valid = _addresses(kv, indices, page_table), indices >= 0
    batch, queries, heads, dim = q.shape
    total, top_k, kv_heads = batch * queries, addresses.shape[-1], kv.shape[2] // 2
    rows = kv.reshape(-1, 2 * kv_heads, dim)
    d_out, d_lse = (x.astype(jnp.float32) for x in cotangents)
    d_rest = d_lse - jnp.sum(out.astype(jnp.float32) * d_out, axis=-1)

    def run(d_rows: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query, address, valid, d_out, d_rest, lse = block
        keys, values = jnp.split(rows[address], 2, axis=2)  # [r, s, k, d]
        dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        logits = dot("rkgd,rskd->rkgs", query, keys) * scale
        probabilities = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
        probabilities = jnp.where(valid[:, None, None], probabilities, 0.0)
        d_s = probabilities * (dot("rkgd,rskd->rkgs", d_out, values) + d_rest[..., None]) * scale
        d_q = dot("rkgs,rskd->rkgd", d_s, keys)
        parts = dot("rkgs,rkgd->rskd", d_s, query), dot("rkgs,rkgd->rskd", probabilities, d_out)
        d_gathered = jnp.where(valid[..., None, None], jnp.concatenate(parts, axis=2), 0.0)
        return d_rows.at[address].add(d_gathered), d_q

    at_once = _at_once(total, top_k, paging.scaled_row_bytes(kv, q.dtype), _WORKSPACE_BYTES)
    grouped = (total, kv_heads, heads // kv_heads)
    inputs = (q.reshape(*grouped, dim), addresses.reshape(total, top_k), valid.reshape(total, top_k))
    inputs += (d_out.reshape(*grouped, dim), d_rest.reshape(grouped), lse.reshape(grouped))
    blocks = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), _pad(inputs, -total % at_once))
    d_rows = vary_like(jnp.zeros(rows.shape, jnp.float32), q)
    d_rows, d_q = jax.lax.scan(run, d_rows, blocks)
    d_q = d_q.reshape(-1, heads, dim)[:total].reshape(q.shape)
    return d_q.astype(q.dtype), d_rows.reshape(kv.shape).astype(kv.dtype), None, None


_sparse_attention.defvjp(_forward, _backward)


def _addresses(kv: jax.Array, indices: jax.Array, page_table: jax.Array) -> jax.Array:
    """Rows of the pool, int32 `[b, t, top_k]`; any row for an index below 0."""
    return paging.slots(page_table, jnp.maximum(indices, 0), kv.shape[1])


def _at_once(total: int, top_k: int, row_bytes: int, workspace: int) -> int:
    """Queries whose rows fill a workspace."""
    bytes_per_query = top_k * row_bytes
    at_once = max(1, min(total, workspace // bytes_per_query))
    # Equal blocks leave no remainder, which would be compiled separately.
    return math.ceil(total / math.ceil(total / at_once))


def _pad(inputs: tuple[jax.Array, ...], padding: int) -> tuple[jax.Array, ...]:
    return jax.tree.map(lambda x: jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)), inputs)
