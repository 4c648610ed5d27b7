"""Dense decode on Hopper GPUs: the kernel of sparse decode, over all positions."""

import jax

from pallas_kernels.sparse_attention.mosaic_gpu.decode import attend_all


def paged_flash_attention(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    query_start: jax.Array,
    kv_scales: jax.Array | None = None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_flash_attention`; one query per sequence.

    Raises:
      NotImplementedError: several queries per sequence, scales, or dtypes or sizes that the kernel does not take.
    """
    if kv_scales is not None:
        raise NotImplementedError("keys and values have scales")
    if q.shape[1] != 1:
        raise NotImplementedError(f"one query per sequence, not {q.shape[1]}")
    return attend_all(q, kv, page_table, query_start[:, None] + 1, scale=scale)
