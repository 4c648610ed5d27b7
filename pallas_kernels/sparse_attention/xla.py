"""Portable sparse attention: gathers the selected rows of a few queries at a time."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import paging

_WORKSPACE_BYTES = 64 * 2**20


def sparse_attention(
    q: jax.Array, kv: jax.Array, indices: jax.Array, page_table: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    batch, queries, heads, dim = q.shape
    kv_heads = kv.shape[2] // 2
    top_k = indices.shape[-1]
    rows = kv.reshape(-1, 2 * kv_heads, dim)
    addresses = paging.slots(page_table, jnp.maximum(indices, 0), kv.shape[1])

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
    inputs = (q.reshape(total, heads, dim), addresses.reshape(total, top_k), (indices >= 0).reshape(total, top_k))
    bytes_per_query = top_k * 2 * kv_heads * dim * kv.dtype.itemsize
    at_once = max(1, min(total, _WORKSPACE_BYTES // bytes_per_query))
    # Equal blocks leave no remainder, which would be compiled separately.
    at_once = math.ceil(total / math.ceil(total / at_once))
    padding = -total % at_once
    inputs = jax.tree.map(lambda x: jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)), inputs)
    out, lse = jax.lax.map(attend, inputs, batch_size=at_once)
    return out[:total].reshape(q.shape), lse[:total].reshape(q.shape[:3])
