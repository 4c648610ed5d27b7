"""Experts with gradients: all of them on all tokens where they are few, else blocks of rows of one expert."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from keye_jax.train.blocks import wide
from pallas_kernels.grouped_matmul import sort_rows

_MOST_WASTE = 4
"""Times the least work that experts on all tokens may do: sorting and gathering rows costs as much."""

_LEAST_ROWS, _MOST_ROWS = 8, 256
"""Of a block. About half as many as an expert's mean rows waste a quarter of the work."""


def mix_experts(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    num_experts: int,
    rows_at_once: int | None = None,
) -> jax.Array:
    """`keye_jax.model.moe.mix_experts`, differentiable in `x`, `weights`, `gate_up` and `down`.

    Args:
      num_experts: of all devices together.
      rows_at_once: given where only some of the rows are expected to have their experts here.
    """
    if num_experts <= _MOST_WASTE * experts.shape[1]:
        return mix_all(x, experts, weights, gate_up, down)
    return mix_blocks(rows_at_once is not None, x, experts, weights, gate_up, down)


def mix_all(x: jax.Array, experts: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """All tokens through all experts, in two products; an expert that a token did not choose has weight 0.

    Arguments and result as those of `mix_experts`.
    """
    here = gate_up.shape[0]
    gates = jnp.sum(jnp.where(experts[..., None] == jnp.arange(here), weights[..., None], 0), axis=1)  # [tokens, e]
    hidden = jnp.einsum("td,edf->tef", x, gate_up, preferred_element_type=wide(x)).astype(x.dtype)
    gate, up = jnp.split(hidden.astype(wide(x)), 2, axis=-1)
    weighted = (jax.nn.silu(gate) * up * gates[..., None]).astype(x.dtype)
    return jnp.einsum("tef,efd->td", weighted, down, preferred_element_type=wide(x)).astype(x.dtype)


class _Blocks(NamedTuple):
    """Rows, one for each token and each of its experts, in blocks of one expert. Slots are the places in blocks."""

    tokens: jax.Array  # int32 [blocks, size], the token in each slot; their number in an empty one
    weights: jax.Array  # [blocks, size], 0 in an empty slot
    expert: jax.Array  # int32 [blocks]
    slots: jax.Array  # int32 [tokens, k], where each token's rows are
    here: jax.Array  # bool [tokens, k], whether its experts are
    used: jax.Array  # int32 [], blocks that are not empty


def _blocks(experts: jax.Array, weights: jax.Array, num_experts: int) -> _Blocks:
    tokens, k = experts.shape
    rows = tokens * k
    size = min(_MOST_ROWS, max(_LEAST_ROWS, (1 << (rows // num_experts).bit_length()) // 4))
    count = rows // size + num_experts  # each expert's last block may not be full
    flat = experts.reshape(-1)
    order, place = sort_rows(flat)
    sizes = jnp.sum(flat == jnp.arange(num_experts)[:, None], axis=-1, dtype=jnp.int32)
    ends, blocks = jnp.cumsum(sizes), (sizes + size - 1) // size
    block_ends = jnp.cumsum(blocks)
    expert = jnp.minimum(jnp.searchsorted(block_ends, jnp.arange(count), side="right"), num_experts - 1)
    nth = jnp.arange(count) - (block_ends - blocks)[expert]
    at = ((ends - sizes)[expert] + nth * size)[:, None] + jnp.arange(size)
    row = order[jnp.minimum(at, rows - 1)]
    filled = at < ends[expert][:, None]
    here = experts < num_experts
    own = jnp.where(here, experts, 0)
    slots = (block_ends - blocks)[own] * size + place.reshape(tokens, k) - (ends - sizes)[own]
    return _Blocks(
        jnp.where(filled, row // k, tokens),
        jnp.where(filled, weights.reshape(-1)[row], 0),
        expert,
        jnp.where(here, slots, 0),
        here,
        block_ends[-1],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix_blocks(
    sparse: bool, x: jax.Array, experts: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """Each block of rows through its expert; the backward pass computes the hidden layers again.

    Nothing is scattered onto the same place twice, and blocks come in a fixed order: gradients are reproducible.
    Memory: a row of `embed` for each slot, and float32 gradients of the experts.

    Args:
      sparse: whether to end the loop at the last block that is used, whose number only the device knows.

    Others, and the result, as those of `mix_experts`.
    """
    return _mix_forward(sparse, x, experts, weights, gate_up, down)[0]


def _mix_forward(
    sparse: bool, x: jax.Array, experts: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array
) -> tuple[jax.Array, Any]:
    blocks = _blocks(experts, weights, gate_up.shape[0])

    def run(index: jax.Array, out: jax.Array) -> jax.Array:
        expert = blocks.expert[index]
        hidden = _hidden(_rows(x, blocks.tokens[index]), gate_up[expert])[0]
        rows = jnp.dot(hidden, down[expert], preferred_element_type=wide(x)) * blocks.weights[index][:, None]
        return out.at[index].set(rows.astype(x.dtype))

    out = jnp.zeros((*blocks.tokens.shape, x.shape[1]), x.dtype)
    out = jax.lax.fori_loop(0, blocks.used if sparse else len(out), run, out)
    return _sum_of_slots(out, blocks), (x, experts, weights, gate_up, down)


def _mix_backward(sparse: bool, saved: Any, d_out: jax.Array) -> tuple:
    x, experts, weights, gate_up, down = saved
    blocks = _blocks(experts, weights, gate_up.shape[0])

    def run(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_x, d_weights, d_gate_up, d_down = sums
        expert, weight = blocks.expert[index], blocks.weights[index][:, None]
        rows, d_rows = (_rows(each, blocks.tokens[index]) for each in (x, d_out))
        hidden, pull = _hidden(rows, gate_up[expert])
        d_hidden = jnp.dot(d_rows, down[expert].T, preferred_element_type=wide(x))
        d_weights = d_weights.at[index].set(jnp.sum(d_hidden * hidden, axis=1))
        d_both = pull(d_hidden * weight).astype(x.dtype)
        weighted = (hidden * weight).astype(x.dtype)
        d_down = d_down.at[expert].add(jnp.dot(weighted.T, d_rows, preferred_element_type=wide(x)))
        d_gate_up = d_gate_up.at[expert].add(jnp.dot(rows.T, d_both, preferred_element_type=wide(x)))
        d_rows = jnp.dot(d_both, gate_up[expert].T, preferred_element_type=wide(x))
        return d_x.at[index].set(d_rows.astype(x.dtype)), d_weights, d_gate_up, d_down

    sums = (
        jnp.zeros((*blocks.tokens.shape, x.shape[1]), x.dtype),
        jnp.zeros(blocks.tokens.shape, wide(x)),
        *(jnp.zeros(each.shape, wide(x)) for each in (gate_up, down)),
    )
    d_x, d_weights, d_gate_up, d_down = jax.lax.fori_loop(0, blocks.used if sparse else len(sums[0]), run, sums)
    d_weights = jnp.where(blocks.here, d_weights.reshape(-1)[blocks.slots], 0).astype(weights.dtype)
    return _sum_of_slots(d_x, blocks), None, d_weights, d_gate_up.astype(gate_up.dtype), d_down.astype(down.dtype)


mix_blocks.defvjp(_mix_forward, _mix_backward)


def _rows(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of `x [tokens, embed]`, zeros in empty slots."""
    return x.at[tokens].get(mode="fill", fill_value=0)


def _hidden(rows: jax.Array, gate_up: jax.Array) -> tuple[jax.Array, Any]:
    """The hidden layer of SwiGLU, `[rows, f]`, and the function from its gradient to that of gate and up."""
    both = jnp.dot(rows, gate_up, preferred_element_type=wide(rows)).astype(rows.dtype)

    def activate(both: jax.Array) -> jax.Array:
        gate, up = jnp.split(both, 2, axis=-1)
        return jax.nn.silu(gate) * up

    hidden, pull = jax.vjp(activate, both.astype(wide(rows)))
    return hidden.astype(rows.dtype), lambda d_hidden: pull(d_hidden)[0]


def _sum_of_slots(slots: jax.Array, blocks: _Blocks) -> jax.Array:
    """What each token's rows add up to, `[tokens, embed]`, from all slots `[blocks, size, embed]`."""
    flat = slots.reshape(-1, slots.shape[-1])
    terms = [
        jnp.where(blocks.here[:, i, None], flat[blocks.slots[:, i]], 0).astype(wide(slots))
        for i in range(blocks.slots.shape[1])
    ]
    return functools.reduce(jnp.add, terms).astype(slots.dtype)
