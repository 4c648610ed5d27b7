"""What is measured: every operation at the released model's sizes, beside its baselines."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import inputs
from pallas_kernels.bench.inputs import (
    CLUSTERED,
    EXPERT_HIDDEN,
    EXPERTS,
    EXPERTS_PER_TOKEN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INDEX_DIM,
    INDEX_HEADS,
    INDEX_SCALE,
    KV_HEADS,
    NEIGHBOURS,
    SCALE,
    TOP_K,
    UNRELATED,
    VISION_DIM,
    VISION_HEADS,
)
from pallas_kernels.bench.timing import Arguments
from pallas_kernels.dispatch import available
from pallas_kernels.indexer_scores import hadamard, indexer_scores, quantize
from pallas_kernels.select_topk import select_topk
from pallas_kernels.topk_attention import topk_attention

KINDS = {"clustered": CLUSTERED, "uniform": UNRELATED}
"""Selections that benchmarks use, by the size of the union of 16 neighbours' selections."""

_RAGGED_DOT_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class TorchCall:
    """A baseline of PyTorch: a function of its tensors."""

    function: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
      operation: its name.
      size: what is distinctive about it.
      candidates: functions by name, implementations and baselines, all of the same arguments.
      make: makes the arguments out of `settings`; jitted.
      settings: numbers. Cases that differ in nothing else share their compiled programs.
      flops, nbytes: useful work and memory traffic of one call; what is None is not what limits the operation.
      union: of queries that select: mean size of the union of 16 neighbours, out of the arguments; jitted.
      calls: calls in one program; None chooses.
    """

    operation: str
    size: str
    candidates: Mapping[str, Callable[..., Any] | TorchCall]
    make: Callable[..., Arguments]
    settings: tuple[int, ...] = ()
    flops: float | None = None
    nbytes: float | None = None
    union: Callable[..., jax.Array] | None = None
    calls: int | None = None

    @property
    def floor_seconds(self) -> float:
        """What one call takes at least on the fastest GPU this is likely to run on."""
        return (self.flops or 0) / 800e12 + (self.nbytes or 0) / 4.5e12


def size_name(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count:,}"


@functools.cache
def implementations(operation: str, **kwargs: Any) -> dict[str, Callable[..., Any]]:
    """The implementations of "folder.function" that this machine can run, by name; the same objects every time."""
    folder, name = operation.split(".")
    function = getattr(importlib.import_module(f"pallas_kernels.{folder}"), name)
    found = {}
    for implementation in available():
        module = f"pallas_kernels.{folder}.{implementation}"
        if importlib.util.find_spec(module) and hasattr(importlib.import_module(module), name):
            found[implementation] = functools.partial(function, implementation=implementation, **kwargs)
    return found


def _indexer_cases(contexts: list[int], queries: int) -> Iterator[Case]:
    for context in contexts:

        def make(context: int = context) -> Arguments:
            q, gates = inputs.normal(0, 1, queries, INDEX_HEADS, INDEX_DIM), inputs.normal(1, 1, queries, INDEX_HEADS)
            start = jnp.full(1, context - queries, jnp.int32)
            keys = inputs.pages(2, 1, context, INDEX_DIM)
            return q, gates.astype(jnp.float32), keys, inputs.page_table(1, context), start

        def make_float8(make: Any = make) -> Arguments:
            q, gates, keys, table, start = make()
            (q, q_scales), (keys, key_scales) = quantize(hadamard(q)), quantize(hadamard(keys))
            return q, gates * q_scales, keys, table, start, key_scales

        size = f"{queries:,} queries x {size_name(context)} keys"
        exact = implementations("indexer_scores.indexer_scores", scale=INDEX_SCALE)
        work = 2.0 * queries * (context - queries / 2) * INDEX_HEADS * INDEX_DIM
        yield Case("indexer_scores", size, exact, make, flops=work)
        yield Case("indexer_scores", f"{size}, float8", _float8_scores(), make_float8, flops=work)


@functools.cache
def _float8_scores() -> dict[str, Callable[..., Any]]:
    def scores(
        q: Any, gates: Any, keys: Any, table: Any, start: Any, key_scales: Any, *, implementation: str
    ) -> jax.Array:
        return indexer_scores(
            q, gates, keys, table, start, scale=INDEX_SCALE, key_scales=key_scales, implementation=implementation
        )

    names = implementations("indexer_scores.indexer_scores")
    return {name: functools.partial(scores, implementation=name) for name in names}


def _lax_top_k(scores: jax.Array, lengths: jax.Array) -> jax.Array:
    return jax.lax.top_k(scores, TOP_K)[1]


def _torch_topk(scores: Any, lengths: Any) -> Any:
    return scores.topk(TOP_K, dim=-1)


def _has_torch() -> bool:
    if jax.default_backend() != "gpu" or not importlib.util.find_spec("torch"):
        return False
    import torch  # pyright: ignore[reportMissingImports]

    return torch.cuda.is_available()


def _selection_cases(sizes: list[tuple[int, int]]) -> Iterator[Case]:
    candidates = {
        **implementations("select_topk.select_topk", k=TOP_K),
        "lax.top_k": _lax_top_k,
        **({"torch.topk": TorchCall(_torch_topk)} if _has_torch() else {}),
    }
    for rows, context in sizes:

        def make(clustered: int, rows: int = rows, context: int = context) -> Arguments:
            scores = inputs.normal(0, rows, context, dtype=jnp.float32)
            # Values that share their leading bits, so that thousands stand next to the threshold.
            close = 1 + jnp.round(scores * 1000) * 2.0**-20
            return jnp.where(clustered, close, scores), jnp.full(rows, context, jnp.int32)

        for kind in ("random", "close") if rows == 1024 else ("random",):
            size = f"{rows} x {size_name(context)} {kind}"
            yield Case("select_topk", size, candidates, make, (int(kind == "close"),), nbytes=4.0 * rows * context)


@functools.cache
def sequence(queries: int, context: int) -> Callable[..., Arguments]:
    """A function of (start, union) that makes what sparse attention of some queries of one sequence takes.

    It makes q, kv, page table, start, and the indexer's queries, gates and keys.
    """

    def make(start: jax.Array, union: jax.Array) -> Arguments:
        table = inputs.page_table(1, context)
        keys = inputs.pages(2, 1, context, INDEX_DIM)
        index_q, gates = inputs.index_queries(queries, keys[table[0]].reshape(context, -1), start + queries, union)
        q, kv = inputs.normal(0, 1, queries, HEADS, HEAD_DIM), inputs.pages(1, 1, context, 2 * KV_HEADS, HEAD_DIM)
        return q, kv, table, jnp.full(1, start, jnp.int32), index_q, gates, keys

    return make


def mean_union(q: Any, kv: Any, table: Any, start: Any, index_q: Any, gates: Any, keys: Any) -> jax.Array:
    """Mean size of the unions of four groups of 16 neighbours, of the arguments that `sequence` makes."""
    in_order = keys[table[0]].reshape(-1, keys.shape[-1])
    queries = index_q.shape[1]
    sizes = []
    for first in range(0, queries, max(16, queries // 4 // 16 * 16)):
        group = slice(first, first + 16)
        lengths = start[0] + jnp.arange(first, first + 16) + 1
        sizes.append(inputs.union_size(index_q[0, group], gates[0, group], in_order, lengths))
    return jnp.mean(jnp.stack(sizes).astype(jnp.float32))


def attend_sparse(
    q: Any, kv: Any, table: Any, start: Any, index_q: Any, gates: Any, keys: Any, *, implementation: str
) -> Any:
    """Scores, selection and attention, as the model puts them together."""
    scores = indexer_scores(
        index_q, gates, keys, table, start, scale=INDEX_SCALE, fill=False, implementation=implementation
    )
    lengths = start[:, None] + jnp.arange(q.shape[1]) + 1
    return topk_attention(q, scores, lengths, kv, table, top_k=TOP_K, scale=SCALE, implementation=implementation)


@functools.cache
def sparse_candidates() -> dict[str, Callable[..., Any]]:
    names = implementations("topk_attention.topk_attention")
    return {name: functools.partial(attend_sparse, implementation=name) for name in names}


def _prefill_cases(contexts: list[int], queries: int) -> Iterator[Case]:
    """`topk_attention` on the scores that related and unrelated queries have, and attention to what they select."""
    for context in contexts:

        def scored(start: jax.Array, union: jax.Array, context: int = context) -> Arguments:
            q, kv, table, start, index_q, gates, keys = sequence(queries, context)(start, union)
            scores = indexer_scores(index_q, gates, keys, table, start, scale=INDEX_SCALE, implementation="xla")
            return q, scores, start[:, None] + jnp.arange(queries) + 1, kv, table

        def selected(start: jax.Array, union: jax.Array, scored: Any = scored) -> Arguments:
            q, scores, lengths, kv, table = scored(start, union)
            return q, kv, select_topk(scores, lengths, TOP_K, implementation="xla"), table

        def union_of_scores(q: Any, scores: jax.Array, lengths: jax.Array, kv: Any, table: Any) -> jax.Array:
            return mean_of_lists(select_topk(scores[:, :64], lengths[:, :64], TOP_K, implementation="xla"))

        def union_of_lists(q: Any, kv: Any, indices: jax.Array, table: Any) -> jax.Array:
            return mean_of_lists(indices[:, :64])

        def mean_of_lists(indices: jax.Array, context: int = context) -> jax.Array:
            rows = jnp.arange(len(indices[0]))[:, None]
            chosen = jnp.zeros((len(indices[0]), context), bool).at[rows, indices[0]].set(True, mode="drop")
            return jnp.mean(
                jnp.sum(jnp.any(chosen.reshape(-1, NEIGHBOURS, context), axis=1), axis=1, dtype=jnp.float32)
            )

        composite = implementations("topk_attention.topk_attention", top_k=TOP_K, scale=SCALE)
        attention = implementations("sparse_attention.sparse_attention", scale=SCALE)
        for kind, size in KINDS.items():
            name, settings = f"{queries:,} queries, {size_name(context)} keys, {kind}", (context - queries, size)
            work = 4.0 * queries * TOP_K * HEADS * HEAD_DIM
            yield Case("topk_attention", name, composite, scored, settings, flops=work, union=union_of_scores)
            yield Case("sparse_attention", name, attention, selected, settings, flops=work, union=union_of_lists)


def _decode_cases(sizes: list[tuple[int, int]]) -> Iterator[Case]:
    """One query a sequence: each step of sparse attention, all of them, and dense attention."""
    for batch, context in sizes:
        name = f"decode, batch {batch}, {size_name(context)} keys"

        def pool(batch: int = batch, context: int = context) -> jax.Array:
            return inputs.pages(1, batch, context, 2 * KV_HEADS, HEAD_DIM)

        def query(batch: int = batch) -> jax.Array:
            return inputs.normal(0, batch, 1, HEADS, HEAD_DIM)

        def selected(batch: int = batch, context: int = context, pool: Any = pool, query: Any = query) -> Arguments:
            return query(), pool(), inputs.spread_positions(batch, context), inputs.page_table(batch, context)

        def index(batch: int = batch, context: int = context) -> Arguments:
            q, gates = inputs.normal(2, batch, 1, INDEX_HEADS, INDEX_DIM), inputs.normal(3, batch, 1, INDEX_HEADS)
            start = jnp.full(batch, context - 1, jnp.int32)
            keys = inputs.pages(4, batch, context, INDEX_DIM)
            return q, gates.astype(jnp.float32), keys, inputs.page_table(batch, context), start

        def whole(index: Any = index, pool: Any = pool, query: Any = query) -> Arguments:
            q, gates, keys, table, start = index()
            return query(), pool(), table, start, q, gates, keys

        def paged(batch: int = batch, context: int = context, pool: Any = pool, query: Any = query) -> Arguments:
            return query(), pool(), inputs.page_table(batch, context), jnp.full(batch, context - 1, jnp.int32)

        def contiguous(batch: int = batch, context: int = context, query: Any = query) -> Arguments:
            shape = batch, context, KV_HEADS, HEAD_DIM
            return query(), inputs.normal(1, *shape), inputs.normal(2, *shape)

        index_bytes = 2.0 * batch * context * INDEX_DIM
        selected_bytes, dense_bytes = (4.0 * batch * count * KV_HEADS * HEAD_DIM for count in (TOP_K, context))
        sparse = implementations("sparse_attention.sparse_attention", scale=SCALE)
        dense = implementations("flash_attention.paged_flash_attention", scale=SCALE)
        yield Case("indexer and selection", name, _scores_and_selection(), index, nbytes=index_bytes)
        yield Case("sparse_attention", name, sparse, selected, nbytes=selected_bytes)
        yield Case("DSA attention", name, sparse_candidates(), whole, nbytes=index_bytes + selected_bytes)
        yield Case("paged_flash_attention", name, dense, paged, nbytes=dense_bytes)
        yield Case("dense attention", name, {dense_baseline(): _dense_decode}, contiguous, nbytes=dense_bytes)


@functools.cache
def _scores_and_selection() -> dict[str, Callable[..., Any]]:
    select = implementations("select_topk.select_topk", k=TOP_K)

    def both(q: Any, gates: Any, keys: Any, table: Any, start: Any, *, name: str) -> Any:
        scores = indexer_scores(q, gates, keys, table, start, scale=INDEX_SCALE, implementation=name)
        return select[name](scores, start[:, None] + 1)

    return {name: functools.partial(both, name=name) for name in select}


def dense_baseline() -> str:
    """The name of the best dense attention that JAX has here."""
    return "cuDNN" if jax.default_backend() == "gpu" else "jax.nn"


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=implementation)


def _dense_decode(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return dense_attention(q, k, v, causal=False)


def _ragged_dot(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(lhs, rhs, sizes)


def _ragged_mlp(lhs: jax.Array, gate_up: jax.Array, down: jax.Array, sizes: jax.Array) -> jax.Array:
    gate, up = jnp.split(jax.lax.ragged_dot(lhs, gate_up, sizes).astype(jnp.float32), 2, axis=-1)
    return jax.lax.ragged_dot((jax.nn.silu(gate) * up).astype(lhs.dtype), down, sizes)


def _expert_cases(token_counts: list[int]) -> Iterator[Case]:
    product, mlp = (implementations(f"grouped_matmul.{name}") for name in ("grouped_matmul", "expert_mlp"))
    for tokens in token_counts:
        rng = np.random.default_rng(tokens)
        chosen = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :EXPERTS_PER_TOKEN]
        sizes = np.bincount(chosen.ravel(), minlength=EXPERTS).astype(np.int32)

        def make_mlp(tokens: int = tokens, sizes: np.ndarray = sizes) -> Arguments:
            rows = inputs.normal(0, tokens * EXPERTS_PER_TOKEN, HIDDEN)
            gate_up = inputs.normal(1, EXPERTS, HIDDEN, 2 * EXPERT_HIDDEN)
            return rows, gate_up, inputs.normal(2, EXPERTS, EXPERT_HIDDEN, HIDDEN), jnp.asarray(sizes)

        def make_product(make_mlp: Any = make_mlp) -> Arguments:
            rows, gate_up, _, sizes = make_mlp()
            return rows, gate_up, sizes

        work = 2.0 * tokens * EXPERTS_PER_TOKEN * HIDDEN * EXPERT_HIDDEN
        weights = 2.0 * int(np.count_nonzero(sizes)) * HIDDEN * EXPERT_HIDDEN
        name, baseline = f"{tokens:,} tokens", "lax.ragged_dot"
        # Off TPUs it makes a copy of the rows for each expert, 128 times their memory.
        many = jax.default_backend() != "tpu" and tokens > _RAGGED_DOT_TOKENS
        mlps = mlp if many else mlp | {baseline: _ragged_mlp}
        if tokens <= 64:
            yield Case("expert_mlp", name, mlps, make_mlp, nbytes=3 * weights)
        else:
            products = product if many else product | {baseline: _ragged_dot}
            yield Case("expert_mlp", name, mlps, make_mlp, flops=3 * work)
            yield Case("grouped_matmul", name, products, make_product, flops=2 * work)


def _vision_cases(frames: int, patches: int) -> Iterator[Case]:
    def make() -> Arguments:
        shape = frames, patches, VISION_HEADS, VISION_DIM
        return (*(inputs.normal(seed, *shape) for seed in range(3)), jnp.full(frames, patches, jnp.int32))

    yield Case(
        "flash_attention",
        f"vision, {frames} frames of {patches:,} patches",
        implementations("flash_attention.flash_attention", scale=VISION_DIM**-0.5),
        make,
        flops=4.0 * frames * patches**2 * VISION_HEADS * VISION_DIM,
    )


def cases(*, quick: bool) -> list[Case]:
    """All measurements of single operations; `quick` leaves sizes that any machine can run."""
    if quick:
        return [
            *_indexer_cases([4096], 64),
            *_selection_cases([(16, 8192)]),
            *_prefill_cases([8192], 64),
            *_decode_cases([(1, 8192)]),
            *_expert_cases([1, 16]),
            *_vision_cases(1, 256),
        ]
    return [
        *_indexer_cases([32_768, 131_072, 262_144], 2048),
        *_selection_cases([(1024, 131_072), (4096, 32_768), (64, 262_144), (1, 131_072)]),
        *_prefill_cases([32_768, 131_072], 2048),
        *_decode_cases([(1, 131_072), (8, 131_072), (64, 131_072)]),
        *_expert_cases([1, 16, 64, 2048, 16_384]),
        *_vision_cases(16, 1024),
    ]
