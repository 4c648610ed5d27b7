"""Portable indexer scores: processes chunks of keys, and not on GPUs only chunks that some query sees."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import paging, portable
from pallas_kernels.meshes import vary_like

_WORKSPACE_BYTES = 8 * 2**20
_GPU_WORKSPACE_BYTES = 256 * 2**20


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
    skip_below: int = 0,
) -> jax.Array:
    """See `api.indexer_scores`. It ignores `fill` and `skip_below`, and scores and fills all.

    It has a gradient, which scores the keys again.
    """
    del fill, skip_below
    table = jnp.clip(page_table, 0, keys.shape[0] - 1)
    return _indexer_scores(scale, q, weights, keys, key_scales, table, query_start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _indexer_scores(
    scale: float,
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    key_scales: jax.Array | None,
    page_table: jax.Array,
    query_start: jax.Array,
) -> jax.Array:
    return portable.on_gpus(
        functools.partial(_score_chunks, scale, True),
        functools.partial(_score_chunks, scale, False),
        *(q, weights, keys, key_scales, page_table, query_start),
    )


def _score_chunks(
    scale: float,
    on_gpu: bool,
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    key_scales: jax.Array | None,
    page_table: jax.Array,
    query_start: jax.Array,
) -> jax.Array:
    capacity = page_table.shape[1] * keys.shape[1]
    chunks = _Chunks.of(q, keys, page_table, query_start, on_gpu)
    wide_q = _widen(q)
    if chunks.number == 1:
        return chunks.score(scale, wide_q, weights, *chunks.load(0, keys, key_scales), 0)

    def write_chunk(chunk: jax.Array, scores: jax.Array) -> jax.Array:
        found = chunks.score(scale, wide_q, weights, *chunks.load(chunk, keys, key_scales), chunk)
        return jax.lax.dynamic_update_slice_in_dim(scores, found, chunk * chunks.size, axis=2)

    shape = (*q.shape[:2], chunks.number * chunks.size)
    # On GPUs every chunk is written.
    scores = portable.fill_after(shape, jnp.float32, q) if on_gpu else jnp.full(shape, -jnp.inf, jnp.float32)
    scores = vary_like(scores, q)
    return jax.lax.fori_loop(0, chunks.turns, write_chunk, scores)[..., :capacity]


def _forward(scale: float, *arrays: Any) -> tuple[jax.Array, Any]:
    return _indexer_scores(scale, *arrays), arrays


def _backward(scale: float, saved: Any, d_scores: jax.Array) -> Any:
    gpu, elsewhere = (functools.partial(_add_chunks, scale, on_gpu) for on_gpu in (True, False))
    return *portable.on_gpus(gpu, elsewhere, d_scores, *saved), None, None


def _add_chunks(scale: float, on_gpu: bool, d_scores: jax.Array, *saved: Any) -> Any:
    """The gradients of q, weights, keys and their scales."""
    q, weights, keys, key_scales, page_table, query_start = saved
    chunks = _Chunks.of(q, keys, page_table, query_start, on_gpu)
    d_scores = jnp.pad(d_scores, ((0, 0), (0, 0), (0, chunks.number * chunks.size - d_scores.shape[2])))
    wide_q, pools = _widen(q), (keys, key_scales)

    def add_chunk(chunk: jax.Array, sums: Any) -> Any:
        d_chunk = jax.lax.dynamic_slice_in_dim(d_scores, chunk * chunks.size, chunks.size, axis=2)
        loaded = chunks.load(chunk, *pools)
        _, pullback = jax.vjp(lambda *arrays: chunks.score(scale, *arrays, chunk=chunk), wide_q, weights, *loaded)
        d_q, d_weights, *d_loaded = pullback(d_chunk)
        pages = chunks.pages(chunk)

        def scatter(total: jax.Array, part: jax.Array) -> jax.Array:
            return total.at[pages].add(part.reshape(*pages.shape, *total.shape[1:]))

        d_pools = jax.tree.map(scatter, sums[2:], tuple(d_loaded))
        return sums[0] + d_q, sums[1] + d_weights, *d_pools

    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (q, weights, *pools))
    sums = jax.lax.fori_loop(0, chunks.turns, add_chunk, vary_like(sums, q))
    return jax.tree.map(lambda d, x: d.astype(x.dtype), sums, (q, weights, *pools))


_indexer_scores.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """Chunks of neighbouring keys.

    Attributes:
      size: keys of a chunk.
      number: of all chunks.
      table: page table, int32 `[b, m]`, padded to whole chunks.
      query_positions: int32 `[b, t]`.
      turns: of the loop over chunks.
    """

    size: int
    number: int
    table: jax.Array
    query_positions: jax.Array
    turns: jax.Array | int

    @classmethod
    def of(
        cls, q: jax.Array, keys: jax.Array, page_table: jax.Array, query_start: jax.Array, on_gpu: bool
    ) -> "_Chunks":
        batch, queries, heads, _ = q.shape
        page_size = keys.shape[1]
        workspace = _GPU_WORKSPACE_BYTES if on_gpu else _WORKSPACE_BYTES
        pages = paging.pages_per_chunk(page_table, page_size, batch * queries * heads * 4, workspace)
        table = paging.pad_to_chunks(page_table, pages)
        positions = query_start[:, None] + jnp.arange(queries)
        size, number = pages * page_size, table.shape[1] // pages
        seen = jnp.clip(jnp.max(positions) // size + 1, 0, number)
        return cls(size, number, table, positions, number if on_gpu else seen)

    def pages(self, chunk: jax.Array | int) -> jax.Array:
        return paging.pages_of_chunk(self.table, chunk, self.table.shape[1] // self.number)

    def load(
        self, chunk: jax.Array | int, keys: jax.Array, key_scales: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """A chunk's keys `[b, size, d]`, and their scales `[b, size]`."""
        pages = self.pages(chunk)
        loaded = _widen(keys[pages]).reshape(len(pages), self.size, -1)
        return loaded, None if key_scales is None else key_scales[pages].reshape(len(pages), self.size)

    def score(
        self,
        scale: float,
        q: jax.Array,
        weights: jax.Array,
        keys: jax.Array,
        key_scales: jax.Array | None,
        chunk: jax.Array | int,
    ) -> jax.Array:
        """Scores of a chunk's keys, float32 `[b, t, size]`."""
        dots = jnp.einsum("btnd,bsd->btns", q, keys, preferred_element_type=jnp.float32)
        scores = jnp.einsum("btns,btn->bts", jax.nn.relu(dots), weights.astype(jnp.float32) * scale)
        if key_scales is not None:
            scores *= key_scales[:, None]
        positions = chunk * self.size + jnp.arange(self.size)
        return jnp.where(positions <= self.query_positions[..., None], scores, -jnp.inf)


def _widen(x: jax.Array) -> jax.Array:
    """`x`, with float8 converted to bfloat16, which holds every float8 number. Not every platform multiplies float8."""
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float8_e4m3fn else x
