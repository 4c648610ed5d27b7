"""Portable implementations: the formulas of a decoder layer, with its roundings."""

import jax
import jax.numpy as jnp

from pallas_kernels.portable import small_top_k


def decode_projections(
    x: jax.Array,
    norm: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index_q: jax.Array,
    index_k: jax.Array,
    q_norm: jax.Array,
    k_norm: jax.Array,
    index_q_norm: jax.Array,
    index_k_norm: jax.Array,
    index_k_bias: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    index_cos: jax.Array,
    index_sin: jax.Array,
    kv_pages: jax.Array | None,
    index_pages: jax.Array | None,
    slots: jax.Array | None,
    *,
    index_heads: int,
    eps: float,
    index_eps: float,
) -> tuple[jax.Array, ...]:
    """See `api.decode_projections`."""
    x = _rms_norm(x, norm, eps)
    queries = _rotate(_rms_norm(_product(x, q), q_norm, eps), cos, sin)
    keys = _rotate(_rms_norm(_product(x, k), k_norm, eps), cos, sin)
    rows = jnp.concatenate([keys, _product(x, v)], axis=1)
    index_rows, dim = _product(x, index_q), index_k.shape[0]
    index_queries, gates = jnp.split(index_rows, [index_heads * dim], axis=1)
    index_queries = _rms_norm(index_queries.reshape(-1, index_heads, dim), index_q_norm, index_eps)
    index_queries = _rotate(index_queries, index_cos, index_sin)
    index_keys = _layer_norm(_product(x, index_k), index_k_norm, index_k_bias, index_eps)
    index_keys = _rotate(index_keys[:, None], index_cos, index_sin)[:, 0]
    if kv_pages is not None and index_pages is not None and slots is not None:
        rows, index_keys = _write(kv_pages, slots, rows), _write(index_pages, slots, index_keys)
    return queries, index_queries, gates.astype(jnp.float32), rows, index_keys


def output_projection(attended: jax.Array, weight: jax.Array, residual: jax.Array) -> jax.Array:
    """See `api.output_projection`."""
    contracted = ((1, 2), (1, 2)), ((), ())
    out = jax.lax.dot_general(attended, weight, contracted, preferred_element_type=jnp.float32)
    return residual + out.astype(residual.dtype)


def route(
    x: jax.Array, norm: jax.Array, router: jax.Array, *, top_k: int, eps: float, normalise: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.route`."""
    normed = _rms_norm(x, norm, eps)
    logits = jax.lax.dot_general(normed, router, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    weights, experts = small_top_k(jax.nn.softmax(logits, axis=-1), top_k)
    if normalise:
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    return normed, experts, weights


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`[tokens, in]` times `[..., in]`, `[tokens, ...]` in the dtype of x."""
    contracted = (((1,), (weight.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contracted, preferred_element_type=jnp.float32).astype(x.dtype)


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * weight.astype(jnp.float32)).astype(x.dtype)


def _layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    x32 -= jnp.mean(x32, axis=-1, keepdims=True)
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Heads `[tokens, n, 2 * h]` rotated by angles, of which `[tokens, h]` are cosines and sines."""
    cos, sin = cos[:, None], sin[:, None]
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def _write(pages: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    flat = pages.reshape(pages.shape[0] * pages.shape[1], *pages.shape[2:])
    # A negative slot would count from the end.
    slots = jnp.where(slots < 0, len(flat), slots)
    return flat.at[slots].set(rows.astype(pages.dtype), mode="drop").reshape(pages.shape)
