"""Memory of training grows as the length does: there is no array of queries times keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.model.context import PackedContext
from keye_jax.model.keye import Keye
from keye_jax.sharding import MeshRules, StepSharding
from keye_jax.train.forward import PackedBatch, TrainOptions, forward_losses
from tests.keye_jax.golden_models import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_to_compile")

BLOCK = 2**20
"""Bytes, as few queries of the longest sample take."""


def scratch_bytes(length: int, options: TrainOptions, row: int) -> int:
    """What the compiled losses and gradients of one sample take beside arguments and results."""
    config = dataclasses.replace(KeyeConfig.from_file(GOLDEN / "a"), num_hidden_layers=1, dtype="bfloat16")
    graph, state = nnx.split(Keye.abstract(config))
    step, rows = StepSharding.prefill(MeshRules.single_device()), length // row

    def shape(*dimensions: int) -> Any:
        return jax.ShapeDtypeStruct(dimensions, jnp.int32)

    context = jax.eval_shape(lambda: PackedContext.of([length], row))
    ids = shape(rows, row)
    batch = PackedBatch(ids, shape(3, rows, row), ids, context, (), ids)

    def loss(state: nnx.State, batch: PackedBatch) -> jax.Array:
        losses = forward_losses(nnx.merge(graph, state), batch, options, step)
        return losses.language / losses.targets + jnp.sum(losses.kl) / losses.tokens

    memory = jax.jit(jax.grad(loss)).lower(state, batch).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "rows"), [("sparse", 1), ("dense", 1), ("sparse", 4)])
def test_scratch_memory_is_linear(attention: Any, rows: int):
    """From 4K to 16K, as one row and as four. A single array of queries times keys would grow 16 times as large."""
    options = TrainOptions(attention, block_bytes=BLOCK)
    sizes = [scratch_bytes(length, options, length // rows) for length in (4096, 16384)]
    assert sizes[1] < 4.4 * sizes[0], sizes
