"""Attention of one layer over a whole prompt: scores, selection and sparse attention, against dense attention."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from pallas_kernels.bench import inputs
from pallas_kernels.bench.cases import (
    KINDS,
    BenchCase,
    dense_attention,
    dense_baseline,
    mean_union,
    sequence,
    size_name,
    sparse_candidates,
)
from pallas_kernels.bench.timing import Arguments
from pallas_kernels.indexer_scores import indexer_scores
from pallas_kernels.shapes import KEYE_VL_2 as MODEL

CHUNK = 2048
"""Queries of one chunk of prefill."""

_SAMPLES = 5
"""Most chunks of one layer that are timed."""

_CALLS = 4
"""Calls in one program, the same number for every chunk, so that one program serves all chunks."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Measurements that together give the time of one layer's attention.

    Attributes:
      tokens: tokens of the prompt.
      kind: kind of selections, a key of `KINDS`.
      chunk: queries of one chunk.
      sampled: numbers of the chunks that are timed.
      chunks: the cases of these chunks, in the same order.
      dense: the case of dense attention of all tokens.
    """

    tokens: int
    kind: str
    chunk: int
    sampled: tuple[int, ...]
    chunks: tuple[BenchCase, ...]
    dense: BenchCase


def layers(*, quick: bool) -> list[Layer]:
    """All measurements of layers. `quick` takes one small size, which any machine can run."""
    if quick:
        return [_layer(4096, "clustered", 64)]
    clustered = [_layer(tokens * 1024, "clustered", CHUNK) for tokens in (8, 16, 32, 64, 128)]
    return clustered + [_layer(tokens * 1024, "uniform", CHUNK) for tokens in (32, 128)]


def summary(layer: Layer, chunk_rows: list[list[dict]], dense_rows: list[dict]) -> dict[str, Any]:
    """The seconds of a whole layer, from the rows that `measure` returned for its cases.

    The time of a chunk is nearly linear in its position, so chunks between two timed ones are interpolated.

    Args:
      layer: the layer.
      chunk_rows: the rows of each case of `layer.chunks`.
      dense_rows: the row of `layer.dense`.

    Returns:
      The entry of the JSON file: sizes, samples, seconds, and the ratio of sparse to dense where both were measured.
    """
    count = layer.tokens // layer.chunk
    result: dict[str, Any] = {"tokens": layer.tokens, "selections": layer.kind, "chunk": layer.chunk, "samples": []}
    for number, rows in zip(layer.sampled, chunk_rows, strict=True):
        times = {row["candidate"]: row.get("seconds") for row in rows}
        result["samples"].append({"start": number * layer.chunk, "union": rows[0].get("union"), "seconds": times})
    for name in ("dsa", "scores"):
        seconds = [sample["seconds"].get(name) for sample in result["samples"]]
        if None not in seconds:
            whole = np.interp(np.arange(count), layer.sampled, seconds).sum()
            result[f"{name}_seconds"] = float(whole)
    [dense] = dense_rows
    result["dense"] = dense["candidate"]
    if "seconds" in dense:
        result["dense_seconds"] = dense["seconds"]
        if "dsa_seconds" in result:
            result["ratio"] = result["dsa_seconds"] / dense["seconds"]
    return result


@functools.cache
def _layer(tokens: int, kind: str, chunk: int) -> Layer:
    count = tokens // chunk
    sampled = tuple(int(x) for x in np.unique(np.linspace(0, count - 1, _SAMPLES).round()))
    best, run = next(iter(sparse_candidates().items()))
    candidates = {"dsa": run, "scores": functools.partial(_scores, implementation=best)}
    chunks = []
    for number in sampled:
        start = number * chunk
        seen = chunk * (start + chunk / 2)
        attended = chunk * min(MODEL.top_k, start + chunk / 2)
        chunks.append(
            BenchCase(
                "DSA attention",
                f"{size_name(tokens)} tokens, {kind}, queries from {size_name(start)}",
                candidates if kind == "clustered" else {"dsa": run},
                sequence(chunk, tokens),
                (start, KINDS[kind]),
                flops=2 * seen * MODEL.index_heads * MODEL.index_dim + 4 * attended * MODEL.heads * MODEL.head_dim,
                union=mean_union,
                calls=_CALLS,
            )
        )
    return Layer(tokens, kind, chunk, sampled, tuple(chunks), _dense(tokens))


@functools.cache
def _dense(tokens: int) -> BenchCase:
    def make() -> Arguments:
        q = inputs.normal(0, 1, tokens, MODEL.heads, MODEL.head_dim)
        return (
            q,
            inputs.normal(1, 1, tokens, MODEL.kv_heads, MODEL.head_dim),
            inputs.normal(2, 1, tokens, MODEL.kv_heads, MODEL.head_dim),
        )

    return BenchCase(
        "dense attention",
        f"{size_name(tokens)} tokens, causal",
        {dense_baseline(): _dense_causal},
        make,
        flops=2.0 * tokens**2 * MODEL.heads * MODEL.head_dim,
    )


def _dense_causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return dense_attention(q, k, v, causal=True)


def _scores(
    q: Any, kv: Any, table: Any, start: Any, index_q: Any, gates: Any, keys: Any, *, implementation: str
) -> jax.Array:
    return indexer_scores(
        index_q, gates, keys, table, start, scale=MODEL.index_scale, fill=False, implementation=implementation
    )
