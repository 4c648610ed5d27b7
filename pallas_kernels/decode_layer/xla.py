"""Portable implementations: the formulas of a decoder layer, with its roundings."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import sort_rows, take_rows
from pallas_kernels.portable import small_top_k


def finish_projections(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index: jax.Array,
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
    eps: float,
    index_eps: float,
) -> tuple[jax.Array, ...]:
    """See `api.finish_projections`."""
    queries = _rotate(_rms_norm(q, q_norm, eps), cos, sin)
    rows = jnp.concatenate([_rotate(_rms_norm(k, k_norm, eps), cos, sin), v], axis=1)
    tokens, dim = index_k.shape
    index_heads = index.shape[1] // (dim + 1)
    index_queries, gates = jnp.split(index, [index_heads * dim], axis=1)
    index_queries = _rms_norm(index_queries.reshape(tokens, index_heads, dim), index_q_norm, index_eps)
    index_queries = _rotate(index_queries, index_cos, index_sin)
    index_keys = _layer_norm(index_k, index_k_norm, index_k_bias, index_eps)
    index_keys = _rotate(index_keys[:, None], index_cos, index_sin)[:, 0]
    if kv_pages is not None and index_pages is not None and slots is not None:
        rows, index_keys = _write(kv_pages, slots, rows), _write(index_pages, slots, index_keys)
    return queries, index_queries, gates.astype(jnp.float32), rows, index_keys


def route(
    x: jax.Array,
    update: jax.Array,
    norm: jax.Array,
    router: jax.Array,
    valid: jax.Array,
    first_own: jax.Array | None,
    *,
    top_k: int,
    eps: float,
    normalise: bool,
    own: int | None,
) -> tuple[jax.Array, ...]:
    """See `api.route`."""
    y = x + update
    normed = _rms_norm(y, norm, eps)
    logits = jax.lax.dot_general(normed, router, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    weights, experts = small_top_k(jax.nn.softmax(logits, axis=-1), top_k)
    if normalise:
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    number = len(router) if own is None else own
    from_first = experts if first_own is None else experts - first_own
    here = valid[:, None] & (from_first >= 0) & (from_first < number)
    weights = jnp.where(here, weights, 0.0)
    return y, normed, experts, weights, *_sort_by_expert(normed, jnp.where(here, from_first, number), number)


def _sort_by_expert(normed: jax.Array, experts: jax.Array, number: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`rows`, `row_of` and `group_sizes` of `api.Routed`, of expert 0 to this number, which is for rows of none."""
    keys = experts.reshape(-1)
    order, row_of = sort_rows(keys)
    group_sizes = jnp.sum(keys == jnp.arange(number)[:, None], axis=-1, dtype=jnp.int32)
    rows = take_rows(normed, order // experts.shape[1])
    return rows, row_of.reshape(experts.shape).astype(jnp.int32), group_sizes


def gather_tokens(x: jax.Array, update: jax.Array, addresses: jax.Array | None, *, axes: tuple[str, ...]) -> jax.Array:
    """See `api.gather_tokens`."""
    del addresses
    y = x + update
    with jax.named_scope("collectives"):
        return jax.lax.all_gather(y, axes, tiled=True) if axes else y


def combine_experts(
    rows: jax.Array,
    row_of: jax.Array,
    weights: jax.Array,
    x: jax.Array,
    norm: jax.Array,
    addresses: jax.Array | None,
    *,
    eps: float,
    axes: tuple[str, ...],
    summed: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """See `api.combine_experts`."""
    del addresses
    # One term for each of the few experts: XLA gathers and adds in one pass, without an array of all terms.
    taken = (jnp.take(rows, row_of[:, i], axis=0, mode="clip") for i in range(row_of.shape[1]))
    terms = (weights[:, i, None] * row for i, row in enumerate(taken))
    mixed = functools.reduce(jnp.add, terms).astype(x.dtype)
    return add_over_devices(mixed, x, norm, eps, axes, summed)


def add_over_devices(
    mixed: jax.Array, x: jax.Array, norm: jax.Array, eps: float, axes: tuple[str, ...], summed: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Adds to the tokens what the experts of all devices gave, and norms; axes as for `api.combine_experts`."""
    with jax.named_scope("collectives"):
        if axes:
            mixed = jax.lax.psum_scatter(mixed, axes, tiled=True)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * len(mixed), len(mixed))
        mixed = jax.lax.psum(mixed, summed) if summed else mixed
    y = x + mixed
    return y, _rms_norm(y, norm, eps)


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
