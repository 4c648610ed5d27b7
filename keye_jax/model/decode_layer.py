"""Decoder layers in a step of decode on one device, with a token of each of few rows.

At small batches a step is bounded by many short kernels, one after the other. So what lies between a layer's products,
its attention and its experts is three operations: `finish_projections` with the new rows of the cache, `route` with the
residual and the rows that experts take, and `combine_experts` with the residual and the norm of the next layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

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
from keye_jax.model.moe import MoE, run_matrices
from keye_jax.sharding.step import StepSharding
from pallas_kernels.decode_layer import combine_experts, finish_projections, route
from pallas_kernels.dispatch import resolve

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
      attention: its attention's intermediates; None if the options do not ask for them.
      moe_input: `[b, embed]`, what its router and experts were given.
      experts: int32 `[b, k]`, each token's, best first.
      hidden: `[b, embed]`, the layer's output.
    """

    attention: AttentionIntermediates | None
    moe_input: jax.Array
    experts: jax.Array
    hidden: jax.Array


@dataclasses.dataclass(frozen=True)
class _Queries:
    """As `attention.Queries`, of one token of each row."""

    q: jax.Array
    index_q: jax.Array
    gates: jax.Array


def decodes_few_rows(x: jax.Array, contexts: Sequence[Context], options: AttentionOptions, step: StepSharding) -> bool:
    """Whether `[b, t, embed]` are the tokens of a step of decode on one device, and of few rows."""
    return (
        options.training is None
        and all(isinstance(context, PagedContext) for context in contexts)
        and not step.reads_prompts
        and step.rules.devices == 1
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
) -> tuple[jax.Array, list[Any], list[DecodeIntermediates]]:
    """Runs all layers in a step that `decodes_few_rows`.

    Args:
      last_norm: what follows the layers.
      x: `[b, 1, embed]`.
      angles, index_angles: float32 rotary angles `[b, 1, head_dim / 2]`, `[b, 1, indexer_head_dim / 2]`.
      contexts: each layer's.

    Returns:
      `[b, 1, embed]` before the last norm, the contexts with the new tokens, and what each layer computed.
    """
    rotations = tuple(turn(of[:, 0]) for of in (angles, index_angles) for turn in (jnp.cos, jnp.sin))
    norms = [layer.input_norm for layer in layers] + [last_norm]
    tokens, after, found = x[:, 0], [], []
    normed = norms[0](tokens)
    for layer, norm, context in zip(layers, norms[1:], contexts, strict=True):
        graph, state = nnx.split(layer)
        run = functools.partial(_run_layer, graph, next_eps=norm.eps, options=options, step=step)
        tokens, normed, context, intermediates = run(state, norm.weight[...], tokens, normed, rotations, context)
        after.append(context)
        found.append(intermediates)
    return tokens[:, None], after, found


@functools.partial(jax.jit, static_argnames=("graph", "next_eps", "options", "step"))
def _run_layer(
    graph: nnx.GraphDef[Any],
    state: nnx.State,
    next_norm: jax.Array,
    tokens: jax.Array,
    normed: jax.Array,
    rotations: tuple[jax.Array, ...],
    context: PagedContext,
    *,
    next_eps: float,
    options: AttentionOptions,
    step: StepSharding,
) -> tuple[jax.Array, jax.Array, PagedContext, DecodeIntermediates]:
    """A layer as a function of its parameters, traced once for all layers: `[b, embed]`, and that with its norm.

    Returns:
      `[b, embed]`, its norm by the weights `next_norm`, the context with the new tokens, and what was computed.
    """
    layer: Layer = nnx.merge(graph, state)
    attention, moe, preferred = layer.attention, layer.moe, options.implementation
    queries, context, keys = _project(layer, normed, rotations, context, options, step)
    scales = {"scale": attention.scale, "options": options}
    if options.attention == "dense":
        found = attend_dense(queries, keys, **scales)
    else:
        found = attend_sparse(queries, keys, top_k=attention.top_k, index_scale=layer.indexer.scale, **scales)
    update = attention.o_proj(found.out[:, 0])
    with jax.named_scope("experts"):
        routed = route(
            tokens,
            update,
            layer.post_attention_norm.weight[...],
            moe.router.weight[...],
            context.batch.valid(1)[:, 0],
            top_k=moe.experts_per_token,
            eps=layer.post_attention_norm.eps,
            normalise=moe.normalise,
            implementation=resolve("route", preferred),
        )
        matrices = moe.gate_up_proj[...], moe.down_proj[...]
        rows = run_matrices(routed.rows, *matrices, routed.group_sizes, preferred)
        tokens, normed = combine_experts(
            rows,
            routed.row_of,
            routed.weights,
            routed.y,
            next_norm,
            eps=next_eps,
            implementation=resolve("combine_experts", preferred),
        )
    wanted = options.intermediates or options.selections
    intermediates = AttentionIntermediates(queries.q, found.lse, found.index_scores, found.selected)
    computed = DecodeIntermediates(intermediates if wanted else None, routed.normed, routed.experts, tokens)
    return tokens, normed, context, computed


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
    attention, indexer, pages, batch = layer.attention, layer.indexer, context.pages, context.batch
    # TPUs lay out two index keys as one row: to write one as a row of its own they would copy all pages.
    writes = pages.kv_scales is None and pages.index_scales is None and options.kernels != "mosaic_tpu"
    cache = (pages.kv, pages.index_pages, batch.slots(batch.page_table, pages.count, 1)[:, 0]) if writes else ()
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
        context, keys = context.with_new_rows(Pages(kv, index_keys.reshape(pages.index_keys.shape)))
        return _Queries(q[:, None], index_q[:, None], gates[:, None]), context, keys
    with jax.named_scope("indexer"):
        index_q, gates, index_keys, scales = in_dtype(index_q, gates, index_keys, options.indexer_dtype)
    rows = jax.tree.map(lambda x: x[:, None], Pages(kv, index_keys, scales)).in_cache_dtype(options.cache_dtype)
    context, keys = context.append(rows, step)
    return _Queries(q[:, None], index_q[:, None], gates[:, None]), context, keys
