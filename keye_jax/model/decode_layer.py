"""Decoder layers in a step of decode, with a token of each of few rows.

At small batches a step is bounded by many short kernels, one after the other. So what lies between a layer's products,
its attention and its experts is three operations: `finish_projections` with the new rows of the cache, `route` with the
residual and the rows that experts take, and `combine_experts` with the residual and the norm of the next layer.

Over several devices a layer is one `StepSharding.shard_map`. Where experts are split, every device routes the tokens of
all, runs its own experts, and the sums are added up: one exchange before the experts, `gather_tokens`, and one after
them, in `combine_experts`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from keye_jax.kv_cache import Pages
from keye_jax.model.attention import (
    Attention,
    AttentionIntermediates,
    AttentionOptions,
    AttentionOutput,
    attend_dense,
    attend_sparse,
    merge,
    output_specs,
)
from keye_jax.model.context import Context, PagedContext
from keye_jax.model.indexer import Indexer, in_dtype
from keye_jax.model.layers import RMSNorm
from keye_jax.model.moe import MoE, run_matrices
from keye_jax.quantization.weights import QuantizedLinear
from keye_jax.sharding.collectives import Axes, only, rank, sum_over, without
from keye_jax.sharding.step import StepSharding, spec
from pallas_kernels.decode_layer import Routed, combine_experts, finish_projections, gather_tokens, route
from pallas_kernels.dispatch import resolve
from pallas_kernels.gpu.peers import peer_addresses

MOST_ROWS = 64
"""More rows keep a device busy with single operations."""


class Layer(Protocol):
    """What is needed of a `DecoderLayer`."""

    input_norm: RMSNorm
    attention: Attention
    indexer: Indexer
    post_attention_norm: RMSNorm
    moe: MoE


class DecodeIntermediates(NamedTuple):
    """What a layer computed of a token of each row.

    Attributes:
      attention: its attention's intermediates.
      moe_input: `[b, embed]`, what its router and experts were given.
      experts: int32 `[b, k]`, each token's, best first.
      hidden: `[b, embed]`, the layer's output.
    """

    attention: AttentionIntermediates
    moe_input: jax.Array
    experts: jax.Array
    hidden: jax.Array


@dataclasses.dataclass(frozen=True)
class _Queries:
    """As `attention.Queries`, of one token of each row."""

    q: jax.Array
    index_q: jax.Array
    gates: jax.Array


def decodes_few_rows(
    layers: Sequence[Layer],
    x: jax.Array,
    contexts: Sequence[Context],
    options: AttentionOptions,
    step: StepSharding,
) -> bool:
    """Whether `[b, t, embed]` are the tokens of a step of decode, and of few rows.

    A device runs its experts for its own rows or for all. Where it would for those of some devices, or tokens are to
    travel to single ones, layers run as in other steps. So they do where devices have some of the heads, but the scales
    of all.
    """
    shared = only(step.expert_parts, step.rows)
    has_scales = isinstance(layers[0].attention.q_proj.weight.get_value(), QuantizedLinear)
    return (
        options.training is None
        and all(isinstance(context, PagedContext) for context in contexts)
        and not step.reads_prompts
        and (not shared or (set(shared) == set(step.rows) and step.rules.expert_exchange == "all_gather"))
        and not (has_scales and step.heads)
        and len(x) <= MOST_ROWS
        and x.shape[1] == 1
    )


def decode_layers(
    layers: Sequence[Layer],
    last_norm: RMSNorm,
    x: jax.Array,
    angles: jax.Array,
    index_angles: jax.Array,
    contexts: Sequence[Any],
    options: AttentionOptions,
    step: StepSharding,
    addresses: jax.Array | None = None,
) -> tuple[jax.Array, list[Any], list[DecodeIntermediates]]:
    """Runs all layers in a step that `decodes_few_rows`.

    Args:
      last_norm: what follows the layers.
      x: `[b, 1, embed]`.
      angles, index_angles: float32 rotary angles `[b, 1, head_dim / 2]`, `[b, 1, indexer_head_dim / 2]`.
      contexts: each layer's.
      addresses: what `exchange_addresses` gives for this step.

    Returns:
      `[b, 1, embed]` before the last norm, the contexts with the new tokens, and what each layer computed, if the
      options ask for it.
    """
    rotations = tuple(turn(of[:, 0]) for of in (angles, index_angles) for turn in (jnp.cos, jnp.sin))
    norms = [layer.input_norm for layer in layers] + [last_norm]
    tokens, after, found = x[:, 0], [], []
    valid = step.constrain(contexts[0].batch.valid(1)[:, 0], () if _gathers(step) else step.rows)
    normed = norms[0](tokens)
    for layer, norm, context in zip(layers, norms[1:], contexts, strict=True):
        graph, state = nnx.split(layer)
        run = functools.partial(_run_layer, graph, next_eps=norm.eps, options=options, step=step)
        tokens, normed, context, intermediates = run(
            state, norm.weight[...], tokens, normed, rotations, valid, context, addresses
        )
        after.append(context)
        found.append(intermediates)
    return tokens[:, None], after, [each for each in found if each is not None]


def exchanges_tokens(step: StepSharding) -> bool:
    """Whether each device has tokens and experts of its own, so that kernels can exchange tokens."""
    return bool(step.rows) and set(step.rows) == set(step.expert_parts)


def exchange_addresses(step: StepSharding) -> jax.Array | None:
    """Where the step's GPUs exchange tokens inside kernels; None where XLA's collectives do it."""
    mesh = step.rules.mesh
    return peer_addresses(mesh, step.rows) if isinstance(mesh, Mesh) and exchanges_tokens(step) else None


def _gathers(step: StepSharding) -> bool:
    """Whether each device needs the tokens of all, for its experts."""
    return bool(only(step.expert_parts, step.rows))


@functools.partial(jax.jit, static_argnames=("graph", "next_eps", "options", "step"))
def _run_layer(
    graph: nnx.GraphDef[Any],
    state: nnx.State,
    next_norm: jax.Array,
    tokens: jax.Array,
    normed: jax.Array,
    rotations: tuple[jax.Array, ...],
    valid: jax.Array,
    context: PagedContext,
    addresses: jax.Array | None,
    *,
    next_eps: float,
    options: AttentionOptions,
    step: StepSharding,
) -> tuple[jax.Array, jax.Array, PagedContext, DecodeIntermediates | None]:
    """A layer as a function of its parameters, traced once for all layers: `[b, embed]`, and that with its norm.

    Returns:
      `[b, embed]`, its norm by the weights `next_norm`, the context with the new tokens, and what was computed.
    """
    wanted = options.intermediates or options.selections

    def run(layer: Layer, *arrays: Any) -> Any:
        next_norm, tokens, normed, rotations, valid, context, addresses = arrays
        queries, context, found = _attend(layer, normed, rotations, context, options, step)
        update = layer.attention.o_proj(found.out[:, 0], dtype=jnp.float32 if step.heads else None)
        update = sum_over(update, step.heads).astype(tokens.dtype)
        with jax.named_scope("experts"):
            tokens, normed, moe_input, experts = _mix(
                layer, tokens, update, valid, next_norm, addresses, next_eps, options.implementation, step
            )
        return tokens, normed, context, (queries.q, found, moe_input, experts) if wanted else None

    rows: Any = spec(step.rows)
    everywhere: Any = spec()
    valid_rows = everywhere if _gathers(step) else rows
    q: Any = spec(step.rows, (), step.heads)
    computed_specs = (q, output_specs(step, options), rows, rows) if wanted else None
    sharded = step.shard_module(
        nnx.merge(graph, state),
        run,
        (everywhere, rows, rows, rows, valid_rows, context.specs(step), rows),
        (rows, rows, context.specs(step), computed_specs),
    )
    tokens, normed, context, computed = sharded(next_norm, tokens, normed, rotations, valid, context, addresses)
    if computed is None:
        return tokens, normed, context, None
    q, found, moe_input, experts = computed
    attended = AttentionIntermediates(q, found.lse, found.index_scores, found.selected)
    return tokens, normed, context, DecodeIntermediates(attended, moe_input, experts, tokens)


def _attend(
    layer: Layer,
    normed: jax.Array,
    rotations: tuple[jax.Array, ...],
    context: PagedContext,
    options: AttentionOptions,
    step: StepSharding,
) -> tuple[_Queries, PagedContext, AttentionOutput]:
    """What the normed tokens `[b, embed]` attend to, with their queries and the context with the new rows."""
    attention = layer.attention
    queries, context, keys = _project(layer, normed, rotations, context, options, step)
    scales = {"scale": attention.scale, "options": options}
    if options.attention == "dense":
        found = attend_dense(queries, keys, **scales)
    else:
        found = attend_sparse(queries, keys, top_k=attention.top_k, index_scale=layer.indexer.scale, **scales)
    return queries, context, merge(found, keys.split)


def _mix(
    layer: Layer,
    tokens: jax.Array,
    update: jax.Array,
    valid: jax.Array,
    next_norm: jax.Array,
    addresses: jax.Array | None,
    next_eps: float,
    preferred: str | None,
    step: StepSharding,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Runs the tokens through their experts, wherever these are.

    Args:
      tokens: `[b, embed]`, the residual.
      update: `[b, embed]`, what is added to it before.
      valid: bool `[b]`, or of the tokens of all devices if each needs them.
      next_norm: `[embed]`, weights of the norm that follows, with epsilon `next_eps`.
      addresses: int32 `[1, n]`, this device's row of what `exchange_addresses` gives.

    Returns:
      The layer's output `[b, embed]`, its norm, what the experts were given, and int32 `[b, k]` of them.
    """
    moe, norm = layer.moe, layer.post_attention_norm
    matrices = moe.gate_up_proj[...], moe.down_proj[...]

    def run(x: jax.Array, update: jax.Array, **here: Any) -> tuple[Routed, jax.Array]:
        routed = route(
            x,
            update,
            norm.weight[...],
            moe.router.weight[...],
            valid,
            **here,
            top_k=moe.experts_per_token,
            eps=norm.eps,
            normalise=moe.normalise,
            implementation=resolve("route", preferred),
        )
        return routed, run_matrices(routed.rows, *matrices, routed.group_sizes, preferred)

    def combine(
        routed: Routed, rows: jax.Array, x: jax.Array, place: jax.Array | None = None, **axes: Axes
    ) -> tuple[jax.Array, jax.Array]:
        how: dict[str, Any] = {"eps": next_eps, "implementation": resolve("combine_experts", preferred)}
        return combine_experts(rows, routed.row_of, routed.weights, x, next_norm, place, **axes, **how)

    if not step.expert_parts:
        routed, rows = run(tokens, update)
        tokens, normed = combine(routed, rows, routed.y)
        return tokens, normed, routed.normed, routed.experts

    assert moe.hidden_parts == step.size(step.expert_hidden), "the parameters were not placed as this step's rules say"
    gathered, here = step.rows if _gathers(step) else (), matrices[0].shape[0]
    place = None if addresses is None else addresses[0]
    everyone = gather_tokens(tokens, update, place, axes=gathered, implementation=resolve("gather_tokens", preferred))
    first_own = jnp.asarray(rank(step.experts) * here, jnp.int32)
    routed, rows = run(everyone, jnp.zeros_like(everyone), first_own=first_own, own=here)
    summed = without(step.expert_parts, gathered)
    tokens, normed = combine(routed, rows, everyone, place, axes=gathered, summed=summed)

    def own(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, rank(gathered) * len(tokens), len(tokens))

    return tokens, normed, own(routed.normed), own(routed.experts)


def _project(
    layer: Layer,
    normed: jax.Array,
    rotations: tuple[jax.Array, ...],
    context: PagedContext,
    options: AttentionOptions,
    step: StepSharding,
) -> tuple[_Queries, PagedContext, Any]:
    """Queries of the normed tokens `[b, embed]`, the context with the new rows, and the keys that the queries see.

    Pages of full width get their rows in one operation with the rest. Those in float8, and on TPUs all, get them as in
    any other step.
    """
    attention, indexer, pages = layer.attention, layer.indexer, context.pages
    # TPUs lay out two index keys as one row: to write one as a row of its own they would copy all pages.
    writes = pages.kv_scales is None and pages.index_scales is None and options.kernels != "mosaic_tpu"
    cache = (pages.kv, pages.index_pages, context.slots(step, 1)[:, 0]) if writes else ()
    heads = [each(normed) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
    with jax.named_scope("indexer"):
        index = [each(normed) for each in (indexer.q_proj, indexer.k_proj)]
    norms = attention.q_norm, attention.k_norm, indexer.q_norm, indexer.k_norm
    arrays = [
        *heads,
        *index,
        *(norm.weight[...] for norm in norms),
        indexer.k_norm.bias[...],
        *rotations,
        *cache,
    ]
    q, index_q, gates, kv, index_keys = finish_projections(
        *arrays,
        eps=attention.q_norm.eps,
        index_eps=indexer.q_norm.eps,
        implementation=resolve("finish_projections", options.implementation),
    )
    if writes:
        context, keys = context.with_new_rows(Pages(kv, index_keys.reshape(pages.index_keys.shape)), step)
        return _Queries(q[:, None], index_q[:, None], gates[:, None]), context, keys
    with jax.named_scope("indexer"):
        index_q, gates, index_keys, scales = in_dtype(index_q, gates, index_keys, options.indexer_dtype)
    rows = jax.tree.map(lambda x: x[:, None], Pages(kv, index_keys, scales)).in_cache_dtype(options.cache_dtype)
    context, keys = context.append(rows, step)
    return _Queries(q[:, None], index_q[:, None], gates[:, None]), context, keys
