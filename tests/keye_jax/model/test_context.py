"""Packed samples without a pool give what each gives from its pages, and never see each other."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.kv_cache import PAGE_SIZE
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.context import PackedContext
from keye_jax.model.keye import Keye
from keye_jax.model.params import shard_params
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding import MeshRules, StepSharding
from tests.keye_jax.golden_models import Trace, golden_model, random_ids, rules_of, text, traced
from tests.near_ties import assert_leads, selection_leads

LENGTHS = (130, 40, 200)
SEEDS = (2, 51, 46)
"""Of texts whose selections are all `LEAD` ahead."""
LEAD = 4e-4
ATOL = 5e-4

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@functools.cache
def alone() -> tuple[Trace, ...]:
    """What each sample gives by itself from the pages of a pool."""
    model, config = golden_model("a", 2)
    runtime, found = Runtime(model, config), []
    for length, seed in zip(LENGTHS, SEEDS, strict=True):
        pool, tables = runtime.new_cache(1, length)
        trace, _ = traced(runtime, text(random_ids(length, seed), tables[0]), pool)
        assert_leads(selection_leads(trace.scores, config.sa_config.topk), LEAD)
        found.append(trace)
    return tuple(found)


@functools.partial(jax.jit, static_argnames="step")
def forward(model: Keye, ids: jax.Array, positions: jax.Array, context: PackedContext, step: StepSharding) -> Any:
    decoder = model.decoder
    contexts = (context,) * len(decoder.layers)
    options = AttentionOptions(intermediates=True)
    hidden, _, found = decoder(decoder.embed_tokens(ids, step), positions, contexts, options, step)
    return decoder.logits(hidden, step), [layer.hidden for layer in found], [x.attention.selected for x in found]


@pytest.mark.parametrize("tokens", [PAGE_SIZE, 4 * PAGE_SIZE])
@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        (None, {}),
        ({"x": 8}, {"query_sequence": "x", "experts": "x", "vocab": "x"}),
        ({"x": 4, "y": 2}, {"query_sequence": "x", "heads": "y", "kv_heads": "y", "expert_hidden": "y"}),
    ],
    ids=["one device", "queries over eight", "queries and heads"],
)
def test_packed_samples_are_as_each_alone(mesh: dict[str, int] | None, rules: dict[str, Any], tokens: int):
    """Samples of several rows and of one, whose last rows are not full."""
    model, config = golden_model("a", 2)
    over = MeshRules.single_device() if mesh is None else rules_of(config, mesh, rules)
    step = StepSharding.prefill(over)
    context = PackedContext.of(LENGTHS, tokens)
    rows = len(context.batch.start)
    ids, positions, begins = np.zeros((rows, tokens), np.int32), np.zeros((3, rows, tokens), np.int32), []
    row = 0
    for length, seed in zip(LENGTHS, SEEDS, strict=True):
        begins.append(row * tokens)
        ids.reshape(-1)[begins[-1] : begins[-1] + length] = random_ids(length, seed)
        positions.reshape(3, -1)[:, begins[-1] : begins[-1] + length] = np.arange(length)
        row += -(-length // tokens)
    assert row == rows
    # Idle rows, so that devices share the rows evenly.
    idle = -rows % step.size(step.rows)
    ids, positions = np.pad(ids, ((0, idle), (0, 0))), np.pad(positions, ((0, 0), (0, idle), (0, 0)))
    context = PackedContext(jax.tree.map(jnp.asarray, _with_idle_rows(context, idle)))
    logits, hidden, selected = forward(
        shard_params(model, over), jnp.asarray(ids), jnp.asarray(positions), context, step
    )
    for sample, (length, begin) in enumerate(zip(LENGTHS, begins, strict=True)):
        expected, where = alone()[sample], slice(begin, begin + length)

        def own(x: jax.Array, where: slice = where) -> np.ndarray:
            return np.asarray(x.reshape(-1, x.shape[-1]))[where]

        np.testing.assert_allclose(own(logits), expected.logits, atol=ATOL)
        for layer in range(config.num_hidden_layers):
            np.testing.assert_allclose(own(hidden[layer]), expected.hidden[layer], atol=ATOL)
            np.testing.assert_array_equal(own(selected[layer]), expected.selected[layer])


def _with_idle_rows(context: PackedContext, idle: int) -> Any:
    """The context's metadata with rows behind that hold nothing."""
    batch = context.batch
    assert batch.sequence is not None
    start, count, sequence = (jnp.pad(x, (0, idle)) for x in (batch.start, batch.count, batch.sequence))
    return dataclasses.replace(batch, start=start, count=count, sequence=sequence)


def test_where_samples_lie():
    batch = PackedContext.of((130, 40), 64).batch
    assert np.asarray(batch.start).tolist() == [0, 64, 128, 0]
    assert np.asarray(batch.count).tolist() == [64, 64, 2, 40]
    assert batch.sequence is not None and np.asarray(batch.sequence).tolist() == [0, 0, 0, 1]
    assert np.asarray(batch.page_table).tolist() == [[0, 1, 2], [3, 3, 3]]
