"""Attention of neighbouring queries to the union of their selected keys, on Hopper GPUs."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.wgmma import ROWS
from pallas_kernels.sparse_attention.mosaic_gpu.attend import attend, check
from pallas_kernels.sparse_attention.mosaic_gpu.gather import DIM, GROUP, STEP
from pallas_kernels.sparse_attention.mosaic_gpu.unions import build_unions, unions_of_bits


def sparse_prefill(
    q: jax.Array, kv: jax.Array, indices: jax.Array, page_table: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """`sparse_attention` in groups of 16 neighbouring queries, each group over the union of its selections."""
    queries = q.shape[1]
    padding = -queries % GROUP
    if padding:
        q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
        indices = jnp.pad(indices, ((0, 0), (0, padding), (0, 0)), constant_values=-1)
    build = functools.partial(build_unions, indices)
    out, lse = _attend_to_unions(build, q, kv, page_table, top_k=indices.shape[2], scale=scale)
    return out[:, :queries], lse[:, :queries]


def bits_prefill(
    q: jax.Array,
    kv: jax.Array,
    bits: jax.Array,
    reach: jax.Array,
    page_table: jax.Array,
    *,
    top_k: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """`sparse_prefill` with selections as bitmaps. The result has the same bits.

    Args:
      q: bfloat16 `[b, t, n, 128]`, t a multiple of 16.
      kv, page_table, scale: as for `sparse_attention`.
      bits: int32 `[b * t, w]`, see `select_bits`.
      reach: int32 `[b * t / 16]`, the number of positions that each 16 queries see.
      top_k: most positions that a query selects.

    Returns:
      As `sparse_attention`.

    Raises:
      NotImplementedError: dtypes or sizes that the kernels do not take.
    """
    build = functools.partial(unions_of_bits, bits, reach)
    return _attend_to_unions(build, q, kv, page_table, top_k=top_k, scale=scale)


def _attend_to_unions(build, q, kv, page_table, *, top_k, scale):
    """`build` makes the lists. t is a multiple of 16."""
    heads, dim = q.shape[2:]
    # Half of a group's rows are one warpgroup's.
    split = GROUP * heads == 2 * ROWS * check(q, kv, scale)
    page_size = kv.shape[1]
    limit = -(-min(GROUP * top_k, page_table.shape[1] * page_size) // STEP) * STEP
    unions = build(page_table, page_size=page_size, limit=limit, split=split)
    out, lse = union_attention(q.reshape(-1, heads, dim), kv, *unions, scale=scale)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def union_attention(
    q: jax.Array,
    kv: jax.Array,
    slots: jax.Array,
    members: jax.Array,
    counts: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of groups of 16 neighbouring queries over the union of their selected keys.

    Args:
      q: bfloat16 `[t, n, 128]`. Queries `16 * g` to `16 * g + 15` are group g; the last group may be short.
      kv: bfloat16 `[p, page_size, 2 * k, 128]` pages. A row holds the keys of all k heads, then their values. n / k is
        at most 64, and not 9 to 12, 17 to 20 and so on.
      slots: int32 `[ceil(t / 16), u]` rows of the flattened pages; an entry below 0 is no key. If u is no multiple of
        128, the lists are copied.
      members: int32 `[ceil(t / 16), u]`; bit i is set if query i of the group attends to the key.
      counts: int32 `[ceil(t / 16), 3]`, the number of keys in three parts of each list. The first part is for the first
        8 queries of a group alone, and the second for the other 8; they are multiples of 128, and 0 unless n / k is 8.
        Entries behind the last part are not read.
      scale: factor on the dot products, above 0.

    Returns:
      bfloat16 `[t, n, 128]`, and the log-sum-exp of the scaled dot products, float32 `[t, n]`. A query without keys
      gets zeros and -inf.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take.
      ValueError: the lists do not fit the queries.
    """
    queries, heads, _ = q.shape
    kv_heads = check(q, kv, scale)
    groups = -(-queries // GROUP)
    if slots.shape != members.shape or slots.shape[0] != groups or counts.shape != (groups, 3):
        raise ValueError(f"{slots.shape=}, {members.shape=}, {counts.shape=} do not fit {groups} groups")
    q_per_kv = heads // kv_heads
    pieces = -(-GROUP * q_per_kv // ROWS)
    if pieces > 1 and pieces % 2:
        raise NotImplementedError(f"{q_per_kv} query heads on a KV head: {GROUP} queries fill no pairs of warpgroups")
    packed = q.reshape(queries, kv_heads, q_per_kv, DIM) if q_per_kv in (8, 16, 32, 64) else _pack(q, kv_heads)
    padding = ((0, 0), (0, -slots.shape[1] % STEP))
    slots, members = jnp.pad(slots, padding), jnp.pad(members, padding)
    out, lse = attend(packed, kv, slots, members, counts, q_per_kv=q_per_kv, group=GROUP, scale=scale)
    if packed.shape[2] != q_per_kv:
        out, lse = (_unpack(x, queries, q_per_kv) for x in (out, lse))
    return out.reshape(q.shape), lse.reshape(queries, heads)


def _pack(q: jax.Array, kv_heads: int) -> jax.Array:
    """`[t, n, d]` to blocks of 64 rows `[groups * blocks, k, 64, d]`. A group's rows are in the order (query, head)."""
    queries, heads, dim = q.shape
    q_per_kv = heads // kv_heads
    q = jnp.pad(q, ((0, -queries % GROUP), (0, 0), (0, 0)))
    q = q.reshape(-1, GROUP, kv_heads, q_per_kv, dim).swapaxes(1, 2).reshape(-1, kv_heads, GROUP * q_per_kv, dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -q.shape[2] % ROWS), (0, 0)))
    return q.reshape(q.shape[0], kv_heads, -1, ROWS, dim).swapaxes(1, 2).reshape(-1, kv_heads, ROWS, dim)


def _unpack(x: jax.Array, queries: int, q_per_kv: int) -> jax.Array:
    """Undoes `_pack`: `[groups * blocks, k, 64, ...]` to `[t, k, q_per_kv, ...]`."""
    blocks = -(-GROUP * q_per_kv // ROWS)
    kv_heads, tail = x.shape[1], x.shape[3:]
    x = x.reshape(-1, blocks, kv_heads, ROWS, *tail).swapaxes(1, 2).reshape(-1, kv_heads, blocks * ROWS, *tail)
    x = x[:, :, : GROUP * q_per_kv].reshape(-1, kv_heads, GROUP, q_per_kv, *tail).swapaxes(1, 2)
    return x.reshape(-1, kv_heads, q_per_kv, *tail)[:queries]
