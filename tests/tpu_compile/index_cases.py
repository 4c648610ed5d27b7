"""Index scores and selection."""

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from pallas_kernels.indexer_scores import mosaic_tpu as scores_kernel
from pallas_kernels.indexer_scores.mosaic_tpu import decode as decode_kernel
from pallas_kernels.select_topk import mosaic_tpu as select_kernel
from pallas_kernels.select_topk import sparse_core
from pallas_kernels.shapes import KEYE_VL_2 as MODEL
from pallas_kernels.shapes import PAGE_SIZE, float32, int32, spec
from pallas_kernels.topk_attention.mosaic_tpu import unions as unions_kernel
from tests.tpu_compile.cases import CompileCase, Simulation

UNIT_QUERIES, UNIT_KEYS = 256, 32_768
"""Queries and keys of the unit of prefill that is simulated."""
UNIT_POSITIONS = 32_768
"""Positions of the unit of thresholds and lists that is simulated."""
PASSES, SAMPLE_PASSES = 11, 7
"""Passes of a selection's search in the simulation, over all scores and over the sample.

The real numbers depend on the scores. A model of the search in NumPy took 8 to 16 and 5 to 8 for scores of clustered
keys at 128K."""


def _score_arguments(batch: int, queries: int, context: int, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    """The arguments of `_score`: index keys lie in rows of 128, as in the runtime's pool."""
    q, gates, keys, table, start = MODEL.indexer_arguments(batch, queries, context, dtype)
    rows = spec(keys.shape[0], PAGE_SIZE * MODEL.index_dim // 128, 128, dtype=dtype)
    return q, gates, rows, table, start


def _score(q, gates, rows, table, start, key_scales=None):
    keys = rows.reshape(-1, PAGE_SIZE, MODEL.index_dim)
    return scores_kernel.indexer_scores(q, gates, keys, table, start, scale=MODEL.index_scale, key_scales=key_scales)


def _float8_scores(batch: int, queries: int, context: int) -> CompileCase:
    arguments = _score_arguments(batch, queries, context, jnp.float8_e4m3fn)
    scales = float32(batch * context // PAGE_SIZE, PAGE_SIZE)
    shape = f"{batch} x {queries} queries, {context // 1024}K, float8"
    return CompileCase("indexer_scores", shape, _score, (*arguments, scales), quick=True)


def _scores(batch: int, queries: int, context: int, *, quick: bool = False) -> CompileCase:
    unit, keys = min(queries, UNIT_QUERIES), context if queries == 1 else UNIT_KEYS

    def simulated(*arguments):
        prefill = mock.patch.object(scores_kernel, "_query_start", lambda *_: keys - unit)
        with prefill, mock.patch.object(decode_kernel, "_seen_tiles", lambda _, tiles: tiles):
            return _score(*arguments)

    return CompileCase(
        "indexer_scores",
        f"{batch} x {queries} queries, {context // 1024}K",
        _score,
        _score_arguments(batch, queries, context),
        flops=2 * batch * queries * context * MODEL.index_heads * MODEL.index_dim,
        nbytes=batch * context * (2 * MODEL.index_dim + 4 * queries),
        simulation=Simulation(
            simulated,
            _score_arguments(1, unit, keys),
            batch * queries // unit * (context // keys),
            name=f"scores, {unit} x {keys}",
        ),
        quick=quick,
    )


def _repeated(passes: int):
    """A loop of so many passes, written out: the simulation counts few turns of a loop that holds loops."""

    def loop(_condition, body, state):
        for _ in range(passes):
            state = body(state)
        return state

    return loop


def _fixed_search(positions: int):
    """Replaces what depends on scores and lengths: rows of so many positions, without ties at the threshold."""
    return mock.patch.multiple(
        select_kernel,
        _longest=lambda _: positions,
        _shortest=lambda _: positions,
        _sample_search=_repeated(SAMPLE_PASSES),
        _search=_repeated(PASSES),
        _position_search=_repeated(0),
    )


def _select(name: str, rows: int, context: int, *, quick: bool = False) -> CompileCase:
    function = functools.partial(getattr(select_kernel, name), k=MODEL.top_k)
    unit = 8

    def simulated(*arguments):
        with _fixed_search(context):
            return function(*arguments)

    return CompileCase(
        name,
        f"{rows} x {context // 1024}K",
        function,
        (float32(rows, context), int32(rows)),
        nbytes=4 * rows * context,
        simulation=Simulation(
            simulated, (float32(unit, context), int32(unit)), -(-rows // unit), name=f"{name}, {context}"
        ),
        quick=quick,
    )


def _on_sparse_cores(rows: int, context: int, *, quick: bool = False) -> CompileCase:
    """A program for SparseCores, of which the compiler estimates nothing. Scratch shows that it copies no scores."""
    return CompileCase(
        "select_topk_sparse_core",
        f"{rows} x {context // 1024}K",
        functools.partial(sparse_core.select_topk, k=MODEL.top_k),
        (float32(rows, context), int32(rows)),
        nbytes=4 * rows * (context + MODEL.top_k),
        quick=quick,
        scratch=10**7,
        generations=("v5p", "v6e", "tpu7x"),
    )


def _in_a_loop() -> CompileCase:
    """What `jax.vmap` makes of a kernel, which stacks the results of its turns."""

    def function(scores, lengths):
        return jax.lax.map(lambda arrays: sparse_core.select_topk(*arrays, k=MODEL.top_k), (scores, lengths))

    arguments = float32(2, 8, 131_072), int32(2, 8)
    return dataclasses.replace(
        _on_sparse_cores(8, 131_072), shape="8 x 128K, in a loop", function=function, arguments=arguments, quick=True
    )


def _unions(queries: int, context: int, *, quick: bool = False) -> CompileCase:
    """Thresholds and lists of blocks of 256 queries."""

    def function(scores, lengths, table):
        found = unions_kernel.select_unions(scores, lengths, table, MODEL.top_k, page_size=PAGE_SIZE)
        return found.words, found.rows, found.entries, found.dense

    def simulated(*arguments):
        with _fixed_search(UNIT_POSITIONS), mock.patch.object(unions_kernel, "_seen", lambda *_: UNIT_POSITIONS):
            return function(*arguments)

    def arguments(queries: int, context: int):
        return float32(1, queries, context), int32(1, queries), MODEL.page_table(1, context)

    return CompileCase(
        "select_unions",
        f"{queries} queries, {context // 1024}K",
        function,
        arguments(queries, context),
        nbytes=4 * queries * context,
        simulation=Simulation(
            simulated,
            arguments(UNIT_QUERIES, UNIT_POSITIONS),
            queries // UNIT_QUERIES * context // UNIT_POSITIONS,
            name="thresholds and lists",
        ),
        quick=quick,
    )


CASES = [
    _scores(1, 2048, 32_768),
    _scores(1, 2048, 131_072, quick=True),
    _scores(1, 2048, 262_144),
    _scores(1, 1, 131_072),
    _scores(8, 1, 131_072),
    _scores(64, 1, 131_072),
    _scores(64, 1, 262_144),
    _float8_scores(1, 2048, 131_072),
    _float8_scores(8, 1, 131_072),
    _unions(2048, 131_072, quick=True),
    _unions(2048, 262_144),
    _unions(2048, 32_768),
    _select("select_threshold", 1, 131_072),
    _select("select_threshold", 8, 131_072),
    _select("select_threshold", 64, 131_072),
    _select("select_threshold", 64, 262_144),
    _select("select_topk", 1, 131_072),
    _select("select_topk", 8, 131_072),
    _select("select_topk", 64, 131_072),
    _select("select_topk", 64, 262_144),
    _select("select_topk", 2048, 131_072),
    _on_sparse_cores(1, 131_072),
    _on_sparse_cores(8, 131_072),
    _on_sparse_cores(64, 131_072, quick=True),
    _on_sparse_cores(64, 262_144),
    _on_sparse_cores(2048, 131_072),
    _in_a_loop(),
]
