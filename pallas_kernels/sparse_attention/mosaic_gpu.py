"""Sparse attention on Hopper GPUs (Pallas Mosaic GPU): unions of neighbouring queries, or one query at a time."""

import jax
import jax.numpy as jnp

from pallas_kernels import paging
from pallas_kernels.sparse_attention.attend import Config, attend, check
from pallas_kernels.sparse_attention.gather import DIM, GROUP, TILE
from pallas_kernels.sparse_attention.prefill import sparse_prefill

_SM_COUNT = 132
_CONFIG = Config(tiles=1, stages=3)


def sparse_attention(
    q: jax.Array, kv: jax.Array, indices: jax.Array, page_table: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the selected positions, which neighbouring queries are best to share.

    Args:
      q: bfloat16 `[b, t, n, 128]`.
      kv: bfloat16 `[p, page_size, 2 * k, 128]` pages; a row holds the keys of all k heads, then their values.
        n / k is at most 64.
      indices: int32 `[b, t, top_k]` positions each query attends to, all its heads alike, none twice; -1 is ignored.
      page_table: int32 `[b, m]`.
      scale: factor on the dot products, above 0.

    Returns:
      bfloat16 `[b, t, n, 128]`, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`. A query with no
      selected position gets zeros and -inf.
    """
    run = single_queries if q.shape[1] < GROUP else sparse_prefill
    return run(q, kv, indices, page_table, scale=scale)


def single_queries(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    page_table: jax.Array,
    *,
    scale: float,
    splits: int | None = None,
    config: Config = _CONFIG,
) -> tuple[jax.Array, jax.Array]:
    """`sparse_attention` one query at a time: for decode.

    Args:
      splits: CTAs that share the keys of one query and KV head; None chooses.
      config: tuning.
    """
    batch, length, heads, _ = q.shape
    kv_heads = check(q, kv, scale)
    queries, share = batch * length, heads // kv_heads
    rows = next(r for r in (8, 16, 32, 64) if r >= share)
    slots = jnp.where(indices >= 0, paging.slots(page_table, jnp.maximum(indices, 0), kv.shape[1]), -1)
    slots = slots.reshape(queries, -1)
    slots = jnp.pad(slots, ((0, 0), (0, -slots.shape[1] % (config.tiles * TILE))), constant_values=-1)
    packed = jnp.pad(q.reshape(queries, kv_heads, share, DIM), ((0, 0), (0, 0), (0, rows - share), (0, 0)))
    if splits is None:
        splits = max(1, min(slots.shape[1] // (2 * TILE), 2 * _SM_COUNT // (queries * kv_heads)))
    out, lse = attend(
        packed,
        kv,
        slots,
        (slots >= 0).astype(jnp.int32),
        jnp.full((queries,), slots.shape[1], jnp.int32),
        share=share,
        group=1,
        splits=splits,
        scale=scale,
        config=config,
    )
    if splits > 1:
        highest = jnp.max(lse, axis=0)
        weights = jnp.exp(lse - jnp.where(jnp.isfinite(highest), highest, 0.0))
        total = jnp.sum(weights, axis=0)
        out = jnp.sum(out * weights[..., None], axis=0) / jnp.where(total > 0, total, 1.0)[..., None]
        out, lse = out.astype(q.dtype), highest + jnp.log(total)
    return out[:, :, :share].reshape(q.shape), lse[:, :, :share].reshape(q.shape[:3])
