"""Index scores and selection."""

import functools
from unittest import mock

import jax

from pallas_kernels.indexer_scores import mosaic_tpu as scores_kernel
from pallas_kernels.select_topk import mosaic_tpu as select_kernel
from tests.tpu_compile.cases import PAGE, TOP_K, Case, Simulation, floats, integers, spec

HEADS, DIM = 16, 64
BLOCK, UNIT_KEYS = 256, 16_384
"""Queries, and keys, of what is simulated of a prefill."""
PASSES = 10
"""Of a selection's search, as the simulation has it; how many there are depends on the scores."""


def _scores(batch: int, queries: int, context: int, *, quick: bool = False) -> Case:
    def arguments(batch, queries, context):
        return (
            spec(batch, queries, HEADS, DIM),
            floats(batch, queries, HEADS),
            spec(batch * context // PAGE, PAGE, DIM),
            integers(batch, context // PAGE),
            integers(batch),
        )

    function = functools.partial(scores_kernel.indexer_scores, scale=DIM**-0.5)
    unit, keys = min(queries, BLOCK), context if queries == 1 else UNIT_KEYS

    def simulated(*arguments):
        with mock.patch.object(scores_kernel, "_query_start", lambda *_: keys - unit):
            return function(*arguments)

    return Case(
        "indexer_scores",
        f"{batch} x {queries} queries, {context // 1024}K",
        function,
        arguments(batch, queries, context),
        flops=2 * batch * queries * context * HEADS * DIM,
        nbytes=batch * context * (2 * DIM + 4 * queries),
        simulation=Simulation(simulated, arguments(1, unit, keys), batch * queries // unit * (context // keys)),
        quick=quick,
    )


def _select(name: str, rows: int, context: int, *, quick: bool = False) -> Case:
    function = functools.partial(getattr(select_kernel, name), k=TOP_K)
    unit = 8

    def passes(condition, body, state):
        """The search for a threshold; none for the last tie."""
        del condition
        return jax.lax.fori_loop(0, PASSES, lambda _, state: body(state), state) if len(state) == 6 else state

    def simulated(*arguments):
        with mock.patch.multiple(select_kernel, _longest=lambda _: context, _search=passes):
            return function(*arguments)

    return Case(
        name,
        f"{rows} x {context // 1024}K",
        function,
        (floats(rows, context), integers(rows)),
        nbytes=4 * rows * context,
        simulation=Simulation(simulated, (floats(unit, context), integers(unit)), -(-rows // unit)),
        quick=quick,
    )


CASES = [
    _scores(1, 2048, 131_072, quick=True),
    _scores(1, 2048, 262_144),
    _scores(1, 1, 131_072),
    _scores(8, 1, 131_072),
    _scores(64, 1, 131_072),
    _scores(64, 1, 262_144),
    _select("select_threshold", 2048, 131_072, quick=True),
    _select("select_threshold", 2048, 262_144),
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
