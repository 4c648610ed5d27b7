"""The indexer of DeepSeek Sparse Attention: which keys each query attends to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.model.layers import LayerNorm, Linear, RMSNorm
from keye_jax.model.rope import apply_rope
from pallas_kernels.indexer_scores import hadamard, quantize

_NORM_EPS = 1e-6


class Indexer(nnx.Module):
    """Light attention heads whose gated, rectified dot products rank the keys (DeepSeek-V3.2, equation 1)."""

    def __init__(self, config: KeyeConfig, *, rngs: nnx.Rngs):
        sa, dtype = config.sa_config, config.jax_dtype
        self.num_heads, self.head_dim = sa.indexer_num_heads, sa.indexer_head_dim
        hidden = {"embed": config.hidden_size}
        rows = {"indexer_rows": self.num_heads * self.head_dim + self.num_heads}
        self.q_proj = Linear(hidden, rows, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(hidden, {"indexer_head_dim": self.head_dim}, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(self.head_dim, _NORM_EPS, axis="indexer_head_dim", dtype=dtype)
        self.k_norm = LayerNorm(self.head_dim, _NORM_EPS, axis="indexer_head_dim", dtype=dtype)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def __call__(
        self, x: jax.Array, angles: jax.Array, *, dtype: str | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Index queries, gates and keys of the normed layer input.

        Args:
          x: `[b, t, embed]`.
          angles: float32 `[b, t, indexer_head_dim / 2]`.
          dtype: of queries and keys: "float8_e4m3fn", rotated and scaled first, or None for that of x.

        Returns:
          queries `[b, t, n, d]`, gates float32 `[b, t, n]` (signed, times the scales of float8 queries), keys
          `[b, t, d]`, and the scales of float8 keys, float32 `[b, t]`, or None.
        """
        rows = self.q_proj(x)
        queries, gates = jnp.split(rows, [self.num_heads * self.head_dim], axis=-1)
        queries = self.q_norm(queries.reshape(*x.shape[:2], self.num_heads, self.head_dim))
        keys = self.k_norm(self.k_proj(x))
        queries, keys = apply_rope(queries, angles), apply_rope(keys[..., None, :], angles)[..., 0, :]
        return in_dtype(queries, gates.astype(jnp.float32), keys, dtype)


def in_dtype(
    queries: jax.Array, gates: jax.Array, keys: jax.Array, dtype: str | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """What an `Indexer` returns, in the dtype that it is asked for; queries, gates and keys are as it has them."""
    if dtype is None:
        return queries, gates, keys, None
    queries, query_scales = quantize(hadamard(queries))
    keys, key_scales = quantize(hadamard(keys))
    return queries, gates * query_scales, keys, key_scales
