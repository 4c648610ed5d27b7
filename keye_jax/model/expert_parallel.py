"""Experts on different devices: tokens go to them and what they give comes back; weights stay where they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.sharding.collectives import (
    Axes,
    all_gather,
    as_words,
    from_words,
    only,
    rank,
    sum_over,
    without,
)
from keye_jax.sharding.step import StepSharding, spec

_SLACK = 1.5
"""Rows worked on at once, in shares of what a device gets when all experts are chosen as often."""

_FEW_ROWS = 4096
"""At least this number is worked on at once: a loop of unknown length costs an accelerator more than they do."""


type Mix = Callable[..., jax.Array]
"""`mix_experts` with an implementation chosen."""

type MixOwn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""What a device's experts add to tokens it has got: `(x, experts, weights)`."""

type _Offsets = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Of `jax.lax.ragged_all_to_all`: input offsets, send sizes, output offsets, receive sizes."""


class Experts(Protocol):
    """What `run_experts` needs of a `MoE`."""

    num_experts: int
    hidden_parts: int
    gate_up_proj: nnx.Param
    down_proj: nnx.Param

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]: ...


def run_experts(
    moe: Experts, x: jax.Array, valid: jax.Array, mix: Mix, step: StepSharding, *, differentiable: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Runs each valid token through its experts, wherever they are.

    Tokens that every device of the experts' axes has stay where they are, and the devices' results are added up. Where
    these axes split the tokens, all of them go to all devices ("all_gather"), or each to those that have one of its
    experts ("all_to_all"). Any routing fits, since the arrays are made for the worst one. Memory: the tokens of all
    devices of the axes, and `_SLACK` times the mean rows of a device.

    Args:
      moe: the experts; of each array a device has what the rules give it.
      x: `[b, t, embed]`.
      valid: bool `[b, t]`.
      mix: what a device does with the tokens it has.
      differentiable: whether the weights of experts travel as numbers, which have gradients, and not as bits in one
        message with the experts.

    Returns:
      `[b, t, embed]`, and the experts chosen, int32 `[b, t, k]`.
    """
    num_experts = moe.num_experts
    assert moe.hidden_parts == step.size(step.expert_hidden), "the parameters were not placed as this step's rules say"
    owners = step.expert_parts
    exchanged = only(step.experts, step.rows) if step.rules.expert_exchange == "all_to_all" else ()
    gathered = without(only(owners, step.rows), exchanged)

    def body(moe: Experts, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        gate_up, down = moe.gate_up_proj[...], moe.down_proj[...]
        tokens = x.reshape(-1, x.shape[-1])
        experts, weights = moe.route(tokens)
        chosen = jnp.where(valid.reshape(-1, 1), experts, num_experts)

        def mix_own(x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
            if not owners:
                return mix(x, chosen, weights, gate_up, down)
            here = gate_up.shape[0]
            own = chosen - rank(step.experts) * here
            own = jnp.where((own >= 0) & (own < here), own, here)
            expected = math.ceil(_SLACK * chosen.size / step.size(step.experts))
            return mix(x, own, weights, gate_up, down, rows_at_once=max(_FEW_ROWS, expected))

        if gathered or exchanged:
            tokens = all_gather(tokens, gathered, axis=0)
            routing = (all_gather(x, gathered, axis=0) for x in _pack(chosen, weights, differentiable))
            chosen, weights = _unpack(*routing)
        if exchanged:
            owner = _exchange_ranks(chosen // gate_up.shape[0], exchanged, step)
            mixed = _to_owners_and_back(
                mix_own, tokens, chosen, weights, owner, exchanged, num_experts, step, differentiable
            )
        else:
            mixed = mix_own(tokens, chosen, weights)
        mixed = sum_over(mixed, without(owners, step.rows), scatter=gathered)
        return mixed.reshape(x.shape), experts.reshape(*valid.shape, -1)

    rows = spec(step.rows)
    return step.shard_module(moe, body, (rows, rows), (rows, rows))(x, valid)


def _pack(experts: jax.Array, weights: jax.Array, differentiable: bool) -> tuple[jax.Array, ...]:
    """Experts int32 `[tokens, k]` and their weights float32, as one array if no gradient is wanted."""
    if differentiable:
        return experts, weights
    return (jnp.concatenate([as_words(experts), as_words(weights)], axis=1),)


def _unpack(*routing: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Undoes `_pack`."""
    if len(routing) == 2:
        return routing[0], routing[1]
    experts, weights = jnp.split(routing[0], 2, axis=1)
    return from_words(experts, jnp.int32), from_words(weights, jnp.float32)


def _exchange_ranks(owner: jax.Array, exchanged: Axes, step: StepSharding) -> jax.Array:
    """Numbers along `exchanged` of the devices that tokens go to, from their owners' numbers along the experts' axes.

    An owner that differs from this device in an axis that is not among `exchanged` is served by another device that has
    the same tokens: it, and an owner that does not exist, gets the number behind the last.
    """
    number, same, stride = jnp.zeros_like(owner), owner < step.size(step.experts), 1
    for axis in reversed(step.experts):
        size = step.size((axis,))
        owner, coordinate = jnp.divmod(owner, size)
        if axis in exchanged:
            number, stride = number + coordinate * stride, stride * size
        else:
            same &= coordinate == rank((axis,))
    return jnp.where(same, number, stride)


def _to_owners_and_back(
    mix_own: MixOwn,
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    owner: jax.Array,
    axes: Axes,
    nowhere: int,
    step: StepSharding,
    differentiable: bool,
) -> jax.Array:
    """Sends each token once to every device that has one of its experts, and adds up what comes back.

    Args:
      x: `[tokens, embed]`.
      chosen, weights: experts int32 `[tokens, k]` and their weights float32.
      owner: int32 `[tokens, k]`, devices along `axes`; their number where no token is to go.
      nowhere: an expert that does not exist.

    Returns:
      `[tokens, embed]`.
    """
    (tokens, k), ranks, me = owner.shape, step.size(axes), rank(axes)
    goes = (owner[:, :, None] == jnp.arange(ranks)).any(axis=1)  # [tokens, ranks]
    counts = goes.sum(axis=0, dtype=jnp.int32)
    begins = jnp.cumsum(counts) - counts
    slots = begins + jnp.cumsum(goes, axis=0, dtype=jnp.int32) - 1
    size = tokens * min(ranks, k)
    source = jnp.broadcast_to(jnp.arange(tokens)[:, None], slots.shape)
    token_of = jnp.zeros(size, jnp.int32).at[jnp.where(goes, slots, size)].set(source, mode="drop")

    sizes = all_gather(counts[None], axes, axis=0)  # [from, to]
    ahead_of_mine = jnp.cumsum(sizes, axis=0) - sizes
    received = sizes[:, me]
    there = (begins, counts, ahead_of_mine[me], received)
    back = (ahead_of_mine[:, me], received, (jnp.cumsum(sizes, axis=1) - sizes)[:, me], counts)

    def send(rows: jax.Array, into: jax.Array, how: _Offsets) -> jax.Array:
        with jax.named_scope("collectives"):
            return _ragged_all_to_all(rows, into, *how, axes, step)

    no_experts, no_weights = jnp.full((ranks * tokens, k), nowhere), jnp.zeros((ranks * tokens, k), jnp.float32)
    no_routing = _pack(no_experts, no_weights, differentiable)
    routing = [
        send(sent[token_of], into, there)
        for sent, into in zip(_pack(chosen, weights, differentiable), no_routing, strict=True)
    ]
    got = send(x[token_of], jnp.zeros((ranks * tokens, x.shape[1]), x.dtype), there)
    mixed = mix_own(got, *_unpack(*routing))
    returned = send(mixed, jnp.zeros((size, x.shape[1]), x.dtype), back)
    terms = [jnp.where(goes[:, i, None], returned[slots[:, i]], 0).astype(jnp.float32) for i in range(ranks)]
    return sum(terms[1:], start=terms[0]).astype(x.dtype)


def _ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    axes: Axes,
    step: StepSharding,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all`; XLA has none for CPUs, where each device picks its rows from those of all."""
    if step.rules.platform != "cpu":
        return jax.lax.ragged_all_to_all(
            operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=axes
        )
    me = rank(axes)
    rows = all_gather(operand[None], axes, axis=0)
    begin, size, target = (
        all_gather(x[None], axes, axis=0)[:, me, None] for x in (input_offsets, send_sizes, output_offsets)
    )
    index = jnp.arange(len(operand))
    sent = (index >= begin) & (index < begin + size)
    place = jnp.where(sent, target + index - begin, len(output))
    return output.at[place.reshape(-1)].set(rows.reshape(-1, *operand.shape[1:]), mode="drop")
