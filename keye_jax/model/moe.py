"""Mixture of experts: each token goes through its router's few best experts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.model.layers import Linear, param
from pallas_kernels.grouped_matmul import expert_mlp


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
        weights, experts = jax.lax.top_k(probabilities, self.experts_per_token)
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
        tokens, num_experts = x.shape[0], self.router.weight.shape[0]
        experts, weights = self.route(x)
        # One row per (token, expert), sorted by expert; rows of invalid tokens go behind the last expert.
        flat = jnp.where(valid[:, None], experts, num_experts).reshape(-1)
        order = jnp.argsort(flat, stable=True)
        row_of = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True).reshape(tokens, -1)
        group_sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
        rows = x[order // self.experts_per_token]
        out = expert_mlp(rows, self.gate_up_proj[...], self.down_proj[...], group_sizes, implementation=implementation)
        weights = jnp.where(valid[:, None], weights, 0.0)
        # One term for each of the few experts: XLA gathers and adds in one pass, without an array of all terms.
        terms = (weights[:, k, None] * out[row_of[:, k]] for k in range(self.experts_per_token))
        return functools.reduce(jnp.add, terms).astype(x.dtype), experts
