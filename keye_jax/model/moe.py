"""Mixture of experts: each token goes through its router's few best experts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.model.layers import Linear, param
from pallas_kernels.grouped_matmul import expert_mlp

_FEW_TOKENS, _FEW_ROWS = 64, 512
"""Up to so many, comparing all with all in one pass is faster on a GPU than sorting, which is many small kernels."""


class MoE(nnx.Module):
    """SwiGLU experts.

    Attributes:
      router: scores of the experts.
      gate_up_proj: `[e, embed, 2 * f]`; gate is the first f columns, up the last.
      down_proj: `[e, f, embed]`.
    """

    def __init__(self, config: KeyeConfig, *, rngs: nnx.Rngs):
        experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        dtype = config.jax_dtype
        self.experts_per_token, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.router = Linear({"embed": hidden}, {"experts": experts}, dtype=dtype, rngs=rngs)
        self.gate_up_proj = param(rngs, (experts, hidden, 2 * inner), ("experts", "embed", "expert_hidden"), dtype)
        self.down_proj = param(rngs, (experts, inner, hidden), ("experts", "expert_hidden", "embed"), dtype)

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Experts of each token, int32 `[tokens, k]`, best first, and their weights, float32 `[tokens, k]`."""
        probabilities = jax.nn.softmax(self.router(x, dtype=jnp.float32), axis=-1)
        weights, experts = few_largest(probabilities, self.experts_per_token)
        if self.normalise:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        return experts, weights

    def __call__(self, x: jax.Array, valid: jax.Array, *, implementation: str | None) -> tuple[jax.Array, jax.Array]:
        """Runs each valid token through its experts; other tokens get zeros and cost nothing.

        Args:
          x: `[tokens, embed]`.
          valid: bool `[tokens]`.

        Returns:
          `[tokens, embed]`, and the experts chosen, int32 `[tokens, k]`.
        """
        num_experts = self.router.weight.shape[0]
        experts, weights = self.route(x)
        # One row per (token, expert), sorted by expert; rows of invalid tokens go behind the last expert.
        flat = jnp.where(valid[:, None], experts, num_experts).reshape(-1)
        order, row_of = sort_rows(flat)
        row_of = row_of.reshape(experts.shape)
        group_sizes = jnp.sum(flat == jnp.arange(num_experts)[:, None], axis=-1, dtype=jnp.int32)
        rows = take_rows(x, order // self.experts_per_token)
        out = expert_mlp(rows, self.gate_up_proj[...], self.down_proj[...], group_sizes, implementation=implementation)
        weights = jnp.where(valid[:, None], weights, 0.0)
        # One term for each of the few experts: XLA gathers and adds in one pass, without an array of all terms.
        terms = (weights[:, k, None] * out[row_of[:, k]] for k in range(self.experts_per_token))
        return functools.reduce(jnp.add, terms).astype(x.dtype), experts


def few_largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of `[tokens, e]`: values and positions `[tokens, k]`, largest first, of equal ones the lower."""
    tokens, width = x.shape
    if tokens > _FEW_TOKENS:
        return jax.lax.top_k(x, k)
    at = jnp.arange(width)
    ahead = (x[:, None, :] > x[:, :, None]) | ((x[:, None, :] == x[:, :, None]) & (at < at[:, None]))
    wanted = jnp.sum(ahead, axis=-1)[:, None, :] == jnp.arange(k)[:, None]
    return jnp.sum(jnp.where(wanted, x[:, None, :], 0), axis=-1), jnp.sum(jnp.where(wanted, at, 0), axis=-1)


def sort_rows(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stable order of int32 keys `[n]`, and its inverse: which key each place gets, and the place of each key."""
    at = jnp.arange(keys.size)
    if keys.size > _FEW_ROWS:
        order = jnp.argsort(keys, stable=True)
        return order, jnp.zeros_like(order).at[order].set(at, unique_indices=True)
    ahead = (keys < keys[:, None]) | ((keys == keys[:, None]) & (at < at[:, None]))
    place = jnp.sum(ahead, axis=-1)
    return jnp.sum(jnp.where(place == at[:, None], at, 0), axis=-1), place


def take_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """`x[rows]` of `[n, width]`; 16-bit elements are gathered in pairs, which takes a GPU 0.7 of the time."""
    if x.dtype.itemsize != 2 or x.shape[1] % 2:
        return x[rows]
    pairs = jax.lax.bitcast_convert_type(x.reshape(len(x), -1, 2), jnp.uint32)
    return jax.lax.bitcast_convert_type(pairs[rows], x.dtype).reshape(len(rows), -1)
