"""Mixture of experts: each token goes through its router's few best experts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.model.attention import Training
from keye_jax.model.expert_parallel import run_experts
from keye_jax.model.layers import Linear, param
from keye_jax.quantization.weights import expert_param
from keye_jax.sharding.step import StepSharding
from pallas_kernels.dispatch import resolve
from pallas_kernels.grouped_matmul import (
    QuantizedRows,
    expert_mlp,
    quantize_rows,
    quantized_expert_mlp,
    sort_rows,
    take_rows,
)
from pallas_kernels.portable import small_top_k
from pallas_kernels.quantized import QuantizedMatrices


class MoE(nnx.Module):
    """SwiGLU experts.

    Attributes:
      router: scores of the experts.
      gate_up_proj: `[e, embed, 2 * f]`; gate is the first f columns, up the last; of each part of the columns where
        they were placed in `hidden_parts` parts.
      down_proj: `[e, f, embed]`. Both are `QuantizedMatrices` where experts have a scheme.
      hidden_parts: how many parts the experts' hidden dimension was placed in.
    """

    def __init__(self, config: KeyeConfig, *, rngs: nnx.Rngs):
        experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        dtype = config.jax_dtype
        self.experts_per_token, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.num_experts, self.hidden_parts = experts, 1
        # Every device routes its own tokens: the router is not split as the experts are.
        self.router = Linear({"embed": hidden}, {"routes": experts}, dtype=dtype, rngs=rngs)
        gate_up = (experts, hidden, 2 * inner), ("experts", "embed", "expert_hidden")
        down = (experts, inner, hidden), ("experts", "expert_hidden", "embed")
        scheme = config.quantization.experts
        if scheme is None:
            self.gate_up_proj, self.down_proj = param(rngs, *gate_up, dtype), param(rngs, *down, dtype)
        else:
            self.gate_up_proj = expert_param(rngs, *gate_up, scheme, parts=2)
            self.down_proj = expert_param(rngs, *down, scheme, parts=1)

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Experts of each token, int32 `[tokens, k]`, best first, and their weights, float32 `[tokens, k]`."""
        probabilities = jax.nn.softmax(self.router(x, dtype=jnp.float32), axis=-1)
        weights, experts = small_top_k(probabilities, self.experts_per_token)
        if self.normalise:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        return experts, weights

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        step: StepSharding,
        *,
        activation_dtype: str | None = None,
        implementation: str | None,
        training: Training | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs each valid token through its experts, wherever these are; other tokens get zeros and cost nothing.

        Args:
          x: `[b, t, embed]`.
          valid: bool `[b, t]`.
          step: how the arrays lie over devices.
          activation_dtype: of what experts of fewer bits multiply, "float8_e4m3fn", or None for that of x.
          training: whose operations are used, if the layer is trained.

        Returns:
          `[b, t, embed]`, and the experts chosen, int32 `[b, t, k]`.
        """
        with jax.named_scope("experts"):
            if training is not None:
                mix = functools.partial(training.mix_experts, num_experts=self.num_experts)
                return run_experts(self, x, valid, mix, step, differentiable=True)
            mix = functools.partial(mix_experts, activation_dtype=activation_dtype, implementation=implementation)
            return run_experts(self, x, valid, mix, step)


def mix_experts(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array | QuantizedMatrices,
    down: jax.Array | QuantizedMatrices,
    *,
    rows_at_once: int | None = None,
    activation_dtype: str | None = None,
    implementation: str | None,
) -> jax.Array:
    """Weighted sums of what each token's experts give.

    Memory: a few rows of `embed` and of `f` numbers for each of `rows_at_once`.

    Args:
      x: `[tokens, embed]`.
      experts: int32 `[tokens, k]`, from 0 to e - 1, or e for one that is not here, which counts as zeros.
      weights: float32 `[tokens, k]`.
      gate_up, down: `[e, embed, 2 * f]` and `[e, f, embed]`.
      rows_at_once: of the `tokens * k` rows, this number of those whose experts are here is worked on in one turn of
        a loop, whose length the routing decides. None for one turn for all.
      activation_dtype: of what matrices of fewer bits multiply, "float8_e4m3fn", or None for that of x.
      implementation: of the kernels; "xla" runs where the operation has none of that name.

    Returns:
      `[tokens, embed]` in the dtype of x.
    """
    (tokens, k), num_experts = experts.shape, gate_up.shape[0]
    # One row per (token, expert), sorted by expert; rows of experts that are not here go behind the last one.
    flat = experts.reshape(-1)
    order, row_of = sort_rows(flat)
    row_of = row_of.reshape(tokens, k)
    group_sizes = jnp.sum(flat == jnp.arange(num_experts)[:, None], axis=-1, dtype=jnp.int32)
    weights = jnp.where(experts < num_experts, weights, 0.0)

    # Before rows are gathered, which then are half as long.
    tokens_in = x if activation_dtype is None else quantize_rows(x)

    def mix(order: jax.Array, row_of: jax.Array, group_sizes: jax.Array, weights: jax.Array) -> jax.Array:
        out = run_matrices(_take_tokens(tokens_in, order // k), gate_up, down, group_sizes, implementation)
        # One term for each of the few experts: XLA gathers and adds in one pass, without an array of all terms.
        terms = (weights[:, i, None] * out[row_of[:, i]] for i in range(k))
        return functools.reduce(jnp.add, terms).astype(x.dtype)

    if rows_at_once is None or rows_at_once >= order.size:
        return mix(order, row_of, group_sizes, weights)
    order = jnp.pad(order, (0, -order.size % rows_at_once))
    ends = jnp.cumsum(group_sizes)

    def turn(index: jax.Array, mixed: jax.Array) -> jax.Array:
        first = index * rows_at_once
        part = jax.lax.dynamic_slice_in_dim(order, first, rows_at_once)
        until = jnp.clip(ends - first, 0, rows_at_once)
        at = row_of - first
        here = (at >= 0) & (at < rows_at_once)
        part_weights = jnp.where(here, weights, 0.0)
        # Rows of other turns are all read at one place: they count as zeros, and cost little.
        return mixed + mix(part, jnp.where(here, at, 0), jnp.diff(until, prepend=0), part_weights)

    turns = (ends[-1] + rows_at_once - 1) // rows_at_once
    # On GPUs XLA makes constants of all layers at a program's beginning, and what it cannot foresee when it is needed.
    zeros = jax.lax.platform_dependent(
        turns, cuda=lambda turns: jnp.full_like(x, jnp.where(turns < 0, 1, 0)), default=lambda _: jnp.zeros_like(x)
    )
    return jax.lax.fori_loop(0, turns, turn, zeros)


def run_matrices(
    rows: jax.Array | QuantizedRows,
    gate_up: jax.Array | QuantizedMatrices,
    down: jax.Array | QuantizedMatrices,
    group_sizes: jax.Array,
    preferred: str | None,
) -> jax.Array:
    """`expert_mlp`, or that of matrices of fewer bits."""
    if isinstance(gate_up, QuantizedMatrices) and isinstance(down, QuantizedMatrices):
        implementation = resolve("quantized_expert_mlp", preferred)
        return quantized_expert_mlp(rows, gate_up, down, group_sizes, implementation=implementation)
    assert isinstance(gate_up, jax.Array) and isinstance(down, jax.Array), "both or none have fewer bits"
    assert isinstance(rows, jax.Array), "matrices of all bits multiply no float8"
    return expert_mlp(rows, gate_up, down, group_sizes, implementation=resolve("expert_mlp", preferred))


def _take_tokens(x: jax.Array | QuantizedRows, rows: jax.Array) -> jax.Array | QuantizedRows:
    if isinstance(x, QuantizedRows):
        return QuantizedRows(take_rows(x.values, rows), x.scales[rows], x.dtype)
    return take_rows(x, rows)
