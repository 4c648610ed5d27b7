"""Portable sparse attention: gathers the selected rows of a few queries at a time."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import paging
from pallas_kernels.meshes import vary_like

_WORKSPACE_BYTES = 64 * 2**20


def sparse_attention(
    q: jax.Array, kv: jax.Array, indices: jax.Array, page_table: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """See `api.sparse_attention`. It has a gradient, which gathers the rows again."""
    return _sparse_attention(scale, q, kv, *_addresses(kv, indices, page_table))


def _addresses(kv: jax.Array, indices: jax.Array, page_table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of the pool, int32 `[b, t, top_k]`, and whether they are attended to."""
    pages, page_size = kv.shape[:2]
    capacity = page_table.shape[1] * page_size
    valid = (indices >= 0) & (indices < capacity)
    table = jnp.clip(page_table, 0, pages - 1)
    return paging.slots(table, jnp.clip(indices, 0, capacity - 1), page_size), valid


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sparse_attention(
    scale: float, q: jax.Array, kv: jax.Array, addresses: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _forward(scale, q, kv, addresses, valid)[0]


def _forward(
    scale: float, q: jax.Array, kv: jax.Array, addresses: jax.Array, valid: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    batch, queries, heads, dim = q.shape
    kv_heads = kv.shape[2] // 2
    top_k = addresses.shape[-1]
    rows = kv.reshape(-1, 2 * kv_heads, dim)

    def attend(one: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        query, address, valid = one  # [n, d], [top_k], [top_k]
        keys, values = jnp.split(rows[address], 2, axis=1)
        grouped = query.reshape(kv_heads, heads // kv_heads, dim)
        logits = jnp.einsum("kgd,skd->kgs", grouped, keys, preferred_element_type=jnp.float32) * scale
        logits = jnp.where(valid, logits, -jnp.inf)
        lse = jax.nn.logsumexp(logits, axis=-1)
        probabilities = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]).astype(values.dtype)
        out = jnp.einsum("kgs,skd->kgd", probabilities, values, preferred_element_type=jnp.float32)
        return out.reshape(heads, dim).astype(query.dtype), lse.reshape(heads)

    total = batch * queries
    inputs = (q.reshape(total, heads, dim), addresses.reshape(total, top_k), valid.reshape(total, top_k))
    at_once = _at_once(total, top_k, kv)
    out, lse = jax.lax.map(attend, _pad(inputs, -total % at_once), batch_size=at_once)
    found = out[:total].reshape(q.shape), lse[:total].reshape(q.shape[:3])
    return found, (q, kv, addresses, valid, *found)


def _backward(scale: float, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """`dS = P (dO V^T - rowsum(O dO) + dL)`, L the log-sum-exps: FlashAttention, arXiv 2205.14135, algorithm 4."""
    q, kv, addresses, valid, out, lse = saved
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

    at_once = _at_once(total, top_k, kv)
    grouped = (total, kv_heads, heads // kv_heads)
    inputs = (q.reshape(*grouped, dim), addresses.reshape(total, top_k), valid.reshape(total, top_k))
    inputs += (d_out.reshape(*grouped, dim), d_rest.reshape(grouped), lse.reshape(grouped))
    blocks = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), _pad(inputs, -total % at_once))
    d_rows = vary_like(jnp.zeros(rows.shape, jnp.float32), q)
    d_rows, d_q = jax.lax.scan(run, d_rows, blocks)
    d_q = d_q.reshape(-1, heads, dim)[:total].reshape(q.shape)
    return d_q.astype(q.dtype), d_rows.reshape(kv.shape).astype(kv.dtype), None, None


_sparse_attention.defvjp(_forward, _backward)


def _at_once(total: int, top_k: int, kv: jax.Array) -> int:
    """Queries whose rows fill a workspace."""
    bytes_per_query = top_k * math.prod(kv.shape[2:]) * kv.dtype.itemsize
    at_once = max(1, min(total, _WORKSPACE_BYTES // bytes_per_query))
    # Equal blocks leave no remainder, which would be compiled separately.
    return math.ceil(total / math.ceil(total / at_once))


def _pad(inputs: tuple[jax.Array, ...], padding: int) -> tuple[jax.Array, ...]:
    return jax.tree.map(lambda x: jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)), inputs)
