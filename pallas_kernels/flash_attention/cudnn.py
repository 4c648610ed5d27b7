"""Dense attention with cuDNN's fused kernels, on NVIDIA GPUs from Ampere on."""

from typing import Any

import jax
import jax.numpy as jnp

# jax.nn.dot_product_attention rounds the log-sum-exp to the dtype of q, which is too coarse to combine two parts.
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

from pallas_kernels import paging

_MIN_QUERIES = 16
"""With fewer queries, copying the pages into one piece costs more than attention does."""


def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float) -> jax.Array:
    _check(q, k)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=lengths.astype(jnp.int32), implementation="cudnn"
    )


def paged_flash_attention(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    query_start: jax.Array,
    kv_scales: jax.Array | None = None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_flash_attention`.

    cuDNN's causal mask starts at the first key. So attention to the positions before the queries and attention to the
    queries' own positions are computed apart, and combined by their log-sum-exps.

    Memory: a copy of the context's keys and values in one piece.

    Raises:
      NotImplementedError: fewer than 16 queries, scales, or dtypes or sizes that cuDNN does not take.
    """
    if kv_scales is not None:
        raise NotImplementedError("keys and values have scales")
    _check(q, kv)
    batch, queries = q.shape[:2]
    if queries < _MIN_QUERIES:
        raise NotImplementedError(f"at least {_MIN_QUERIES} queries, not {queries}")
    page_size, dim = kv.shape[1], kv.shape[3]
    context = page_table.shape[1] * page_size

    def keys_and_values(rows: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys, values = jnp.split(jnp.where(valid[..., None, None], rows, 0), 2, axis=2)
        return keys, values

    def attend(keys: jax.Array, values: jax.Array, mask: MaskType, lengths: jax.Array | None = None):
        each = None if lengths is None else jnp.full(batch, queries, jnp.int32)
        # The library's types do not say that it returns two arrays here.
        out_and_lse: Any = dot_product_attention(
            q, keys, values, q_seqlen=each, kv_seqlen=lengths, scale=scale, mask_type=mask, return_residual=True
        )
        out, lse = out_and_lse
        return out.astype(jnp.float32), lse.swapaxes(1, 2)

    own = query_start[:, None] + jnp.arange(queries)
    slots = paging.slots(page_table, jnp.minimum(own, context - 1), page_size)
    out, lse = attend(*keys_and_values(kv.reshape(-1, *kv.shape[2:])[slots], own < context), MaskType.CAUSAL)
    if context > queries:
        before = jnp.arange(context) < query_start[:, None]
        rows = kv[page_table].reshape(batch, context, -1, dim)
        # A sequence with nothing before its queries attends to one row of zeros, which gets no weight below.
        lengths = jnp.maximum(query_start, 1)
        past_out, past_lse = attend(*keys_and_values(rows, before), MaskType.PADDING, lengths)
        past_lse = jnp.where(query_start[:, None, None] > 0, past_lse, -jnp.inf)
        total = jnp.logaddexp(lse, past_lse)
        out = out * jnp.exp(lse - total)[..., None] + past_out * jnp.exp(past_lse - total)[..., None]
        lse = total
    return out.astype(q.dtype), lse


def _check(q: jax.Array, k: jax.Array) -> None:
    dim = q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        raise NotImplementedError(f"only bfloat16 and float16, not {q.dtype} and {k.dtype}")
    if dim % 8 or dim > 128:
        raise NotImplementedError(f"head_dim must be a multiple of 8 up to 128, not {dim}")
