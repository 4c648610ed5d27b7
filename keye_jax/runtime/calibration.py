"""Collects what the experts' matrices are multiplied with while a model reads prompts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.kv_cache import BatchMetadata, PagePool
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.context import paged_contexts
from keye_jax.model.moe import MoE
from keye_jax.quantization.calibration import MatrixInputs
from keye_jax.runtime.prefill import Segment
from keye_jax.runtime.programs import ModelDef, Params
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding.step import StepSharding
from pallas_kernels.dispatch import resolve
from pallas_kernels.grouped_matmul import grouped_matmul, sort_rows, take_rows

type Progress = Callable[[int], None]

SAMPLES = 8
"""Rows that are kept of each expert."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Seen:
    """Of the e matrices of a layer: rows, sums of their squares, and the first rows."""

    count: jax.Array  # int32 [e]
    squares: jax.Array  # float32 [e, in]
    samples: jax.Array  # [e, SAMPLES, in]

    @classmethod
    def nothing(cls, experts: int, inputs: int, dtype: jnp.dtype) -> _Seen:
        squares = jnp.zeros((experts, inputs), jnp.float32)
        return cls(jnp.zeros(experts, jnp.int32), squares, jnp.zeros((experts, SAMPLES, inputs), dtype))

    def with_rows(self, rows: jax.Array, sizes: jax.Array) -> _Seen:
        """With rows `[n, in]`, sorted by matrix."""
        at, ends = jnp.arange(len(rows)), jnp.cumsum(sizes)
        owner = jnp.searchsorted(ends, at, side="right")  # e behind the last one
        is_of = owner == jnp.arange(len(sizes))[:, None]
        squares = jnp.dot(is_of.astype(jnp.float32), jnp.square(rows.astype(jnp.float32)), precision="highest")
        place = self.count[owner] + at - (ends - sizes)[owner]
        samples = self.samples.at[owner, place].set(rows, mode="drop")
        return _Seen(self.count + sizes, self.squares + squares, samples)

    def inputs(self) -> MatrixInputs:
        count, squares = np.asarray(self.count), np.asarray(self.squares)
        of_all = squares.sum(axis=0) / max(1, count.sum())
        means = np.where(count[:, None] > 0, squares / np.maximum(1, count)[:, None], of_all)
        return MatrixInputs(count, means.astype(np.float32), np.asarray(self.samples, np.float32))


class Prompt(NamedTuple):
    """A prompt, as in `Segment`."""

    input_ids: np.ndarray
    positions: np.ndarray
    vision_embeds: jax.Array | None


def expert_inputs(
    runtime: Runtime, prompts: Iterable[Prompt], *, longest: int, progress: Progress
) -> list[tuple[MatrixInputs, MatrixInputs]]:
    """What the matrices gate_up and down of each layer are multiplied with while prompts are read.

    Memory: the cache of the longest prompt, and for each layer 10 rows of both matrices' inputs an expert.

    Args:
      runtime: of a model on one device, whose weights have all bits.
      longest: tokens of the longest prompt; another one that is longer takes the time to compile.
      progress: called after each chunk with its tokens.
    """
    config, dtype = runtime.config, runtime.dtype
    sizes = config.num_experts, config.hidden_size, config.moe_intermediate_size
    seen = tuple(
        (_Seen.nothing(sizes[0], sizes[1], dtype), _Seen.nothing(sizes[0], sizes[2], dtype))
        for _ in range(config.num_hidden_layers)
    )
    pool, tables = runtime.new_cache(1, longest)
    for prompt in prompts:
        if runtime.table_width(len(prompt.input_ids)) > tables.shape[1]:
            pool, tables = runtime.new_cache(1, len(prompt.input_ids))
        segment = Segment(prompt.input_ids, prompt.positions, tables[0], prompt.vision_embeds)
        for planned, x, positions, batch, _ in runtime.chunks([segment], pool):
            # With selections layers also return what their experts are given.
            options = dataclasses.replace(runtime.chunk_options(dense=planned.dense), selections=True)
            pool, seen = _read_chunk(
                runtime.model_def,
                runtime.params,
                x,
                positions,
                batch,
                pool,
                seen,
                step=runtime.prefill_step,
                options=options,
            )
            jax.block_until_ready(seen)
            progress(int(planned.batch.count.sum()))
    return [(gate_up.inputs(), down.inputs()) for gate_up, down in seen]


@functools.partial(jax.jit, static_argnames=("model", "step", "options"), donate_argnames=("pool", "seen"))
def _read_chunk(
    model: ModelDef,
    params: Params,
    x: jax.Array,
    positions: jax.Array,
    batch: BatchMetadata,
    pool: PagePool,
    seen: tuple[tuple[_Seen, _Seen], ...],
    *,
    step: StepSharding,
    options: AttentionOptions,
) -> tuple[PagePool, tuple[tuple[_Seen, _Seen], ...]]:
    decoder, valid = model.merge(params).decoder, batch.valid(x.shape[1])
    _, contexts, found = decoder(x, positions, paged_contexts(pool, batch), options, step)
    after = []
    for layer, inputs, (gate_up, down) in zip(decoder.layers, found, seen, strict=True):
        after.append(_with_layer(layer.moe, inputs.moe_input, inputs.experts, valid, gate_up, down, options))
    return PagePool(tuple(context.pages for context in contexts)), tuple(after)


def _with_layer(
    moe: MoE,
    x: jax.Array,
    experts: jax.Array,
    valid: jax.Array,
    gate_up: _Seen,
    down: _Seen,
    options: AttentionOptions,
) -> tuple[_Seen, _Seen]:
    """With the tokens `[b, t, embed]` of a layer."""
    k = experts.shape[-1]
    flat = jnp.where(valid[..., None], experts, moe.num_experts).reshape(-1)
    order, _ = sort_rows(flat)
    sizes = jnp.sum(flat == jnp.arange(moe.num_experts)[:, None], axis=-1, dtype=jnp.int32)
    rows = take_rows(x.reshape(-1, x.shape[-1]), order // k)
    implementation = resolve("grouped_matmul", options.implementation)
    hidden = grouped_matmul(rows, moe.gate_up_proj[...], sizes, implementation=implementation).astype(jnp.float32)
    gate, up = jnp.split(hidden, 2, axis=-1)
    inner = (jax.nn.silu(gate) * up).astype(x.dtype)
    return gate_up.with_rows(rows, sizes), down.with_rows(inner, sizes)
