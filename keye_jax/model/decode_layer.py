"""A decoder layer in a step of decode on one device, by operations that each do the work of several.

At small batches a step is bounded by the launches of its many short kernels. What lies between attention and experts is
therefore three operations: norm and projections with the new rows of the cache, the output projection with the
residual, and norm and routing. `AttentionOptions.decode` names their implementation. Without a name the model takes the
last of them alone: it is faster so than with the other two, and than with none.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from keye_jax.kv_cache import Pages
from keye_jax.model.attention import (
    Attention,
    AttentionIntermediates,
    AttentionOptions,
    attend_dense,
    attend_sparse,
)
from keye_jax.model.context import Context, PagedContext
from keye_jax.model.indexer import Indexer, in_dtype
from keye_jax.model.layers import RMSNorm
from keye_jax.model.moe import MoE, mix_experts
from keye_jax.sharding.step import StepSharding
from pallas_kernels.decode_layer import decode_projections, output_projection, route

_MOST_ROWS = 64
"""More rows keep a device busy with single operations."""


class Layer(Protocol):
    """What is needed of a `DecoderLayer`."""

    input_norm: RMSNorm
    attention: Attention
    indexer: Indexer
    post_attention_norm: RMSNorm
    moe: MoE


@dataclasses.dataclass(frozen=True)
class _Queries:
    """As `attention.Queries`, of one token of each row."""

    q: jax.Array
    index_q: jax.Array
    gates: jax.Array


def decodes_few_rows(x: jax.Array, context: Context, options: AttentionOptions, step: StepSharding) -> bool:
    """Whether `[b, t, embed]` are the tokens of a step of decode on one device, and of few rows."""
    return (
        options.training is None
        and isinstance(context, PagedContext)
        and not step.reads_prompts
        and step.rules.devices == 1
        and len(x) <= _MOST_ROWS
        and x.shape[1] == 1
    )


def takes_few_launches(
    layer: Layer, x: jax.Array, context: Context, options: AttentionOptions, step: StepSharding
) -> bool:
    """Whether `run_decode_layer` computes a layer: a step that `decodes_few_rows`, and options that ask for it.

    Attention's weights must have full width. Experts may have any.
    """
    attention = layer.attention
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (
        options.decode is not None
        and decodes_few_rows(x, context, options, step)
        and all(isinstance(each.weight.get_value(), jax.Array) for each in projections)
    )


def run_decode_layer(
    layer: Layer,
    x: jax.Array,
    angles: jax.Array,
    index_angles: jax.Array,
    context: Any,
    options: AttentionOptions,
    step: StepSharding,
) -> tuple[jax.Array, Any, AttentionIntermediates | None, jax.Array, jax.Array]:
    """What a `DecoderLayer` computes of `[b, 1, embed]`; arguments as its own, of which `takes_few_launches` holds.

    Returns:
      `[b, 1, embed]`, the `PagedContext` with the new tokens, intermediates if the options ask for them, what the
      experts were given, `[b, 1, embed]`, and the experts chosen, int32 `[b, 1, k]`.
    """
    tokens, attention = x[:, 0], layer.attention
    queries, context, keys = _project(layer, tokens, angles[:, 0], index_angles[:, 0], context, options, step)
    scales = {"scale": attention.scale, "options": options}
    if options.attention == "dense":
        found = attend_dense(queries, keys, **scales)
    else:
        found = attend_sparse(queries, keys, top_k=attention.top_k, index_scale=layer.indexer.scale, **scales)
    weight = attention.o_proj.weight[...]
    tokens = output_projection(found.out[:, 0], weight, tokens, implementation=options.decode)
    mixed, normed, experts = route_and_mix(layer, tokens, context, options, options.decode)
    tokens += mixed
    wanted = options.intermediates or options.selections
    intermediates = AttentionIntermediates(queries.q, found.lse, found.index_scores, found.selected)
    return tokens[:, None], context, intermediates if wanted else None, normed[:, None], experts[:, None]


def route_and_mix(
    layer: Layer, tokens: jax.Array, context: Any, options: AttentionOptions, implementation: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the experts add to `[b, embed]`, one token of each row, in a step that `decodes_few_rows`.

    Args:
      implementation: of `route`.

    Returns:
      `[b, embed]`, what the experts were given, `[b, embed]`, and the experts chosen, int32 `[b, k]`.
    """
    norm, moe = layer.post_attention_norm, layer.moe
    with jax.named_scope("experts"):
        normed, experts, weights = route(
            tokens,
            norm.weight[...],
            moe.router.weight[...],
            top_k=moe.experts_per_token,
            eps=norm.eps,
            normalise=moe.normalise,
            implementation=implementation,
        )
        chosen = jnp.where(context.batch.valid(1), experts, moe.num_experts)
        matrices = moe.gate_up_proj[...], moe.down_proj[...]
        mixed = mix_experts(normed, chosen, weights, *matrices, implementation=options.implementation)
    return mixed, normed, experts


def _project(
    layer: Layer,
    tokens: jax.Array,
    angles: jax.Array,
    index_angles: jax.Array,
    context: PagedContext,
    options: AttentionOptions,
    step: StepSharding,
) -> tuple[_Queries, PagedContext, Any]:
    """Queries of `[b, embed]`, the context with the new rows, and the keys that the queries see.

    Pages of full width are written by the projections themselves, float8 ones as in any other step.
    """
    attention, indexer, pages, batch = layer.attention, layer.indexer, context.pages, context.batch
    writes = pages.kv_scales is None and pages.index_scales is None
    cache = (pages.kv, pages.index_pages, batch.slots(batch.page_table, pages.count, 1)[:, 0]) if writes else ()
    q, index_q, gates, kv, index_keys = decode_projections(
        tokens,
        layer.input_norm.weight[...],
        attention.q_proj.weight[...],
        attention.k_proj.weight[...],
        attention.v_proj.weight[...],
        indexer.q_proj.weight[...],
        indexer.k_proj.weight[...],
        attention.q_norm.weight[...],
        attention.k_norm.weight[...],
        indexer.q_norm.weight[...],
        indexer.k_norm.weight[...],
        indexer.k_norm.bias[...],
        jnp.cos(angles),
        jnp.sin(angles),
        jnp.cos(index_angles),
        jnp.sin(index_angles),
        *cache,
        index_heads=indexer.num_heads,
        eps=layer.input_norm.eps,
        index_eps=indexer.q_norm.eps,
        implementation=options.decode,
    )
    if writes:
        context, keys = context.with_new_rows(Pages(kv, index_keys.reshape(pages.index_keys.shape)))
        return _Queries(q[:, None], index_q[:, None], gates[:, None]), context, keys
    with jax.named_scope("indexer"):
        index_q, gates, index_keys, scales = in_dtype(index_q, gates, index_keys, options.indexer_dtype)
    rows = jax.tree.map(lambda x: x[:, None], Pages(kv, index_keys, scales)).in_cache_dtype(options.cache_dtype)
    context, keys = context.append(rows, step)
    return _Queries(q[:, None], index_q[:, None], gates[:, None]), context, keys
