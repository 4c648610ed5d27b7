"""What is measured: operations at the released model's sizes, on random inputs, beside their baselines.

The released model: 32 query heads on 4 key/value heads of 128, an indexer of 16 heads of 64, top_k 2048, 128 experts of
2048 x 768, 8 a token; bfloat16 in, float32 accumulation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import available
from pallas_kernels.grouped_matmul import expert_mlp
from pallas_kernels.indexer_scores import indexer_scores
from pallas_kernels.select_topk import select_topk
from pallas_kernels.sparse_attention import sparse_attention

PAGE_SIZE = 64
TOP_K = 2048
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
INDEX_HEADS, INDEX_DIM = 16, 64
EXPERTS, EXPERTS_PER_TOKEN, HIDDEN, EXPERT_HIDDEN = 128, 8, 2048, 768
NEIGHBOURS, POOL = 16, 8192
"""Clustered selections: 16 neighbouring queries choose from a pool of 8K keys, as in the released model at 128K."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
      operation: its name.
      size: what is distinctive about it.
      candidates: functions by name, implementations and baselines, all of the same arguments.
      arguments: makes them, on the device.
      flops, nbytes: useful work and memory traffic of one call; what is None is not what limits the operation.
    """

    operation: str
    size: str
    candidates: dict[str, Callable[..., Any]]
    arguments: Callable[[], tuple[Any, ...]]
    flops: float | None = None
    nbytes: float | None = None


def _implementations(function: Callable[..., Any], **kwargs: Any) -> dict[str, Callable[..., Any]]:
    return {name: functools.partial(function, implementation=name, **kwargs) for name in available()}


def _normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _table(batch: int, context: int) -> jax.Array:
    pages = batch * context // PAGE_SIZE
    return jax.random.permutation(jax.random.key(9), pages).astype(jnp.int32).reshape(batch, -1)


def _indexer_cases(contexts: list[int], queries: int) -> Iterator[Case]:
    for context in contexts:

        def arguments(context: int = context) -> tuple[Any, ...]:
            keys = _normal(2, context // PAGE_SIZE, PAGE_SIZE, INDEX_DIM)
            start = jnp.asarray([context - queries], jnp.int32)
            q, gates = _normal(0, 1, queries, INDEX_HEADS, INDEX_DIM), _normal(1, 1, queries, INDEX_HEADS)
            return q, gates.astype(jnp.float32), keys, _table(1, context), start

        seen = queries * (context - queries / 2)
        yield Case(
            "indexer_scores",
            f"{queries} queries x {context // 1024}K keys",
            _implementations(indexer_scores, scale=INDEX_DIM**-0.5),
            arguments,
            flops=2 * seen * INDEX_HEADS * INDEX_DIM,
        )


def _topk_cases(sizes: list[tuple[int, int]]) -> Iterator[Case]:
    for (rows, context), kind in itertools.product(sizes, ("random", "clustered")):

        def arguments(rows: int = rows, context: int = context, kind: str = kind) -> tuple[Any, ...]:
            scores = _normal(0, rows, context, dtype=jnp.float32)
            if kind == "clustered":
                # Values that share their leading bits, so that thousands stand next to the threshold.
                scores = 1 + jnp.round(scores * 1000) * 2.0**-20
            return scores, jnp.full(rows, context, jnp.int32)

        yield Case(
            "select_topk",
            f"{rows} x {context // 1024}K {kind}",
            _implementations(select_topk, k=TOP_K)
            | {"lax.top_k": lambda scores, lengths: jax.lax.top_k(scores, TOP_K)[1]},
            arguments,
            nbytes=4 * rows * context,
        )


def selections(queries: int, context: int, *, clustered: bool, seed: int = 0) -> np.ndarray:
    """Positions int32 `[1, queries, TOP_K]`, ascending: of a pool of each 16 neighbours, or of the whole context."""
    rng = np.random.default_rng(seed)
    rows = np.empty((queries, TOP_K), np.int32)
    for first in range(0, queries, NEIGHBOURS):
        pool = np.sort(rng.choice(context, POOL, replace=False)) if clustered else np.arange(context)
        for query in range(first, min(first + NEIGHBOURS, queries)):
            rows[query] = np.sort(pool[rng.choice(len(pool), TOP_K, replace=False)])
    return rows[None]


def _attention_cases(contexts: list[int], queries: int) -> Iterator[Case]:
    for context, clustered in itertools.product(contexts, (True, False)):

        def arguments(context: int = context, clustered: bool = clustered) -> tuple[Any, ...]:
            kv = _normal(1, context // PAGE_SIZE, PAGE_SIZE, 2 * KV_HEADS, HEAD_DIM)
            indices = jnp.asarray(selections(queries, context, clustered=clustered))
            return _normal(0, 1, queries, HEADS, HEAD_DIM), kv, indices, _table(1, context)

        yield Case(
            "sparse_attention",
            f"{queries} queries, {context // 1024}K keys, {'clustered' if clustered else 'uniform'}",
            _implementations(sparse_attention, scale=HEAD_DIM**-0.5),
            arguments,
            flops=4 * queries * TOP_K * HEADS * HEAD_DIM,
        )


def _decode_cases(batches: list[int], context: int) -> Iterator[Case]:
    for batch in batches:

        def arguments(batch: int = batch) -> tuple[Any, ...]:
            kv = _normal(1, batch * context // PAGE_SIZE, PAGE_SIZE, 2 * KV_HEADS, HEAD_DIM)
            indices = np.concatenate([selections(1, context, clustered=False, seed=i) for i in range(batch)])
            return _normal(0, batch, 1, HEADS, HEAD_DIM), kv, jnp.asarray(indices), _table(batch, context)

        yield Case(
            "sparse_attention",
            f"decode, batch {batch}, {context // 1024}K keys",
            _implementations(sparse_attention, scale=HEAD_DIM**-0.5),
            arguments,
            nbytes=batch * TOP_K * 2 * KV_HEADS * HEAD_DIM * 2,
        )


def _expert_cases(token_counts: list[int]) -> Iterator[Case]:
    for tokens in token_counts:
        rng = np.random.default_rng(tokens)
        chosen = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :EXPERTS_PER_TOKEN]
        sizes = np.bincount(chosen.ravel(), minlength=EXPERTS)

        def arguments(tokens: int = tokens, sizes: np.ndarray = sizes) -> tuple[Any, ...]:
            rows = _normal(0, tokens * EXPERTS_PER_TOKEN, HIDDEN)
            gate_up = _normal(1, EXPERTS, HIDDEN, 2 * EXPERT_HIDDEN)
            return rows, gate_up, _normal(2, EXPERTS, EXPERT_HIDDEN, HIDDEN), jnp.asarray(sizes, jnp.int32)

        work = 6 * tokens * EXPERTS_PER_TOKEN * HIDDEN * EXPERT_HIDDEN
        read = int(np.count_nonzero(sizes)) * 3 * HIDDEN * EXPERT_HIDDEN * 2
        few = tokens <= 64
        yield Case(
            "expert_mlp",
            f"{tokens:,} tokens",
            _implementations(expert_mlp),
            arguments,
            flops=None if few else work,
            nbytes=read if few else None,
        )


def cases(*, quick: bool) -> list[Case]:
    """All measurements; `quick` leaves sizes that any machine can run."""
    if quick:
        return [
            *_indexer_cases([4096], 64),
            *_topk_cases([(16, 8192)]),
            *_attention_cases([8192], 16),
            *_decode_cases([1], 8192),
            *_expert_cases([1, 16]),
        ]
    return [
        *_indexer_cases([32_768, 131_072], 2048),
        *_topk_cases([(1024, 131_072), (4096, 32_768), (64, 262_144), (1, 131_072)]),
        *_attention_cases([32_768, 131_072], 1024),
        *_decode_cases([1, 8, 64], 131_072),
        *_expert_cases([1, 16, 64, 2048, 16_384]),
    ]
