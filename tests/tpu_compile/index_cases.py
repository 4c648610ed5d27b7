"""Index scores and selection."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp

from pallas_kernels.indexer_scores import mosaic_tpu as scores_kernel
from pallas_kernels.select_topk import mosaic_tpu as select_kernel
from pallas_kernels.shapes import KEYE_VL_2 as MODEL
from pallas_kernels.shapes import PAGE_SIZE, float32, int32
from pallas_kernels.topk_attention.mosaic_tpu import unions as unions_kernel
from tests.tpu_compile.cases import CompileCase, Simulation

UNIT_QUERIES, UNIT_KEYS = 256, 16_384
"""Queries and keys of the unit of prefill that is simulated."""
UNIT_POSITIONS = 65_536
"""Positions of the unit of thresholds and lists that is simulated."""
PASSES = 10
"""Passes of a selection's search in the simulation; the real number depends on the scores."""


def _float8_scores(batch: int, queries: int, context: int) -> CompileCase:
    q, gates, keys, table, start = MODEL.indexer_arguments(batch, queries, context, jnp.float8_e4m3fn)

    def function(q, gates, keys, scales, table, start):
        return scores_kernel.indexer_scores(q, gates, keys, table, start, scale=MODEL.index_scale, key_scales=scales)

    shape = f"{batch} x {queries} queries, {context // 1024}K, float8"
    arguments = q, gates, keys, float32(*keys.shape[:2]), table, start
    return CompileCase("indexer_scores", shape, function, arguments, quick=True)


def _scores(batch: int, queries: int, context: int, *, quick: bool = False) -> CompileCase:
    function = functools.partial(scores_kernel.indexer_scores, scale=MODEL.index_scale)
    unit, keys = min(queries, UNIT_QUERIES), context if queries == 1 else UNIT_KEYS

    def simulated(*arguments):
        with mock.patch.object(scores_kernel, "_query_start", lambda *_: keys - unit):
            return function(*arguments)

    return CompileCase(
        "indexer_scores",
        f"{batch} x {queries} queries, {context // 1024}K",
        function,
        MODEL.indexer_arguments(batch, queries, context),
        flops=2 * batch * queries * context * MODEL.index_heads * MODEL.index_dim,
        nbytes=batch * context * (2 * MODEL.index_dim + 4 * queries),
        simulation=Simulation(
            simulated, MODEL.indexer_arguments(1, unit, keys), batch * queries // unit * (context // keys)
        ),
        quick=quick,
    )


def _passes(condition, body, state):
    """Passes of the search for a threshold (six values of state); no pass of the search for the last tie."""
    del condition
    return jax.lax.fori_loop(0, PASSES, lambda _, state: body(state), state) if len(state) == 6 else state


def _select(name: str, rows: int, context: int, *, quick: bool = False) -> CompileCase:
    function = functools.partial(getattr(select_kernel, name), k=MODEL.top_k)
    unit = 8

    def simulated(*arguments):
        with mock.patch.multiple(select_kernel, _longest=lambda _: context, _search=_passes):
            return function(*arguments)

    return CompileCase(
        name,
        f"{rows} x {context // 1024}K",
        function,
        (float32(rows, context), int32(rows)),
        nbytes=4 * rows * context,
        simulation=Simulation(simulated, (float32(unit, context), int32(unit)), -(-rows // unit)),
        quick=quick,
    )


def _unions(queries: int, context: int, *, quick: bool = False) -> CompileCase:
    """Thresholds and lists of blocks of 256 queries."""

    def function(scores, lengths, table):
        found = unions_kernel.select_unions(scores, lengths, table, MODEL.top_k, page_size=PAGE_SIZE)
        return found.words, found.rows, found.entries, found.dense

    def simulated(*arguments):
        with (
            mock.patch.multiple(select_kernel, _longest=lambda _: UNIT_POSITIONS, _search=_passes),
            mock.patch.object(unions_kernel, "_seen", lambda *_: UNIT_POSITIONS),
        ):
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
            simulated, arguments(UNIT_QUERIES, UNIT_POSITIONS), queries // UNIT_QUERIES * context // UNIT_POSITIONS
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
]
