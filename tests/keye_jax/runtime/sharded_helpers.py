"""What the tests of steps over several devices share: a prompt, and what one device gets from it."""

from __future__ import annotations

import functools

import numpy as np

from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding import MeshRules, ShardingConfig
from tests.keye_jax.golden_models import Trace, golden_model, random_ids, text, traced, traced_decode
from tests.near_ties import assert_leads, assert_tokens_follow, selection_leads, token_leads

TOKENS, GREEDY = 203, 4
ATOL = 5e-4
SEQUENCE: dict[str, str | list[str]] = {
    name: "x" for name in ("query_sequence", "cache_sequence", "experts", "vocab", "vision_patches")
}
"""Rules of one axis that splits every sequence."""

ONE_AXIS: dict[str, str | list[str]] = SEQUENCE | {"batch": "x"}
"""Rules of one axis that splits all that it can: whole sequences have their places along it."""

SEEDS = {"a": 2, "b": 117}
"""Of prompts whose choices are all `SCORE_LEAD` and `TOKEN_LEAD` ahead, in whole models and in two layers."""

SCORE_LEAD = 3e-4
"""Scores are up to some tens; devices, chunks and instruction sets changed the largest ones by 1e-4, most by 1e-5."""

TOKEN_LEAD = 2 * ATOL


@functools.cache
def expected(name: str, layers: int | None = None) -> tuple[Trace, list[int]]:
    """What one device computes of the prompt; its choices are safe."""
    model, config = golden_model(name, layers)
    trace, tokens = prefill_and_decode(Runtime(model, config), SEEDS[name])
    assert_safe(trace, config.sa_config.topk)
    return trace, tokens


def assert_safe(trace: Trace, top_k: int) -> None:
    """Fails where a choice of the prompt or of the answer is not ahead by more than the rounding."""
    assert_leads(selection_leads(trace.scores[..., : TOKENS + GREEDY], top_k), SCORE_LEAD)
    assert_leads(token_leads(trace.logits[TOKENS - 1 : -1]), TOKEN_LEAD)


def prefill_and_decode(runtime: Runtime, seed: int) -> tuple[Trace, list[int]]:
    """What is computed of the prompt of a seed and of a few steps of decode behind it, and the greedy tokens."""
    ids = random_ids(TOKENS, seed)
    pool, tables = runtime.new_cache(1, TOKENS + GREEDY)
    trace, pool = traced(runtime, text(ids, tables[0]), pool)
    traces, tokens = [trace], []
    for index in range(GREEDY):
        tokens.append(int(np.argmax(traces[-1].logits[-1])))
        trace, pool = traced_decode(runtime, np.asarray(tokens[-1:]), np.asarray([TOKENS + index]), tables, pool)
        traces.append(trace)
    return Trace.join(traces), tokens


def check(name: str, sharding: ShardingConfig, *, prefill_chunk: int | None = None, layers: int | None = None) -> None:
    """Holds the steps over a mesh to those of one device, of a whole model or of its first layers."""
    (model, config), (one, tokens) = golden_model(name, layers), expected(name, layers)
    rules = MeshRules.create(sharding, config)
    runtime = Runtime(model, config, rules=rules, prefill_chunk=prefill_chunk)
    assert_same(prefill_and_decode(runtime, SEEDS[name]), (one, tokens))


def assert_same(got: tuple[Trace, list[int]], expected: tuple[Trace, list[int]]) -> None:
    """Holds what `prefill_and_decode` gave to what it should give."""
    (trace, tokens), (one, wanted) = got, expected
    np.testing.assert_allclose(trace.logits, one.logits, atol=ATOL)
    np.testing.assert_array_equal(trace.selected, one.selected)
    assert tokens == wanted
    assert_tokens_follow(tokens, one.logits[TOKENS - 1 : -1], ATOL)
