"""Dense decode on Hopper GPUs: every position is listed, and the lists attended to as in sparse decode.

Rows are read where they lie in their pages, once.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention.mosaic_gpu import sparse_attention


def paged_flash_attention(
    q: jax.Array, kv: jax.Array, page_table: jax.Array, query_start: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_flash_attention`; one query a sequence."""
    if q.shape[1] != 1:
        raise NotImplementedError(f"one query a sequence, not {q.shape[1]}")
    positions = jnp.arange(page_table.shape[1] * kv.shape[1], dtype=jnp.int32)
    indices = jnp.where(positions <= query_start[:, None, None], positions, -1)
    return sparse_attention(q, kv, indices, page_table, scale=scale)
