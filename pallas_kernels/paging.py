"""Addresses in paged arrays, and what is read there."""

import math

import jax
import jax.numpy as jnp

MIN_CHUNK = 512
"""Fewest key positions that are worth one turn of a loop."""


def slots(page_table: jax.Array, positions: jax.Array, page_size: int) -> jax.Array:
    """Rows of the flattened pages `[p * page_size, ...]` that hold `positions`.

    Args:
      page_table: int32 `[b, m]`.
      positions: int32 `[b, ...]`, each from 0 to `m * page_size - 1`.
      page_size: positions of one page.

    Returns:
      int32, the shape of `positions`.
    """
    sequence = jnp.arange(page_table.shape[0]).reshape((-1,) + (1,) * (positions.ndim - 1))
    return page_table[sequence, positions // page_size] * page_size + positions % page_size


def pages_per_chunk(page_table: jax.Array, page_size: int, bytes_per_position: int, workspace: int) -> int:
    """The number of pages whose positions fill a workspace.

    A chunk has at least `MIN_CHUNK` positions and at most all of a sequence's pages. A chunk that holds everything
    needs no loop: on an accelerator every turn of a loop costs a round trip to the host.

    Args:
      page_table: int32 `[b, m]`.
      page_size: positions of one page.
      bytes_per_position: bytes of workspace that one key position takes.
      workspace: bytes.
    """
    positions = max(MIN_CHUNK, workspace // bytes_per_position)
    return min(page_table.shape[1], max(1, positions // page_size))


def pages_of_chunk(page_table: jax.Array, chunk: jax.Array | int, pages_per_chunk: int) -> jax.Array:
    """Page numbers int32 `[b, pages_per_chunk]` of key chunk number `chunk`; `page_table` is padded to whole chunks."""
    return jax.lax.dynamic_slice_in_dim(page_table, chunk * pages_per_chunk, pages_per_chunk, axis=1)


def pad_to_chunks(page_table: jax.Array, pages_per_chunk: int) -> jax.Array:
    """`page_table` with columns of page 0 added up to a whole number of chunks. Callers mask the added positions."""
    return jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages_per_chunk)))


def scaled(rows: jax.Array, scales: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Gathered keys and values as numbers to multiply.

    Args:
      rows: `[..., 2 * k, d]`.
      scales: float32 `[..., 2 * k]`, factors on the rows; None for ones.
      dtype: of the result if the rows have scales or are float8; other rows keep their own.
    """
    if scales is not None:
        return (rows.astype(jnp.float32) * scales[..., None]).astype(dtype)
    return rows.astype(dtype) if rows.dtype.itemsize == 1 else rows


def scaled_row_bytes(kv: jax.Array, dtype: jnp.dtype) -> int:
    """Bytes of a position's keys and values as `scaled` gives them for `dtype`."""
    return math.prod(kv.shape[2:]) * (dtype if kv.dtype.itemsize == 1 else kv.dtype).itemsize
