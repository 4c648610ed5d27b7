"""Portable indexer scores: processes chunks of keys, and only chunks that some query sees."""

import jax
import jax.numpy as jnp

from pallas_kernels import paging

_WORKSPACE_BYTES = 8 * 2**20


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
) -> jax.Array:
    """See `api.indexer_scores`. It ignores `fill` and always fills."""
    del fill
    batch, queries, heads, _ = q.shape
    page_size = keys.shape[1]
    capacity = page_table.shape[1] * page_size
    pages_per_chunk = paging.pages_per_chunk(page_table, page_size, batch * queries * heads * 4, _WORKSPACE_BYTES)
    chunk_size = pages_per_chunk * page_size
    table = paging.pad_to_chunks(page_table, pages_per_chunk)
    query_positions = query_start[:, None] + jnp.arange(queries)
    gates = weights.astype(jnp.float32) * scale
    wide_q = _widen(q)

    def score_chunk(chunk: jax.Array | int) -> jax.Array:
        pages = paging.pages_of_chunk(table, chunk, pages_per_chunk)
        chunk_keys = _widen(keys[pages]).reshape(batch, chunk_size, -1)
        dots = jnp.einsum("btnd,bsd->btns", wide_q, chunk_keys, preferred_element_type=jnp.float32)
        chunk_scores = jnp.einsum("btns,btn->bts", jax.nn.relu(dots), gates)
        if key_scales is not None:
            chunk_scores *= key_scales[pages].reshape(batch, 1, chunk_size)
        positions = chunk * chunk_size + jnp.arange(chunk_size)
        visible = positions <= query_positions[..., None]
        return jnp.where(visible, chunk_scores, -jnp.inf)

    def write_chunk(chunk: jax.Array, scores: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(scores, score_chunk(chunk), chunk * chunk_size, axis=2)

    if chunk_size >= capacity:
        return score_chunk(0)
    seen = jnp.max(query_start) + queries
    chunks = jnp.minimum((seen + chunk_size - 1) // chunk_size, table.shape[1] // pages_per_chunk)
    scores = jnp.full((batch, queries, table.shape[1] * page_size), -jnp.inf, jnp.float32)
    return jax.lax.fori_loop(0, chunks, write_chunk, scores)[..., :capacity]


def _widen(x: jax.Array) -> jax.Array:
    """`x`, with float8 converted to bfloat16, which holds every float8 number. Not every platform multiplies float8."""
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float8_e4m3fn else x
