"""What is compiled: the steps of a model as functions of its parameters, inputs and pages.

Each function's static arguments (`model`, `step`, `options`) and the shapes of its arrays decide its program. Pages and
the state of decode are donated: what goes in may not be used afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from keye_jax.kv_cache import BatchMetadata, PagePool
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.context import PagedContext, paged_contexts
from keye_jax.model.decoder import LayerIntermediates
from keye_jax.model.embedding import take_tokens
from keye_jax.model.keye import Keye
from keye_jax.model.projector import Projector
from keye_jax.model.vision import VisionEncoder
from keye_jax.runtime.decode import DecodeState, WideValues, narrow, unpack_row, wide_values, widen
from keye_jax.runtime.prefill import unpack_others
from keye_jax.runtime.sampling import SamplingState, TokenScores, counted, sample, token_scores
from keye_jax.sharding.step import StepSharding, spec
from pallas_kernels.dispatch import resolve

type Params = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ModelDef:
    """A model without its parameters.

    It is equal to itself alone, and the parameters are a flat tuple: a step of decode looks its program up in
    microseconds, where comparing and flattening the modules would take longer than the device does.
    """

    graph: nnx.GraphDef[Keye]
    tree: Any

    def merge(self, params: Params) -> Keye:
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, params))


model_def = functools.cache(ModelDef)


@functools.partial(jax.jit, static_argnames=("model", "step", "implementation", "project"))
def encode(
    model: ModelDef,
    params: Params,
    pixels: jax.Array,
    sizes: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    *,
    step: StepSharding,
    implementation: str | None,
    project: bool,
) -> jax.Array:
    """Tokens of images, `[f, tokens, embed]`, or hidden states without the projector; see `VisionEncoder`.

    Over several devices each encodes some of the images, and all get all tokens.

    Args:
      pixels: `[f, p, channels * patch * patch]`; the encoder sees `pixels * scale + shift`.
    """

    def run(modules: tuple[VisionEncoder, Projector], pixels: jax.Array, sizes: jax.Array) -> jax.Array:
        vision, projector = modules
        hidden = vision(pixels, sizes, implementation=implementation)
        return projector(hidden, sizes) if project else hidden

    keye = model.merge(params)
    modules, pixels = (keye.vision, keye.projector), pixels.astype(jnp.float32) * scale + shift
    images = spec(step.vision_patches)
    return step.constrain(step.shard_module(modules, run, (images, images), images)(pixels, sizes))


@functools.partial(jax.jit, static_argnames=("model", "sequences", "step"))
def chunk_inputs(
    model: ModelDef,
    params: Params,
    tokens: jax.Array,
    others: jax.Array,
    vision_embeds: jax.Array,
    *,
    sequences: int,
    step: StepSharding,
) -> tuple[jax.Array, jax.Array, BatchMetadata, jax.Array]:
    """What `prefill_chunk` takes of a chunk of prompts, from what `Chunk.pack` returned of it.

    Args:
      tokens: int32 `[5, b, t]`.
      others: int32 `[n]`.
      vision_embeds: `[v, embed]`, at least one row; see `Keye.embed`.
      sequences: most sequences of the chunk, s.

    Returns:
      embeddings `[b, t, embed]`, positions, metadata and last tokens.
    """
    ids, vision_index, *positions = tokens
    x = model.merge(params).embed(ids, vision_embeds, vision_index, step)
    start, count, last, sequence, table = unpack_others(others, ids.shape[0], sequences)
    batch = BatchMetadata(table, start, count, None if ids.shape[0] == 1 else sequence)
    batch, last = jax.tree.map(step.constrain, (batch, last))
    return x, step.constrain(jnp.stack(positions), (), step.rows), batch, last


@functools.partial(jax.jit, static_argnames=("model", "step", "options"), donate_argnames="pool")
def prefill_chunk(
    model: ModelDef,
    params: Params,
    x: jax.Array,
    positions: jax.Array,
    batch: BatchMetadata,
    last: jax.Array,
    pool: PagePool,
    *,
    step: StepSharding,
    options: AttentionOptions,
) -> tuple[jax.Array, PagePool]:
    """Reads a chunk of prompts.

    Args:
      x: `[b, t, embed]` embeddings.
      positions: int32 `[3, b, t]`.
      last: int32 `[n]`, tokens whose logits are wanted, counted row by row.

    Returns:
      float32 logits `[n, vocab]`, and the pool with the chunk in it.
    """
    decoder = model.merge(params).decoder
    hidden, contexts, _ = decoder(x, positions, paged_contexts(pool, batch), options, step)
    return decoder.logits(take_tokens(hidden, last, step), step), _pool(contexts, step)


@functools.partial(jax.jit, static_argnames=("model", "step", "options"), donate_argnames="pool")
def forward_with_intermediates(
    model: ModelDef,
    params: Params,
    x: jax.Array,
    positions: jax.Array,
    batch: BatchMetadata,
    pool: PagePool,
    *,
    step: StepSharding,
    options: AttentionOptions,
) -> tuple[jax.Array, PagePool, tuple[LayerIntermediates, ...]]:
    """`prefill_chunk` that returns the logits of all tokens, `[b, t, vocab]`, and what each layer computed."""
    decoder = model.merge(params).decoder
    hidden, contexts, found = decoder(x, positions, paged_contexts(pool, batch), options, step)
    return decoder.logits(hidden, step), _pool(contexts, step), jax.tree.map(step.constrain, found)


def _decode(
    model: ModelDef,
    params: Params,
    addresses: jax.Array | None,
    state: DecodeState,
    pool: PagePool,
    *,
    step: StepSharding,
    options: AttentionOptions,
) -> tuple[jax.Array, DecodeState, PagePool]:
    """Reads the last token of each row.

    Args:
      addresses: what `exchange_addresses` gives for the step.

    Returns:
      float32 logits `[b, vocab]` of the next ones, the state with the heat of what was selected, if it has that, and
      the pool with the tokens in it.
    """
    heats = state.heat.shape[1] > 0
    if heats:
        options = dataclasses.replace(options, selections=True)
    decoder = model.merge(params).decoder
    positions = state.lengths + state.position_delta
    positions = jnp.broadcast_to(positions[None, :, None], (3, *positions.shape, 1))
    batch = BatchMetadata(state.page_table, state.lengths, state.active.astype(jnp.int32))
    x = decoder.embed_tokens(state.tokens[:, None], step)
    hidden, contexts, found = decoder(x, positions, paged_contexts(pool, batch), options, step, addresses)
    if heats:
        # All layers at once: one scatter-add a step.
        selected = jnp.concatenate([layer.attention.selected[:, 0] for layer in found], axis=1)
        state = dataclasses.replace(state, heat=step.constrain(_heated(state, selected)))
    return decoder.logits(hidden[:, 0], step), state, _pool(contexts, step)


def _heated(state: DecodeState, selected: jax.Array) -> jax.Array:
    """The heat after active rows have selected positions, int32 `[b, n]`, -1 where there is none."""
    counts = state.active[:, None] & (selected >= 0)
    places = jnp.where(counts, selected, state.heat.shape[1])
    return state.heat.at[jnp.arange(len(places))[:, None], places].add(1, mode="drop")


def _draw(
    logits: jax.Array, state: DecodeState, rows: jax.Array, *, step: StepSharding, implementation: str | None
) -> DecodeState:
    """The state after the last token of some rows was read and the next one was drawn.

    Args:
      logits: float32 `[b, vocab]`.
      rows: bool `[b]`, those that draw; the others stay as they are.
    """
    lengths = state.lengths + rows
    names = {operation: resolve(operation, implementation) for operation in ("nucleus", "select_topk")}

    def draw_tokens(
        logits: jax.Array, sampling: SamplingState, lengths: jax.Array, rows: jax.Array
    ) -> tuple[jax.Array, TokenScores]:
        tokens = sample(logits, sampling, lengths, active=rows, implementation=names["nucleus"])
        return tokens, token_scores(logits, tokens, active=rows, implementation=names["select_topk"])

    tokens, scores = step.shard_map(draw_tokens, (spec(),) * 4, spec())(logits, state.sampling, lengths, rows)
    return dataclasses.replace(
        state,
        tokens=jnp.where(rows, tokens, state.tokens),
        lengths=lengths,
        sampling=counted(state.sampling, tokens, rows),
        scores=jax.tree.map(
            lambda new, old: jnp.where(rows.reshape(-1, *(1,) * (new.ndim - 1)), new, old), scores, state.scores
        ),
    )


def _decode_and_sample(
    model: ModelDef,
    params: Params,
    addresses: jax.Array | None,
    state: DecodeState,
    pool: PagePool,
    *,
    step: StepSharding,
    options: AttentionOptions,
) -> tuple[DecodeState, PagePool]:
    """`decode` and `draw` in one program."""
    logits, state, pool = _decode(model, params, addresses, state, pool, step=step, options=options)
    # So the compiler does to either part what it does to the program of that part, and tokens have the same bits.
    logits = jax.lax.optimization_barrier(logits)
    return _draw(logits, state, state.active, step=step, implementation=options.implementation), pool


_COMPILER_OPTIONS = {
    "gpu": {
        # A step of decode is one CUDA graph of some 1,500 short kernels: where they may, they run side by side.
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
        # Projections of one input are not made one product, for which their weights would be copied at every step.
        "xla_gpu_dot_merger_threshold_mb": "0",
    }
}


@functools.cache
def decode(platform: str) -> jax.stages.Wrapped:
    """The program that reads one token of each row and gives the logits; see `_decode`."""
    return jax.jit(
        _decode,
        static_argnames=("model", "step", "options"),
        donate_argnames=("state", "pool"),
        compiler_options=_COMPILER_OPTIONS.get(platform),
    )


@functools.partial(jax.jit, static_argnames=("step", "implementation"), donate_argnames="state")
def draw(logits: jax.Array, state: DecodeState, *, step: StepSharding, implementation: str | None) -> DecodeState:
    """Active rows draw from the logits of `decode`; see `_draw`. A mask may change in between."""
    return _draw(logits, state, state.active, step=step, implementation=implementation)


@functools.cache
def decode_and_sample(platform: str) -> jax.stages.Wrapped:
    """The program of one step of decode with the sampling in it; see `_decode_and_sample`."""
    # With the state donated, all that a step touches lies where it lay in the last one, and its CUDA graph, of some 30
    # nodes a layer, is launched without being updated first.
    return jax.jit(
        _decode_and_sample,
        static_argnames=("model", "step", "options"),
        donate_argnames=("state", "pool"),
        compiler_options=_COMPILER_OPTIONS.get(platform),
    )


@functools.partial(jax.jit, static_argnames="step")
def drawn(state: DecodeState, *, step: StepSharding) -> jax.Array:
    """What the rows drew last, as one array that the next step does not overwrite; see `unpack_drawn`."""
    scores = state.scores
    columns = (state.tokens[:, None], scores.logprob[:, None], scores.top_tokens, scores.top_logprobs)
    packed = jnp.concatenate([jax.lax.bitcast_convert_type(column, jnp.int32) for column in columns], axis=1)
    return step.constrain(packed)  # every process looks at it


def unpack_drawn(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, int32 `[b]`, and the fields of `TokenScores`, NumPy arrays, from what `drawn` returns."""
    count = (packed.shape[1] - 2) // 2
    floats = packed.view(np.float32)
    return packed[:, 0], floats[:, 1], packed[:, 2 : 2 + count], floats[:, 2 + count :]


@functools.partial(jax.jit, donate_argnames="state")
def set_row(state: DecodeState, packed: jax.Array, wide: WideValues) -> DecodeState:
    """The state with a sequence in a row, from what `pack_row` and `wide_values` gave of it."""
    row, _, values = unpack_row(packed, wide, state)
    return jax.tree.map(lambda x, value: x.at[row].set(value), state, values)


@functools.partial(jax.jit, static_argnames=("step", "implementation"), donate_argnames="state")
def begin_row(
    logits: jax.Array,
    state: DecodeState,
    packed: jax.Array,
    wide: WideValues,
    *,
    step: StepSharding,
    implementation: str | None,
) -> tuple[DecodeState, jax.Array]:
    """`set_row` of a sequence that then draws from its logits among float32 `[n, vocab]`; and `drawn` of it alone."""
    row, place, values = unpack_row(packed, wide, state)
    alone = jax.tree.map(lambda x: x[None], values)
    alone = _draw(logits[place][None], alone, alone.active, step=step, implementation=implementation)
    return jax.tree.map(lambda x, value: x.at[row].set(value[0]), state, alone), drawn(alone, step=step)


@functools.partial(jax.jit, donate_argnames="state")
def clear_rows(state: DecodeState, rows: jax.Array, idle: jax.Array, wide: WideValues) -> DecodeState:
    """The state with some rows, bool `[b]`, idle.

    Args:
      idle, wide: what `pack_row` and `wide_values` gave of an idle row. Of `wide` nothing is written: idle rows have no
        use for it, and a row that begins brings its own.
    """
    *_, values = unpack_row(idle, wide, state)
    written = jax.tree.map(
        lambda x, value: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), value, x), narrow(state), narrow(values)
    )
    return widen(written, wide_values(state))


@functools.partial(jax.jit, donate_argnames="state")
def set_pages(state: DecodeState, row_and_table: jax.Array) -> DecodeState:
    """The state with another page table in a row: int32 `[1 + m]`, the row's number and its table."""
    row, table = row_and_table[0], row_and_table[1:]
    return dataclasses.replace(state, page_table=state.page_table.at[row].set(table))


@functools.partial(jax.jit, donate_argnames="state")
def set_allowed(state: DecodeState, rows: jax.Array, allowed: jax.Array) -> DecodeState:
    """The state in which some rows, bool `[b]`, may draw only `allowed`, uint32 `[b, words]`."""
    allowed = jnp.where(rows[:, None], allowed, state.sampling.allowed)
    return dataclasses.replace(state, sampling=dataclasses.replace(state.sampling, allowed=allowed))


@functools.partial(jax.jit, static_argnames="step")
def heat(state: DecodeState, row: jax.Array, *, step: StepSharding) -> jax.Array:
    """A copy of one row's heat, int32 `[h]`, on every device."""
    return step.constrain(state.heat[row])


@functools.partial(jax.jit, static_argnames="step")
def take_pages(pool: PagePool, pages: jax.Array, *, step: StepSharding) -> PagePool:
    """Copies of some pages, int32 `[n]`, in their order, on every device."""
    return jax.tree.map(lambda x: step.constrain(x[pages]), pool)


@functools.partial(jax.jit, static_argnames="step", donate_argnames="pool")
def put_pages(pool: PagePool, pages: jax.Array, values: PagePool, *, step: StepSharding) -> PagePool:
    """The pool with `values` in some pages, int32 `[n]`; a page behind the last one is left out."""
    pool = jax.tree.map(lambda x, value: x.at[pages].set(value, mode="drop"), pool, values)
    return jax.lax.with_sharding_constraint(pool, pool.shardings(step.rules)) if step.rules.sharding() else pool


def _pool(contexts: tuple[PagedContext, ...], step: StepSharding) -> PagePool:
    """The pages after a step, where they lay before it, so that they can be given to the next one."""
    pool = PagePool(tuple(context.pages for context in contexts))
    return jax.lax.with_sharding_constraint(pool, pool.shardings(step.rules)) if step.rules.sharding() else pool
