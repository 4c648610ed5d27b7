"""Grouped-query attention over a context: sparse through the indexer's selection, or dense.

Over several devices: a step that reads prompts has all keys of its sequences on each device for the time of a layer. A
step of decode may have each sequence's keys on several devices. Each of them scores its own positions; all exchange the
scores, or of many scores the best; each attends to those of the exact selection that it has; and the parts are merged
by their log-sum-exps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.kv_cache import PAGE_SIZE, Pages
from keye_jax.model.context import Context, Keys, PackedContext
from keye_jax.model.indexer import Indexer
from keye_jax.model.layers import Linear, RMSNorm
from keye_jax.model.rope import apply_rope
from keye_jax.model.split_keys import position_of_all, positions_of_all, scores_of_all, select_split
from keye_jax.sharding.collectives import Axes, all_gather, as_words, from_words
from keye_jax.sharding.step import StepSharding, spec
from pallas_kernels.dispatch import available, resolve
from pallas_kernels.flash_attention import paged_flash_attention
from pallas_kernels.indexer_scores import indexer_scores
from pallas_kernels.paging import scaled_row_bytes
from pallas_kernels.select_topk import select_topk
from pallas_kernels.sparse_attention import sparse_attention
from pallas_kernels.topk_attention import topk_attention

_SCORE_BYTES = {"mosaic_gpu": 2**30, "mosaic_tpu": 2**31}
_SMALL_SCORE_BYTES = 64 * 2**20
"""Most bytes of the scores of one block of queries: at 128K tokens those of 2,048 fill a GPU, or those of 128.

On TPUs 2,048 queries at 256K tokens are one block: v5e's compiler aborts on the loop over two of 1,024.
"""

_DENSE_BYTES = 2**30
"""Most bytes of the copies of contexts that are attended to densely at once."""


class Training(Protocol):
    """What training puts in place of operations that have no gradient. Static in a compiled step, so hashable."""

    @property
    def detach(self) -> bool:
        """Whether no gradient leaves the indexer by its input."""
        ...

    def attend(
        self,
        inputs: AttentionInputs,
        context: PackedContext,
        step: StepSharding,
        *,
        top_k: int,
        scale: float,
        index_scale: float,
    ) -> tuple[jax.Array, Any]:
        """What a device's rows of a packed context attend to, `[b, t, n, d]`, and what is learned of, `[b, t, ...]`."""
        ...

    def mix_experts(self, *arrays: jax.Array, num_experts: int, rows_at_once: int | None = None) -> jax.Array:
        """As `keye_jax.model.moe.mix_experts`, of `num_experts` on all devices together."""
        ...

    def balance(self, moe: Any, x: jax.Array, experts: jax.Array, valid: jax.Array) -> jax.Array | None:
        """A loss of the experts chosen for a layer's tokens, or None."""
        ...

    def run_layers(
        self, layer: Callable[[Any, jax.Array], tuple[jax.Array, Any]], states: Sequence[Any], x: jax.Array
    ) -> tuple[jax.Array, list[Any]]:
        """Runs a layer with one state after the other. Returns the last output, and what each layer returned beside."""
        ...


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """How attention is computed; static in every compiled step.

    Attributes:
      attention: "sparse", the model as released, or "dense", every visible key, for comparison.
      implementation: of the kernels; operations without one of that name use "xla". None takes the best there is.
      indexer_dtype: of index queries and keys, and of the pool's: "float8_e4m3fn", as the publisher serves them and
        less exact, or None for the parameters' dtype.
      cache_dtype: of the pool's keys and values: "float8_e4m3fn", with a scale for each token and head, half as large
        and less exact, or None for the parameters' dtype. Attention to such keys and values is XLA's; sparse steps of
        decode have a kernel for Hopper GPUs.
      activation_dtype: of what experts in float8 multiply in steps that read prompts: "float8_e4m3fn", with a scale for
        each token and 128 inputs, less exact; None for the activations as they are. Steps of decode never round them.
      intermediates: whether layers also return what they computed on the way, which needs memory for all scores.
      selections: whether layers also return the positions that they selected, in any order: of a step of decode, or of
        a chunk of prompts, whose scores are then all in memory at once.
      selection: what sparse attention selects: the keys that score highest by the "indexer", as released, or to see
        what that is worth "random" visible keys, or the most "recent" ones.
      training: what takes the place of operations without gradients, over a packed context; None but in training.
    """

    attention: Literal["sparse", "dense"] = "sparse"
    implementation: str | None = None
    indexer_dtype: Literal["float8_e4m3fn"] | None = None
    cache_dtype: Literal["float8_e4m3fn"] | None = None
    activation_dtype: Literal["float8_e4m3fn"] | None = None
    intermediates: bool = False
    selections: bool = False
    selection: Literal["indexer", "random", "recent"] = "indexer"
    training: Training | None = None

    @property
    def kernels(self) -> str:
        """Name of the implementation that comes first."""
        return self.implementation or available()[0]

    def check(self, config: KeyeConfig) -> None:
        """Raises UserError if a model cannot be computed so."""
        experts = config.quantization.experts
        if self.activation_dtype is not None and (experts is None or experts.format != "fp8"):
            has = "of all bits" if experts is None else f"in {experts.format}"
            raise UserError(
                f"--activation-dtype is {self.activation_dtype!r}; it takes experts in fp8, and this model's are {has}"
            )


class Queries(Protocol):
    """What attends: the fields of `AttentionInputs` of the same names."""

    @property
    def q(self) -> jax.Array: ...

    @property
    def index_q(self) -> jax.Array: ...

    @property
    def gates(self) -> jax.Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """What a layer computes from its new tokens before it attends.

    Attributes:
      q: `[b, t, n, d]`, after norm and rope.
      k, v: `[b, t, kv_heads, d]`; keys after norm and rope.
      index_q: index queries `[b, t, ni, di]`.
      gates: their gates, float32 `[b, t, ni]`, times the scales of float8 queries.
      index_keys: `[b, t, di]`.
      index_scales: float32 `[b, t]`, factors on float8 index keys, or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    index_q: jax.Array
    gates: jax.Array
    index_keys: jax.Array
    index_scales: jax.Array | None

    @property
    def rows(self) -> Pages:
        """What the cache keeps of the tokens."""
        return Pages(jnp.concatenate([self.k, self.v], axis=2), self.index_keys, self.index_scales)

    def specs(self, step: StepSharding) -> Any:
        """Partitions in place of the arrays."""
        by_row = jax.tree.map(lambda _: spec(step.rows), self)
        q: Any = spec(step.rows, (), step.heads)
        kv: Any = spec(step.rows, (), step.kv_heads)
        return dataclasses.replace(by_row, q=q, k=kv, v=kv)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOutput:
    """What queries attended to.

    Attributes:
      out: `[b, t, n, d]`.
      lse: float32 `[b, t, n]`, log-sum-exp of the scaled dot products; -inf of a query that saw no key.
      index_scores: float32 `[b, t, s]`, -inf after the query; None when dense or not asked for.
      selected: int32 `[b, t, top_k]` positions, -1 where there are fewer; None when dense or not asked for. For
        `selections` it is as wide as the devices that share a sequence's positions have selections together.
    """

    out: jax.Array
    lse: jax.Array
    index_scores: jax.Array | None = None
    selected: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionIntermediates:
    """What an attention layer computed on the way: its queries, and `AttentionOutput`'s fields of the same names."""

    query: jax.Array
    lse: jax.Array
    index_scores: jax.Array | None
    selected: jax.Array | None


class Attention(nnx.Module):
    """The projections of a decoder layer's attention."""

    def __init__(self, config: KeyeConfig, *, rngs: nnx.Rngs):
        dtype = config.jax_dtype
        hidden, head = {"embed": config.hidden_size}, {"head_dim": config.head_dim}
        heads = {"heads": config.num_attention_heads} | head
        kv_heads = {"kv_heads": config.num_key_value_heads} | head
        self.top_k = config.sa_config.topk
        self.scale = config.head_dim**-0.5
        how = {"dtype": dtype, "rngs": rngs, "scheme": config.quantization.attention}
        self.q_proj = Linear(hidden, heads, **how)
        self.k_proj = Linear(hidden, kv_heads, **how)
        self.v_proj = Linear(hidden, kv_heads, **how)
        self.o_proj = Linear(heads, hidden, **how)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, axis="head_dim", dtype=dtype)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, axis="head_dim", dtype=dtype)

    def __call__[C: Context](
        self,
        x: jax.Array,
        indexer: Indexer,
        angles: jax.Array,
        index_angles: jax.Array,
        context: C,
        options: AttentionOptions,
        step: StepSharding,
    ) -> tuple[jax.Array, C, Any]:
        """Attends from new tokens to their context and themselves.

        Args:
          x: `[b, t, embed]`, the normed layer input.
          angles, index_angles: float32 rotary angles `[b, t, head_dim / 2]`, `[b, t, indexer_head_dim / 2]`.
          context: what the tokens see.
          step: how the arrays lie over devices.

        Returns:
          `[b, t, embed]`, the context with the new tokens, and `AttentionIntermediates` if the options ask for them, or
          what training's attention returns.
        """
        inputs = self.project(x, indexer, angles, index_angles, options)
        if options.training is not None:
            out, learned = self._attend_in_training(inputs, indexer, context, options.training, step)
            return self.o_proj(out), context, learned

        def attend(inputs: AttentionInputs, context: C) -> tuple[AttentionOutput, C]:
            context, keys = context.append(inputs.rows.in_cache_dtype(options.cache_dtype), step)
            if options.attention == "dense":
                found = attend_dense(inputs, keys, scale=self.scale, options=options)
            else:
                found = attend_sparse(
                    inputs, keys, top_k=self.top_k, scale=self.scale, index_scale=indexer.scale, options=options
                )
            return merge(found, keys.split), context

        sharded = step.shard_map(
            attend,
            (inputs.specs(step), context.specs(step)),
            (output_specs(step, options), context.specs(step)),
        )
        found, context = sharded(inputs, context)
        intermediates = AttentionIntermediates(inputs.q, found.lse, found.index_scores, found.selected)
        wanted = options.intermediates or options.selections
        return self.o_proj(found.out), context, intermediates if wanted else None

    def _attend_in_training(
        self, inputs: AttentionInputs, indexer: Indexer, context: Context, training: Training, step: StepSharding
    ) -> tuple[jax.Array, Any]:
        def attend(inputs: AttentionInputs, context: Context) -> tuple[jax.Array, Any]:
            assert isinstance(context, PackedContext), "training has no cache"
            scales = {"scale": self.scale, "index_scale": indexer.scale}
            return training.attend(inputs, context, step, top_k=self.top_k, **scales)

        results = (spec(step.rows, (), step.heads), spec(step.rows))
        return step.shard_map(attend, (inputs.specs(step), context.specs(step)), results)(inputs, context)

    def project(
        self, x: jax.Array, indexer: Indexer, angles: jax.Array, index_angles: jax.Array, options: AttentionOptions
    ) -> AttentionInputs:
        """Queries, keys and values of the layer and of its indexer; arguments as for `__call__`."""
        q = apply_rope(self.q_norm(self.q_proj(x)), angles)
        k = apply_rope(self.k_norm(self.k_proj(x)), angles)
        detached = options.training is not None and options.training.detach
        with jax.named_scope("indexer"):
            seen = jax.lax.stop_gradient(x) if detached else x
            index_q, gates, index_keys, index_scales = indexer(seen, index_angles, dtype=options.indexer_dtype)
        return AttentionInputs(q, k, self.v_proj(x), index_q, gates, index_keys, index_scales)


def attend_dense(inputs: Queries, keys: Keys, *, scale: float, options: AttentionOptions) -> AttentionOutput:
    """Attends to all keys that each query sees.

    Memory: copies of the contexts of the rows that fit into `_DENSE_BYTES` together, at least one.
    """
    pages, kv = keys.pages, keys.pages.kv
    implementation = resolve("paged_flash_attention", options.implementation) if pages.kv_scales is None else "xla"

    def attend(q: jax.Array, table: jax.Array, start: jax.Array) -> AttentionOutput:
        with jax.named_scope("attention"):
            how = {"scale": scale, "kv_scales": pages.kv_scales, "implementation": implementation}
            return AttentionOutput(*paged_flash_attention(q, kv, table, start, **how))

    q = inputs.q
    row_bytes = scaled_row_bytes(kv, q.dtype)
    at_once = _DENSE_BYTES // (keys.page_table.shape[1] * PAGE_SIZE * row_bytes) if q.shape[1] > 1 else len(q)
    return _in_turns(attend, max(1, at_once), q, keys.page_table, keys.start)


def attend_sparse(
    inputs: Queries, keys: Keys, *, top_k: int, scale: float, index_scale: float, options: AttentionOptions
) -> AttentionOutput:
    """Scores, selects and attends, a block of queries at a time.

    Memory: the scores of one block of queries, which is smaller the longer the context is; never those of all queries.

    Args:
      keys: of the whole context, the new tokens' included.

    Returns:
      the attention output, with scores and selection if the options ask for intermediates.
    """
    pages, preferred = keys.pages, options.implementation
    start = keys.start
    # Queries below `top_k` select all that they see: their scores matter only where something else reads them.
    shows_scores = options.intermediates or options.selection != "indexer" or bool(keys.split)
    if inputs.q.shape[1] == 1 and keys.count is not None:
        # An idle row of a step of decode sees no key, so that kernels are soon done with it.
        start = jnp.where(keys.count > 0, start, -1)

    def attend(
        q: jax.Array, index_q: jax.Array, gates: jax.Array, table: jax.Array, start: jax.Array, last: jax.Array
    ) -> AttentionOutput:
        with jax.named_scope("indexer"):
            scores = indexer_scores(
                index_q,
                gates,
                pages.index_pages,
                table,
                # A shard that a sequence has not reached is scored as if it held one key, which is not looked at.
                jnp.maximum(start, 0) if keys.split else start,
                scale=index_scale,
                key_scales=pages.index_scales,
                fill=options.intermediates,
                skip_below=0 if shows_scores else top_k,
                implementation=resolve("indexer_scores", preferred),
            )
        scores = _scores_of_selection(options.selection, scores, start, keys.split)
        seen = start[:, None] + jnp.minimum(jnp.arange(q.shape[1]), last[:, None]) + 1
        lengths = jnp.minimum(seen, scores.shape[-1])
        # `topk_attention` takes no scales.
        if keys.split or options.selections or pages.kv_scales is not None:
            with jax.named_scope("selection"):
                if keys.split:
                    selected = select_split(scores, lengths, top_k, keys.split, preferred)
                else:
                    implementation = resolve("select_topk", preferred)
                    selected = select_topk(scores, lengths, top_k, implementation=implementation)
            with jax.named_scope("attention"):
                how = {"scale": scale, "kv_scales": pages.kv_scales}
                # Of kernels, only those of Hopper GPUs take scales.
                takes = pages.kv_scales is None or preferred != "mosaic_tpu"
                how["implementation"] = resolve("sparse_attention", preferred) if takes else "xla"
                out, lse = sparse_attention(q, pages.kv, selected, table, **how)
        else:
            selected = None
            with jax.named_scope("attention"):
                implementation = resolve("topk_attention", preferred)
                out, lse = topk_attention(
                    q, scores, lengths, pages.kv, table, top_k=top_k, scale=scale, implementation=implementation
                )
        if options.selections:
            assert selected is not None, "it was selected above"
            own = position_of_all(selected, keys.split) if keys.split else selected
            return AttentionOutput(out, lse, None, jnp.where(selected >= 0, own, -1))
        if not options.intermediates:
            return AttentionOutput(out, lse)
        if selected is None:
            selected = select_topk(scores, lengths, top_k, implementation=resolve("select_topk", preferred))
        scores = jnp.where(jnp.arange(scores.shape[-1]) < lengths[..., None], scores, -jnp.inf)
        return AttentionOutput(out, lse, scores_of_all(scores, keys.split), positions_of_all(selected, keys.split))

    q, index_q, gates = inputs.q, inputs.index_q, inputs.gates
    batch, queries = q.shape[:2]
    last = jnp.full(batch, queries - 1) if keys.count is None else jnp.maximum(keys.count, 1) - 1
    at_once = queries_at_once(options.kernels, keys.page_table.shape[1] * PAGE_SIZE)
    if options.intermediates or options.selections or batch * queries <= at_once:
        return attend(q, index_q, gates, keys.page_table, start, last)
    if batch > 1 and queries <= at_once:
        return _in_turns(attend, at_once // queries, q, index_q, gates, keys.page_table, start, last)

    blocks = math.ceil(queries / max(1, at_once // batch))
    block = math.ceil(queries / blocks)
    padding = ((0, 0), (0, blocks * block - queries))
    q, index_q, gates = (jnp.pad(x, padding + ((0, 0),) * (x.ndim - 2)) for x in (q, index_q, gates))

    def attend_block(i: jax.Array, done: AttentionOutput) -> AttentionOutput:
        first = i * block
        part_q, part_index_q, part_gates = (_part(x, first, block, 1) for x in (done.out, index_q, gates))
        part = attend(part_q, part_index_q, part_gates, keys.page_table, start + first, last - first)
        return _overwrite(done, part, first, 1)

    done = jax.lax.fori_loop(0, blocks, attend_block, _begun(q))
    return AttentionOutput(done.out[:, :queries], done.lse[:, :queries])


def queries_at_once(implementation: str, context: int) -> int:
    """Queries whose scores of a whole context are in memory together, where a step has as many."""
    return max(1, _SCORE_BYTES.get(implementation, _SMALL_SCORE_BYTES) // (4 * context))


def _scores_of_selection(selection: str, scores: jax.Array, start: jax.Array, axes: Axes) -> jax.Array:
    """Scores `[b, t, s]` whose highest are what `selection` of `AttentionOptions` says, in place of the indexer's."""
    if selection == "indexer":
        return scores
    key = jnp.arange(scores.shape[2])
    key = position_of_all(key, axes) if axes else key
    if selection == "recent":
        return jnp.broadcast_to(key.astype(jnp.float32), scores.shape)
    # A hash of positions, and of the indexer's scores so that layers differ. It needs no state and no key.
    query = start[:, None, None] + jnp.arange(scores.shape[1])[:, None]
    mixed = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    for value in (query, key):
        mixed = (mixed ^ (value.astype(jnp.uint32) * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
        mixed ^= mixed >> 15
    return (mixed >> 8).astype(jnp.float32)


def merge(found: AttentionOutput, axes: Axes) -> AttentionOutput:
    """Attention to the keys of all devices along `axes` from that to each one's, in float32."""
    if not axes:
        return found
    words = jnp.concatenate([as_words(found.out), as_words(found.lse[..., None])], axis=-1)
    words = all_gather(words[None], axes, axis=0)
    outs, lses = from_words(words[..., :-1], found.out.dtype), from_words(words[..., -1:], found.lse.dtype)[..., 0]
    lse = jax.nn.logsumexp(lses, axis=0)
    weights = jnp.exp(lses - jnp.where(jnp.isfinite(lse), lse, 0.0))
    out = jnp.sum(weights[..., None] * outs.astype(jnp.float32), axis=0).astype(found.out.dtype)
    return dataclasses.replace(found, out=out, lse=lse)


def output_specs(step: StepSharding, options: AttentionOptions) -> Any:
    """Partitions in place of the arrays of an `AttentionOutput`."""
    by_head: Any = spec(step.rows, (), step.heads)
    if options.selections:
        selected: Any = spec(step.rows, (), step.cache_sequence)
        return AttentionOutput(by_head, by_head, None, selected)
    found: Any = spec(step.rows) if options.intermediates and options.attention == "sparse" else None
    return AttentionOutput(by_head, by_head, found, found)


def _in_turns(
    attend: Callable[..., AttentionOutput], at_once: int, q: jax.Array, *others: jax.Array
) -> AttentionOutput:
    """`attend` on at most `at_once` rows, the first dimension of all arguments, at a time."""
    batch = len(q)
    if batch <= at_once:
        return attend(q, *others)
    at_once = next(count for count in range(at_once, 0, -1) if batch % count == 0)

    def turn(i: jax.Array, done: AttentionOutput) -> AttentionOutput:
        first = i * at_once
        return _overwrite(done, attend(*(_part(x, first, at_once, 0) for x in (done.out, *others))), first, 0)

    return jax.lax.fori_loop(0, batch // at_once, turn, _begun(q))


# In place of queries: the program of a step would hold output buffers of zeros for every layer from its beginning.


def _begun(q: jax.Array) -> AttentionOutput:
    return AttentionOutput(q, q[..., 0].astype(jnp.float32))


def _part(x: jax.Array, first: jax.Array, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis)


def _overwrite(done: AttentionOutput, part: AttentionOutput, first: jax.Array, axis: int) -> AttentionOutput:
    """`done` with a part of its queries overwritten with what they attended to."""
    out, lse = (
        jax.lax.dynamic_update_slice_in_dim(old, new, first, axis)
        for old, new in ((done.out, part.out), (done.lse, part.lse))
    )
    return AttentionOutput(out, lse)
