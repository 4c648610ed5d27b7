"""The measurements: every operation at the released model's sizes, beside its baselines."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import inputs
from pallas_kernels.bench.inputs import CLUSTERED, NEIGHBOURS, UNRELATED
from pallas_kernels.bench.timing import Arguments
from pallas_kernels.dispatch import OPERATIONS, available
from pallas_kernels.grouped_matmul import quantize_rows, quantized_expert_mlp
from pallas_kernels.indexer_scores import hadamard, indexer_scores, quantize
from pallas_kernels.quantized import QuantizedMatrices
from pallas_kernels.select_topk import select_topk
from pallas_kernels.shapes import KEYE_VL_2 as MODEL
from pallas_kernels.topk_attention import topk_attention

KINDS = {"clustered": CLUSTERED, "uniform": UNRELATED}
"""Kinds of selections, with the size of the union of 16 neighbouring queries' selections."""

_RAGGED_DOT_TOKENS = 2048
"""Most tokens at which `lax.ragged_dot` is measured where it copies the rows for every expert."""


@dataclasses.dataclass(frozen=True)
class TorchCall:
    """A baseline that is a function of PyTorch tensors."""

    function: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """One measurement.

    Attributes:
      operation: name of the operation.
      size: words that tell this measurement from the operation's others.
      candidates: implementations and baselines by name, all functions of the same arguments.
      make: makes the arguments from `settings`; it is jitted.
      settings: integers. Cases that differ only in these share their compiled programs.
      flops, nbytes: useful FLOPs, and useful bytes of memory traffic, of one call. None if that does not limit the
        operation.
      union: computes the mean size of the unions of 16 neighbouring queries' selections from the arguments; it is
        jitted. None where no query selects.
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
        """Least seconds of one call on the fastest GPU that this is likely to run on."""
        return (self.flops or 0) / 800e12 + (self.nbytes or 0) / 4.5e12


def size_name(count: int) -> str:
    """`count` as a reader knows it: 131072 is 128K."""
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count:,}"


@functools.cache
def implementations(operation: str, **kwargs: Any) -> dict[str, Callable[..., Any]]:
    """The implementations of an operation that this machine can run, by name.

    Args:
      operation: a key of `OPERATIONS`.
      **kwargs: passed on to every call.

    Returns:
      Functions of the operation's arguments. The same arguments return the same functions.
    """
    found = OPERATIONS[operation]
    function = getattr(importlib.import_module(f"pallas_kernels.{found.folder}"), operation)
    return {
        name: functools.partial(function, implementation=name, **kwargs)
        for name in found.implementations
        if name in available()
    }


def _indexer_cases(contexts: list[int], queries: int) -> Iterator[BenchCase]:
    for context in contexts:

        def make(context: int = context) -> Arguments:
            q = inputs.normal(0, 1, queries, MODEL.index_heads, MODEL.index_dim)
            gates = inputs.normal(1, 1, queries, MODEL.index_heads)
            start = jnp.full(1, context - queries, jnp.int32)
            keys = inputs.pages(2, 1, context, MODEL.index_dim)
            return q, gates.astype(jnp.float32), keys, inputs.page_table(1, context), start

        def make_float8(make: Any = make) -> Arguments:
            q, gates, keys, table, start = make()
            (q, q_scales), (keys, key_scales) = quantize(hadamard(q)), quantize(hadamard(keys))
            return q, gates * q_scales, keys, table, start, key_scales

        size = f"{queries:,} queries x {size_name(context)} keys"
        exact = implementations("indexer_scores", scale=MODEL.index_scale)
        work = 2.0 * queries * (context - queries / 2) * MODEL.index_heads * MODEL.index_dim
        yield BenchCase("indexer_scores", size, exact, make, flops=work)
        yield BenchCase("indexer_scores", f"{size}, float8", _float8_scores(), make_float8, flops=work)


@functools.cache
def _float8_scores() -> dict[str, Callable[..., Any]]:
    def scores(
        q: Any, gates: Any, keys: Any, table: Any, start: Any, key_scales: Any, *, implementation: str
    ) -> jax.Array:
        return indexer_scores(
            q, gates, keys, table, start, scale=MODEL.index_scale, key_scales=key_scales, implementation=implementation
        )

    names = implementations("indexer_scores")
    return {name: functools.partial(scores, implementation=name) for name in names}


def _lax_top_k(scores: jax.Array, lengths: jax.Array) -> jax.Array:
    return jax.lax.top_k(scores, MODEL.top_k)[1]


def _torch_topk(scores: Any, lengths: Any) -> Any:
    return scores.topk(MODEL.top_k, dim=-1)


def _has_torch() -> bool:
    if jax.default_backend() != "gpu" or not importlib.util.find_spec("torch"):
        return False
    import torch  # pyright: ignore[reportMissingImports]

    return torch.cuda.is_available()


def _selection_cases(sizes: list[tuple[int, int]]) -> Iterator[BenchCase]:
    candidates = {
        **implementations("select_topk", k=MODEL.top_k),
        "lax.top_k": _lax_top_k,
        **({"torch.topk": TorchCall(_torch_topk)} if _has_torch() else {}),
    }
    for rows, context in sizes:

        def make(clustered: int, rows: int = rows, context: int = context) -> Arguments:
            scores = inputs.normal(0, rows, context, dtype=jnp.float32)
            # These values share their leading bits, so thousands are next to the threshold.
            close = 1 + jnp.round(scores * 1000) * 2.0**-20
            return jnp.where(clustered, close, scores), jnp.full(rows, context, jnp.int32)

        for kind in ("random", "close") if rows == 1024 else ("random",):
            size = f"{rows} x {size_name(context)} {kind}"
            yield BenchCase("select_topk", size, candidates, make, (int(kind == "close"),), nbytes=4.0 * rows * context)


def _nucleus_cases(sizes: list[tuple[int, int]]) -> Iterator[BenchCase]:
    for rows, vocab in sizes:
        for top_k in (20, 0):

            def make(top_k: int, rows: int = rows, vocab: int = vocab) -> Arguments:
                logits = 3 * inputs.normal(0, rows, vocab, dtype=jnp.float32)
                ones = jnp.ones(rows, jnp.int32)
                return logits, top_k * ones, jnp.full(rows, 0.95, jnp.float32), ones

            size = f"{rows} x {size_name(vocab)}, top_k {top_k}"
            yield BenchCase("nucleus", size, implementations("nucleus"), make, (top_k,), nbytes=4.0 * rows * vocab)


@functools.cache
def sequence(queries: int, context: int) -> Callable[..., Arguments]:
    """The `make` of sparse attention of `queries` queries of one sequence, from the settings (start, union).

    It makes q, kv, page table, start, and the indexer's queries, gates and keys.
    """

    def make(start: jax.Array, union: jax.Array) -> Arguments:
        table = inputs.page_table(1, context)
        keys = inputs.pages(2, 1, context, MODEL.index_dim)
        index_q, gates = inputs.index_queries(queries, keys[table[0]].reshape(context, -1), start + queries, union)
        q = inputs.normal(0, 1, queries, MODEL.heads, MODEL.head_dim)
        kv = inputs.pages(1, 1, context, 2 * MODEL.kv_heads, MODEL.head_dim)
        return q, kv, table, jnp.full(1, start, jnp.int32), index_q, gates, keys

    return make


def mean_union(q: Any, kv: Any, table: Any, start: Any, index_q: Any, gates: Any, keys: Any) -> jax.Array:
    """Mean size of the unions of four groups of 16 neighbours. The arguments are those that `sequence` makes."""
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
    """Scores, selection and attention, as the model combines them."""
    scores = indexer_scores(
        index_q, gates, keys, table, start, scale=MODEL.index_scale, fill=False, implementation=implementation
    )
    lengths = start[:, None] + jnp.arange(q.shape[1]) + 1
    return topk_attention(
        q, scores, lengths, kv, table, top_k=MODEL.top_k, scale=MODEL.scale, implementation=implementation
    )


@functools.cache
def sparse_candidates() -> dict[str, Callable[..., Any]]:
    names = implementations("topk_attention")
    return {name: functools.partial(attend_sparse, implementation=name) for name in names}


def _prefill_cases(contexts: list[int], queries: int) -> Iterator[BenchCase]:
    """`topk_attention` on the scores of related and of unrelated queries, and attention to their selections."""
    for context in contexts:

        def scored(start: jax.Array, union: jax.Array, context: int = context) -> Arguments:
            q, kv, table, start, index_q, gates, keys = sequence(queries, context)(start, union)
            scores = indexer_scores(index_q, gates, keys, table, start, scale=MODEL.index_scale, implementation="xla")
            return q, scores, start[:, None] + jnp.arange(queries) + 1, kv, table

        def selected(start: jax.Array, union: jax.Array, scored: Any = scored) -> Arguments:
            q, scores, lengths, kv, table = scored(start, union)
            return q, kv, select_topk(scores, lengths, MODEL.top_k, implementation="xla"), table

        def union_of_scores(q: Any, scores: jax.Array, lengths: jax.Array, kv: Any, table: Any) -> jax.Array:
            return mean_of_lists(select_topk(scores[:, :64], lengths[:, :64], MODEL.top_k, implementation="xla"))

        def union_of_lists(q: Any, kv: Any, indices: jax.Array, table: Any) -> jax.Array:
            return mean_of_lists(indices[:, :64])

        def mean_of_lists(indices: jax.Array, context: int = context) -> jax.Array:
            rows = jnp.arange(len(indices[0]))[:, None]
            chosen = jnp.zeros((len(indices[0]), context), bool).at[rows, indices[0]].set(True, mode="drop")
            return jnp.mean(
                jnp.sum(jnp.any(chosen.reshape(-1, NEIGHBOURS, context), axis=1), axis=1, dtype=jnp.float32)
            )

        composite = implementations("topk_attention", top_k=MODEL.top_k, scale=MODEL.scale)
        attention = implementations("sparse_attention", scale=MODEL.scale)
        for kind, size in KINDS.items():
            name, settings = f"{queries:,} queries, {size_name(context)} keys, {kind}", (context - queries, size)
            work = 4.0 * queries * MODEL.top_k * MODEL.heads * MODEL.head_dim
            yield BenchCase("topk_attention", name, composite, scored, settings, flops=work, union=union_of_scores)
            yield BenchCase("sparse_attention", name, attention, selected, settings, flops=work, union=union_of_lists)


def _decode_cases(sizes: list[tuple[int, int]]) -> Iterator[BenchCase]:
    """One query per sequence: each step of sparse attention, all steps together, and dense attention."""
    for batch, context in sizes:
        name = f"decode, batch {batch}, {size_name(context)} keys"

        def pool(batch: int = batch, context: int = context) -> jax.Array:
            return inputs.pages(1, batch, context, 2 * MODEL.kv_heads, MODEL.head_dim)

        def query(batch: int = batch) -> jax.Array:
            return inputs.normal(0, batch, 1, MODEL.heads, MODEL.head_dim)

        def selected(batch: int = batch, context: int = context, pool: Any = pool, query: Any = query) -> Arguments:
            return query(), pool(), inputs.spread_positions(batch, context), inputs.page_table(batch, context)

        def index(batch: int = batch, context: int = context) -> Arguments:
            q = inputs.normal(2, batch, 1, MODEL.index_heads, MODEL.index_dim)
            gates = inputs.normal(3, batch, 1, MODEL.index_heads)
            start = jnp.full(batch, context - 1, jnp.int32)
            keys = inputs.pages(4, batch, context, MODEL.index_dim)
            return q, gates.astype(jnp.float32), keys, inputs.page_table(batch, context), start

        def whole(index: Any = index, pool: Any = pool, query: Any = query) -> Arguments:
            q, gates, keys, table, start = index()
            return query(), pool(), table, start, q, gates, keys

        def paged(batch: int = batch, context: int = context, pool: Any = pool, query: Any = query) -> Arguments:
            return query(), pool(), inputs.page_table(batch, context), jnp.full(batch, context - 1, jnp.int32)

        def contiguous(batch: int = batch, context: int = context, query: Any = query) -> Arguments:
            shape = batch, context, MODEL.kv_heads, MODEL.head_dim
            return query(), inputs.normal(1, *shape), inputs.normal(2, *shape)

        index_bytes = 2.0 * batch * context * MODEL.index_dim
        selected_bytes, dense_bytes = (
            4.0 * batch * count * MODEL.kv_heads * MODEL.head_dim for count in (MODEL.top_k, context)
        )
        sparse = implementations("sparse_attention", scale=MODEL.scale)
        dense = implementations("paged_flash_attention", scale=MODEL.scale)
        yield BenchCase("indexer and selection", name, _scores_and_selection(), index, nbytes=index_bytes)
        yield BenchCase("sparse_attention", name, sparse, selected, nbytes=selected_bytes)
        yield BenchCase("DSA attention", name, sparse_candidates(), whole, nbytes=index_bytes + selected_bytes)
        yield BenchCase("paged_flash_attention", name, dense, paged, nbytes=dense_bytes)
        yield BenchCase("dense attention", name, {dense_baseline(): _dense_decode}, contiguous, nbytes=dense_bytes)


@functools.cache
def _scores_and_selection() -> dict[str, Callable[..., Any]]:
    select = implementations("select_topk", k=MODEL.top_k)

    def both(q: Any, gates: Any, keys: Any, table: Any, start: Any, *, name: str) -> Any:
        scores = indexer_scores(q, gates, keys, table, start, scale=MODEL.index_scale, implementation=name)
        return select[name](scores, start[:, None] + 1)

    return {name: functools.partial(both, name=name) for name in select}


def dense_baseline() -> str:
    """Name of the best dense attention that JAX has for this device."""
    return "cuDNN" if jax.default_backend() == "gpu" else "jax.nn"


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    """The baseline `dense_baseline` names. q `[b, t, n, d]`, k and v `[b, s, k, d]`; the result has the shape of q."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=implementation)


def _dense_decode(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return dense_attention(q, k, v, causal=False)


def _ragged_dot(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(lhs, rhs, sizes)


def _ragged_mlp(lhs: jax.Array, gate_up: jax.Array, down: jax.Array, sizes: jax.Array) -> jax.Array:
    gate, up = jnp.split(jax.lax.ragged_dot(lhs, gate_up, sizes).astype(jnp.float32), 2, axis=-1)
    return jax.lax.ragged_dot((jax.nn.silu(gate) * up).astype(lhs.dtype), down, sizes)


def _expert_sizes(tokens: int) -> np.ndarray:
    """Random routing: the rows of each expert."""
    rng = np.random.default_rng(tokens)
    chosen = np.argsort(rng.random((tokens, MODEL.experts)), axis=1)[:, : MODEL.experts_per_token]
    return np.bincount(chosen.ravel(), minlength=MODEL.experts).astype(np.int32)


def _expert_cases(token_counts: list[int]) -> Iterator[BenchCase]:
    product, mlp = (implementations(name) for name in ("grouped_matmul", "expert_mlp"))
    for tokens in token_counts:
        sizes = _expert_sizes(tokens)

        def make_mlp(tokens: int = tokens, sizes: np.ndarray = sizes) -> Arguments:
            rows = inputs.normal(0, tokens * MODEL.experts_per_token, MODEL.hidden)
            gate_up = inputs.normal(1, MODEL.experts, MODEL.hidden, 2 * MODEL.expert_hidden)
            return rows, gate_up, inputs.normal(2, MODEL.experts, MODEL.expert_hidden, MODEL.hidden), jnp.asarray(sizes)

        def make_product(make_mlp: Any = make_mlp) -> Arguments:
            rows, gate_up, _, sizes = make_mlp()
            return rows, gate_up, sizes

        work = 2.0 * tokens * MODEL.experts_per_token * MODEL.hidden * MODEL.expert_hidden
        weights = 2.0 * int(np.count_nonzero(sizes)) * MODEL.hidden * MODEL.expert_hidden
        name, baseline = f"{tokens:,} tokens", "lax.ragged_dot"
        # On other devices than TPUs, lax.ragged_dot copies the rows for every expert: 128 times their memory.
        many = jax.default_backend() != "tpu" and tokens > _RAGGED_DOT_TOKENS
        mlps = mlp if many else mlp | {baseline: _ragged_mlp}
        if tokens <= 64:
            yield BenchCase("expert_mlp", name, mlps, make_mlp, nbytes=3 * weights)
        else:
            products = product if many else product | {baseline: _ragged_dot}
            yield BenchCase("expert_mlp", name, mlps, make_mlp, flops=3 * work)
            yield BenchCase("grouped_matmul", name, products, make_product, flops=2 * work)


_QUANTIZED_BLOCKS: Mapping[str, tuple[int | None, int]] = {"fp8": (128, 128), "int8": (None, 1), "int4": (128, 1)}
"""Inputs and outputs that share a scale, None for all, as `keye-jax quantize` writes them."""


@functools.cache
def _quantized_mlps(kind: str, *, float8_rows: bool) -> dict[str, Callable[..., Any]]:
    def mlp(rows: Any, gate_up: Any, gate_up_scales: Any, down: Any, down_scales: Any, sizes: Any, **how: Any) -> Any:
        inputs, outputs = _QUANTIZED_BLOCKS[kind]
        both = QuantizedMatrices(gate_up, gate_up_scales, None, (inputs or MODEL.hidden, outputs))
        last = QuantizedMatrices(down, down_scales, None, (inputs or MODEL.expert_hidden, outputs))
        return quantized_expert_mlp(quantize_rows(rows) if float8_rows else rows, both, last, sizes, **how)

    names = implementations("quantized_expert_mlp")
    return {name: functools.partial(mlp, implementation=name) for name in names}


def _quantized_expert_cases(token_counts: list[int]) -> Iterator[BenchCase]:
    """Bytes are those of values. With rows in float8 the rounding of the first ones counts."""
    for tokens, kind in itertools.product(token_counts, _QUANTIZED_BLOCKS):
        sizes = _expert_sizes(tokens)

        def make(tokens: int = tokens, kind: str = kind, sizes: np.ndarray = sizes) -> Arguments:
            rows = inputs.normal(0, tokens * MODEL.experts_per_token, MODEL.hidden)
            gate_up = inputs.quantized(1, kind, *_QUANTIZED_BLOCKS[kind], MODEL.hidden, 2 * MODEL.expert_hidden)
            down = inputs.quantized(2, kind, *_QUANTIZED_BLOCKS[kind], MODEL.expert_hidden, MODEL.hidden)
            return rows, *gate_up, *down, jnp.asarray(sizes)

        numbers = 3.0 * MODEL.hidden * MODEL.expert_hidden
        nbytes = numbers * int(np.count_nonzero(sizes)) * (0.5 if kind == "int4" else 1)
        flops = 2 * numbers * tokens * MODEL.experts_per_token
        for float8_rows in (False, True) if kind == "fp8" and tokens > 64 else (False,):
            name = f"{tokens:,} tokens, {kind}" + ", rows in float8" * float8_rows
            mlps = _quantized_mlps(kind, float8_rows=float8_rows)
            few = tokens <= 64
            yield BenchCase(
                *("quantized_expert_mlp", name, mlps, make),
                flops=None if few else flops,
                nbytes=nbytes if few else None,
            )


def _decode_layer_cases(token_counts: list[int]) -> Iterator[BenchCase]:
    """Bytes are those of weights, or of rows where there are no weights."""
    eps = {"eps": 1e-6}
    finished = implementations("finish_projections", index_eps=1e-6, **eps)
    for tokens in token_counts:
        shapes = MODEL.projected_arguments(tokens)

        def make_projected(shapes: Any = shapes) -> Arguments:
            return tuple(inputs.normal(i, *x.shape).astype(x.dtype) for i, x in enumerate(shapes.values()))

        def make_route(tokens: int = tokens) -> Arguments:
            x, update = (inputs.normal(seed, tokens, MODEL.hidden) for seed in (0, 1))
            norm, router = inputs.normal(2, MODEL.hidden), inputs.normal(3, MODEL.experts, MODEL.hidden)
            return x, update, norm, router, jnp.ones(tokens, bool)

        def make_combine(tokens: int = tokens) -> Arguments:
            places = tokens, MODEL.experts_per_token
            row_of = jax.random.permutation(jax.random.key(1), math.prod(places)).astype(jnp.int32).reshape(places)
            rows, weights = inputs.normal(0, row_of.size, MODEL.hidden), jax.random.uniform(jax.random.key(2), places)
            return rows, row_of, weights, inputs.normal(3, tokens, MODEL.hidden), inputs.normal(4, MODEL.hidden)

        name, hidden = f"{tokens:,} tokens", 2.0 * MODEL.hidden
        # Read, and about as much is written.
        nbytes = 2.0 * sum(x.size * x.dtype.itemsize for x in shapes.values())
        yield BenchCase("finish_projections", name, finished, make_projected, nbytes=nbytes)
        routes = implementations("route", top_k=MODEL.experts_per_token, **eps)
        yield BenchCase("route", name, routes, make_route, nbytes=hidden * MODEL.experts)
        combines, rows = implementations("combine_experts", **eps), tokens * (MODEL.experts_per_token + 3)
        yield BenchCase("combine_experts", name, combines, make_combine, nbytes=hidden * rows)


def _vision_cases(frames: int, patches: int) -> Iterator[BenchCase]:
    def make() -> Arguments:
        shape = frames, patches, MODEL.vision_heads, MODEL.vision_dim
        return (*(inputs.normal(seed, *shape) for seed in range(3)), jnp.full(frames, patches, jnp.int32))

    yield BenchCase(
        "flash_attention",
        f"vision, {frames} frames of {patches:,} patches",
        implementations("flash_attention", scale=MODEL.vision_scale),
        make,
        flops=4.0 * frames * patches**2 * MODEL.vision_heads * MODEL.vision_dim,
    )


def cases(*, quick: bool) -> list[BenchCase]:
    """All measurements of single operations. `quick` takes small sizes, which any machine can run."""
    if quick:
        return [
            *_indexer_cases([4096], 64),
            *_selection_cases([(16, 8192)]),
            *_nucleus_cases([(1, 8192)]),
            *_prefill_cases([8192], 64),
            *_decode_cases([(1, 8192)]),
            *_expert_cases([1, 16]),
            *_quantized_expert_cases([1]),
            *_decode_layer_cases([1]),
            *_vision_cases(1, 256),
        ]
    return [
        *_indexer_cases([32_768, 131_072, 262_144], 2048),
        *_selection_cases([(1024, 131_072), (4096, 32_768), (64, 262_144), (1, 131_072)]),
        *_nucleus_cases([(rows, MODEL.vocab) for rows in [1, 8, 32, 64]]),
        *_prefill_cases([32_768, 131_072], 2048),
        *_decode_cases([(1, 131_072), (8, 131_072), (64, 131_072)]),
        *_expert_cases([1, 16, 64, 2048, 16_384]),
        *_quantized_expert_cases([1, 16, 64, 2048, 16_384]),
        *_decode_layer_cases([1, 4, 16, 64]),
        *_vision_cases(16, 1024),
    ]
