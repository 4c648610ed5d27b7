"""Attention with its gradients, and the indexer's: index, select, attend and KL divergence as one function.

Per query t and group g of heads, the teacher p[t, g] is the mean of the attention probabilities of the group's heads,
and the indexer's distribution is the softmax of its scores I[t], both over the keys that t attends to. The indexer
learns by KL(p || softmax(I)), whose gradient is `softmax(I) - p` (DeepSeek-V3.2, equations 3 and 4). The selection has
no gradient, so the language model's loss never reaches the indexer. The teacher has none, so the KL divergence never
reaches the model.

No probabilities are kept for the backward pass. It computes them again, a block of queries at a time. In a block,
attention is a masked product, which needs no scatter: gradients of keys and values are sums in a fixed order.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from keye_jax.train import kernels
from keye_jax.train.blocks import equal_blocks, scan, wide
from keye_jax.train.selection import topk_mask
from pallas_kernels.dispatch import available
from pallas_kernels.errors import UnsupportedError

SAVED = "attention_output"
"""Name, for rematerialisation, of what the backward pass needs of the forward pass and cannot get cheaply."""

_SEGMENTS, _SEGMENT_UNIT = 4, 64
"""Queries are worked on in segments, each with the keys before its end: four do 5/8 of the work of one."""


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """What is computed; static.

    Attributes:
      sparse: whether queries attend to their selection alone, or to all keys that they see.
      kl: whether the KL divergence is computed.
      recall: whether `IndexerMeasures.recall` is computed, which in dense attention takes a selection for nothing else.
      top_k: keys that a query selects.
      scale, index_scale: factors on the dot products of attention and of the indexer.
      width: how many keys are looked at for a row; None where a row is a sample.
      block_bytes: most bytes of the dot products of one block of queries. The backward pass has a few such arrays.
      kernels: the implementation of `pallas_kernels` that computes the forward pass; None for masked products. It is
        for sparse attention without branches from which no indexer learns.
    """

    sparse: bool
    kl: bool
    recall: bool
    top_k: int
    scale: float
    index_scale: float
    width: int | None
    block_bytes: int
    kernels: str | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexerMeasures:
    """How well the indexer predicts attention, of each query; float32 `[b, t]`.

    Attributes:
      kl: KL divergence of its distribution from the teacher, in nats.
      entropy: of the teacher, in nats.
      recall: share of the probabilities of dense attention that lies on selected keys; 0 unless `plan.recall`.
    """

    kl: jax.Array
    entropy: jax.Array
    recall: jax.Array


class Queries(NamedTuple):
    """Queries of b rows, or a block of them.

    Attributes:
      q: `[b, t, n, d]`.
      index_q: index queries `[b, t, ni, di]`.
      gates: float32 `[b, t, ni]`.
    """

    q: jax.Array
    index_q: jax.Array
    gates: jax.Array


class KeysAndValues(NamedTuple):
    """Keys of each row, `[b, t, ...]`, where a row is a sample; or of all samples one after the other, `[1, s, ...]`.

    Attributes:
      k, v: `[b, s, kv_heads, d]`.
      index_keys: `[b, s, di]`.
    """

    k: jax.Array
    v: jax.Array
    index_keys: jax.Array


class _Found(NamedTuple):
    """What the backward pass needs of the forward pass."""

    out: jax.Array  # [b, t, n, d]
    lse: jax.Array  # [b, t, n]
    selected: jax.Array | None = None  # int32 [b, t, k], positions that kernels selected


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    plan: AttentionPlan,
    queries: Queries,
    keys: KeysAndValues,
    start: jax.Array,
    first: jax.Array,
    branch: jax.Array | None = None,
) -> tuple[jax.Array, IndexerMeasures]:
    """Attends from queries to their own and earlier positions of their samples.

    Memory: the results, log-sum-exps of all queries, and a few times `plan.block_bytes`.

    Args:
      start: int32 `[b]`, the position of each row's first query in its sample; 0 where a row is a sample.
      first: int32 `[b]`, where the keys of each row's sample begin among those of all; not looked at where a row is a
        sample.
      branch: int32 `[b, t]`, where a row is a sample, or None: queries of a branch above 0 see of other branches only
        those of 0.

    Returns:
      `[b, t, n, d]` in the dtype of q, and measures, summed over the groups of heads; zeros unless `plan.kl`.
    """
    return _attend_forward(plan, queries, keys, start, first, branch)[0]


def _attend_forward(
    plan: AttentionPlan,
    queries: Queries,
    keys: KeysAndValues,
    start: jax.Array,
    first: jax.Array,
    branch: jax.Array | None = None,
) -> tuple[tuple[jax.Array, IndexerMeasures], Any]:
    assert branch is None or plan.width is None, "branches are of rows that are samples"
    if plan.kernels is not None:
        assert plan.sparse and not plan.kl and branch is None, "kernels have no branches, and no teacher of an indexer"
        return _kernel_forward(plan, queries, keys, start, first)
    parts = []
    for segment in _segments(plan, queries):

        def run(_: None, item: Any, segment: _Segment = segment) -> tuple[None, Any]:
            (part, own), start, first = item
            (window, seen), at = segment.window((keys, branch), first)
            return None, _forward_block(plan, part, window, _visible(start, part.q.shape[1], at, own, seen))

        parts.append(segment.join(scan(run, None, segment.items((queries, branch), start, first))[1]))
    found, measures = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    found = jax.tree.map(lambda x: checkpoint_name(x, SAVED), found)
    return (found.out, measures), (queries, keys, start, first, branch, found)


def best_kernels(
    plan: AttentionPlan, queries: Queries, keys: KeysAndValues, start: jax.Array, first: jax.Array
) -> str | None:
    """The implementation that computes the forward pass best, for `AttentionPlan.kernels`; arguments as of `attend`."""
    if available()[0] != "mosaic_gpu":
        return None
    plan = dataclasses.replace(plan, kernels="mosaic_gpu")
    try:
        jax.eval_shape(functools.partial(_kernel_forward, plan), queries, keys, start, first)
    except UnsupportedError:
        return None
    return plan.kernels


def _kernel_forward(
    plan: AttentionPlan, queries: Queries, keys: KeysAndValues, start: jax.Array, first: jax.Array
) -> tuple[tuple[jax.Array, IndexerMeasures], Any]:
    rows, tokens = queries.q.shape[:2]
    together, begins = keys, first
    if plan.width is None:
        together = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), keys)
        begins = jnp.arange(rows, dtype=jnp.int32) * tokens
    out, lse, selected = kernels.attend(
        queries.q,
        queries.index_q,
        queries.gates,
        together.k,
        together.v,
        together.index_keys,
        start,
        begins,
        width=plan.width or tokens,
        top_k=plan.top_k,
        scale=plan.scale,
        index_scale=plan.index_scale,
        block_bytes=plan.block_bytes,
        implementation=plan.kernels,
    )
    # The selection is made again where a layer is: it is larger than all else, and takes the kernels little time.
    out, lse = (checkpoint_name(x, SAVED) for x in (out, lse))
    zeros = jnp.zeros((rows, tokens), jnp.float32)
    found = _Found(out, lse, selected)
    return (out, IndexerMeasures(zeros, zeros, zeros)), (queries, keys, start, first, None, found)


def _attend_backward(
    plan: AttentionPlan, saved: Any, cotangents: tuple[jax.Array, IndexerMeasures]
) -> tuple[Queries, KeysAndValues, None, None, None]:
    queries, keys, start, first, branch, found = saved
    d_out, d_kl = cotangents[0], cotangents[1].kl
    d_keys = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x)), keys)
    parts = []
    for segment in _segments(plan, queries):

        def run(d_keys: KeysAndValues, item: Any, segment: _Segment = segment) -> tuple[KeysAndValues, Queries]:
            (part, own, found, d_out, d_kl), start, first = item
            (window, seen), at = segment.window((keys, branch), first)
            if found.selected is None:
                mask = _visible(start, part.q.shape[1], at, own, seen)
            else:
                mask = kernels.selected_mask(found.selected, at[:, :1, None], at.shape[1])
            d_queries, d_window = _backward_block(plan, part, window, mask, found, d_out, d_kl)
            return segment.add_to_window(d_keys, d_window, first), d_queries

        items = segment.items((queries, branch, found, d_out, d_kl), start, first)
        d_keys, d_queries = scan(run, d_keys, items)
        parts.append(segment.join(d_queries))
    d_queries = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    return d_queries, jax.tree.map(lambda d, x: d.astype(x.dtype), d_keys, keys), None, None, None


attend.defvjp(_attend_forward, _attend_backward)


def _forward_block(
    plan: AttentionPlan, queries: Queries, keys: KeysAndValues, visible: jax.Array
) -> tuple[_Found, IndexerMeasures]:
    """`attend` for a block of queries, and which keys each of them sees, bool `[b or 1, q, s]`."""
    rows = queries.q.shape[:2]
    chosen = jnp.broadcast_to(visible, (*rows, visible.shape[-1]))
    with jax.named_scope("indexer"):
        scores = jnp.where(visible, _index_scores(plan, queries, _index_dots(queries, keys)), -jnp.inf)
    if keys.k.shape[1] > plan.top_k and (plan.sparse or plan.recall):
        with jax.named_scope("selection"):
            chosen = visible & topk_mask(scores, plan.top_k)
    with jax.named_scope("attention"):
        dots = _dots(plan, queries, keys)
        mask = chosen if plan.sparse else visible
        dots_seen = jnp.where(_of_heads(mask), dots, -jnp.inf)
        lse = jax.nn.logsumexp(dots_seen, axis=-1)
        probabilities = jnp.exp(dots_seen - lse[..., None])
        out = jnp.einsum(
            "bhqgs,bshd->bqhgd",
            probabilities.astype(keys.v.dtype),
            keys.v,
            preferred_element_type=wide(keys.v),
        )
    found = _Found(out.reshape(queries.q.shape).astype(queries.q.dtype), lse.swapaxes(1, 2).reshape(*rows, -1))
    if not plan.kl:
        zeros = jnp.zeros(rows, wide(queries.gates))
        return found, IndexerMeasures(zeros, zeros, zeros)
    with jax.named_scope("kl_divergence"):
        teacher = jnp.mean(probabilities, axis=3)  # [b, h, q, s]
        negentropy = jnp.sum(jax.scipy.special.xlogy(teacher, teacher), axis=(1, 3))
        index_lse = jax.nn.logsumexp(jnp.where(mask, scores, -jnp.inf), axis=-1)
        log_q = jnp.where(mask, scores - index_lse[..., None], 0.0)
        kl = negentropy - jnp.sum(jnp.sum(teacher, axis=1) * log_q, axis=-1)
        if not plan.recall:
            return found, IndexerMeasures(kl, -negentropy, jnp.zeros_like(kl))
        if plan.sparse:
            over, under = lse, jax.nn.logsumexp(jnp.where(_of_heads(visible), dots, -jnp.inf), axis=-1)
        else:
            over, under = jax.nn.logsumexp(jnp.where(_of_heads(chosen), dots, -jnp.inf), axis=-1), lse
        recall = jnp.sum(jnp.mean(jnp.exp(over - under), axis=3), axis=1)
    return found, IndexerMeasures(kl, -negentropy, recall)


def _backward_block(
    plan: AttentionPlan,
    queries: Queries,
    keys: KeysAndValues,
    mask: jax.Array,
    found: _Found,
    d_out: jax.Array,
    d_kl: jax.Array,
) -> tuple[Queries, KeysAndValues]:
    """Gradients of a block of queries, and what it adds to those of its keys.

    Of attention, `dS = P (dO V^T - rowsum(O dO))` (FlashAttention, arXiv 2205.14135, algorithm 4). Of the indexer, with
    `dI = h softmax(I) - sum_g p_g` over h groups, `E_j = dI 1[z_j > 0]` and c the scale, `dq_j = c w_j E_j K`,
    `dw_j = c q_j . (E_j K)` and `dK = sum_j E_j^T (c w_j q_j)`.

    Args:
      mask: bool `[b or 1, q, s]`: the keys that queries see, or those that kernels selected of them.
      d_out: `[b, q, n, d]`.
      d_kl: float32 `[b, q]`.
    """
    with jax.named_scope("indexer"):
        index_dots = _index_dots(queries, keys)
        scores = jnp.where(mask, _index_scores(plan, queries, index_dots), -jnp.inf)
    if plan.sparse and keys.k.shape[1] > plan.top_k and found.selected is None:
        # Selected again, not kept: scores that are computed again may be rounded otherwise than a threshold was.
        with jax.named_scope("selection"):
            mask &= topk_mask(scores, plan.top_k)
    with jax.named_scope("attention"):
        q, heads = _grouped(queries.q, keys), keys.k.shape[2]
        by_group = _grouped(d_out, keys)
        dots = jnp.where(_of_heads(mask), _dots(plan, queries, keys), -jnp.inf)
        lse = found.lse.reshape(*found.lse.shape[:2], heads, -1).swapaxes(1, 2)
        probabilities = jnp.exp(dots - lse[..., None])
        d_p = jnp.einsum("bqhgd,bshd->bhqgs", by_group, keys.v, preferred_element_type=wide(keys.v))
        row = jnp.sum(d_out.astype(wide(d_out)) * found.out.astype(wide(d_out)), axis=-1)
        row = row.reshape(*row.shape[:2], heads, -1).swapaxes(1, 2)
        d_s = (probabilities * (d_p - row[..., None]) * plan.scale).astype(keys.k.dtype)
        d_q = jnp.einsum("bhqgs,bshd->bqhgd", d_s, keys.k, preferred_element_type=wide(keys.k))
        d_k = jnp.einsum("bhqgs,bqhgd->bshd", d_s, q, preferred_element_type=wide(q))
        rounded = probabilities.astype(keys.v.dtype)
        d_v = jnp.einsum("bhqgs,bqhgd->bshd", rounded, by_group.astype(keys.v.dtype), preferred_element_type=wide(q))
    d_q = d_q.reshape(queries.q.shape).astype(queries.q.dtype)
    if not plan.kl:
        nothing = (jnp.zeros_like(queries.index_q), jnp.zeros_like(queries.gates))
        return Queries(d_q, *nothing), KeysAndValues(d_k, d_v, jnp.zeros(keys.index_keys.shape, wide(keys.k)))
    with jax.named_scope("indexer"):
        wanted = jnp.sum(jnp.mean(probabilities, axis=3), axis=1)
        given = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        d_scores = (heads * given - wanted) * d_kl[..., None]
        d_dots = jnp.where(index_dots > 0, d_scores[:, :, None], 0.0).astype(keys.index_keys.dtype)
        pulled = jnp.einsum("bqns,bsd->bqnd", d_dots, keys.index_keys, preferred_element_type=wide(keys.k))
        gates = queries.gates[..., None] * plan.index_scale
        d_gates = plan.index_scale * jnp.sum(queries.index_q * pulled, axis=-1)
        gated = (gates * queries.index_q).astype(queries.index_q.dtype)
        d_index_keys = jnp.einsum("bqns,bqnd->bsd", d_dots, gated, preferred_element_type=wide(keys.k))
    d_index_q = (gates * pulled).astype(queries.index_q.dtype)
    return Queries(d_q, d_index_q, d_gates.astype(queries.gates.dtype)), KeysAndValues(d_k, d_v, d_index_keys)


def _visible(start: jax.Array, count: int, at: jax.Array, own: jax.Array | None, others: jax.Array | None) -> jax.Array:
    """Which keys the queries of positions `start` and on see, bool `[b or 1, count, s]`.

    Args:
      start: int32 `[b]` or `[1]`.
      count: how many queries a row has.
      at: int32 `[b, s]` or `[1, s]`, positions of the keys; negative before the sample's first.
      own, others: int32 `[b, count]` and `[b, s]`, branches of queries and keys, or None.
    """
    positions = start[:, None, None] + jnp.arange(count)[:, None]
    visible = (at[:, None] >= 0) & (at[:, None] <= positions)
    return visible if own is None or others is None else visible & same_branch(own, others)


def same_branch(own: jax.Array, others: jax.Array) -> jax.Array:
    """Whether queries of branches `own [b, q]` see keys of branches `others [b, s]`, bool `[b, q, s]`."""
    return (others[:, None] == 0) | (others[:, None] == own[:, :, None])


def _index_dots(queries: Queries, keys: KeysAndValues) -> jax.Array:
    """`[b, q, ni, s]`."""
    return jnp.einsum("bqnd,bsd->bqns", queries.index_q, keys.index_keys, preferred_element_type=wide(queries.q))


def _index_scores(plan: AttentionPlan, queries: Queries, dots: jax.Array) -> jax.Array:
    """`scale * sum_n gates[n] * relu(dots[n])`, `[b, q, s]`."""
    return jnp.sum(jax.nn.relu(dots) * (queries.gates * plan.index_scale)[..., None], axis=2)


def _dots(plan: AttentionPlan, queries: Queries, keys: KeysAndValues) -> jax.Array:
    """Scaled dot products `[b, h, q, g, s]`, in the order in which a product of matrices gives them."""
    q = _grouped(queries.q, keys)
    return jnp.einsum("bqhgd,bshd->bhqgs", q, keys.k, preferred_element_type=wide(q)) * plan.scale


def _of_heads(mask: jax.Array) -> jax.Array:
    """`[b, q, s]` to `[b, 1, q, 1, s]`."""
    return mask[:, None, :, None]


def _grouped(x: jax.Array, keys: KeysAndValues) -> jax.Array:
    """`[b, q, n, d]` to `[b, q, h, g, d]`: the g heads that share each of h key heads."""
    return x.reshape(*x.shape[:2], keys.k.shape[2], -1, x.shape[-1])


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Neighbouring queries of every row, in equal blocks.

    Attributes:
      begin, end: of the queries of a row.
      blocks: into how many a row's are split.
      width: how many keys are looked at.
      own: whether each row has its own keys; then a block has queries of all rows, else of one.
    """

    begin: int
    end: int
    blocks: int
    width: int
    own: bool

    def items(self, queries: Any, start: jax.Array, first: jax.Array) -> Any:
        """The blocks, one after the other: their parts of arrays `[b, t, ...]`, with `start` and `first` of each."""
        size = (self.end - self.begin) // self.blocks

        def split(x: jax.Array) -> jax.Array:
            x = x[:, self.begin : self.end].reshape(x.shape[0], self.blocks, size, *x.shape[2:])
            return jnp.moveaxis(x, 1, 0) if self.own else x.reshape(-1, 1, *x.shape[2:])

        starts = jnp.arange(self.blocks) * size + self.begin
        if self.own:
            return jax.tree.map(split, queries), starts[:, None], jnp.zeros(self.blocks, jnp.int32)
        return jax.tree.map(split, queries), (start[:, None] + starts).reshape(-1, 1), jnp.repeat(first, self.blocks)

    def join(self, results: Any) -> Any:
        """Results of the blocks, `[items, b or 1, size, ...]`, to `[b, end - begin, ...]`."""

        def join(x: jax.Array) -> jax.Array:
            x = jnp.moveaxis(x, 0, 1) if self.own else x
            return x.reshape(-1, self.end - self.begin, *x.shape[3:])

        return jax.tree.map(join, results)

    def window(self, keys: Any, first: jax.Array) -> tuple[Any, jax.Array]:
        """What is looked at of the keys' arrays, `[b or 1, s, ...]`, and their positions in the samples, `[1, s]`."""
        at = jnp.arange(self.width)[None]
        if self.own:
            return jax.tree.map(lambda x: x[:, : self.width], keys), at
        begin = self._begin(jax.tree.leaves(keys)[0], first)
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, self.width, 1), keys), at + begin - first

    def add_to_window(self, total: KeysAndValues, part: KeysAndValues, first: jax.Array) -> KeysAndValues:
        """`total` with `part` added to the keys that are looked at."""
        begin = 0 if self.own else self._begin(total.k, first)

        def add(total: jax.Array, part: jax.Array) -> jax.Array:
            old = jax.lax.dynamic_slice_in_dim(total, begin, self.width, 1)
            return jax.lax.dynamic_update_slice_in_dim(total, old + part, begin, 1)

        return jax.tree.map(add, total, part)

    def _begin(self, keys: jax.Array, first: jax.Array) -> jax.Array:
        return jnp.minimum(first, keys.shape[1] - self.width)


def _segments(plan: AttentionPlan, queries: Queries) -> list[_Segment]:
    rows, tokens, heads = queries.q.shape[:3]
    heads += queries.index_q.shape[2]

    def blocks(count: int, rows: int, width: int) -> int:
        return equal_blocks(count, plan.block_bytes // (4 * rows * heads * width))

    if plan.width is not None:
        return [_Segment(0, tokens, blocks(tokens, 1, plan.width), plan.width, own=False)]
    units = max(1, tokens // _SEGMENT_UNIT)
    count = min(_SEGMENTS, units)
    ends = [index * units // count * _SEGMENT_UNIT for index in range(1, count)] + [tokens]
    begins = [0, *ends[:-1]]
    return [
        _Segment(begin, end, blocks(end - begin, rows, end), end, own=True)
        for begin, end in zip(begins, ends, strict=True)
    ]
