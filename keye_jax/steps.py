"""The steps of a model as compiled functions of its arrays: encoding images, embedding, reading a chunk, decoding."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.cache import Cache
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.decoder import LayerIntermediates
from keye_jax.model.keye import Keye
from keye_jax.model.parallel import Parallel, spec
from keye_jax.model.projector import Projector
from keye_jax.model.vision import VisionEncoder
from keye_jax.sampling import Sampling, sample

type Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """A model without its arrays.

    Equal to itself alone, and the arrays a flat tuple: a step of decoding looks its program up in microseconds, where
    comparing and flattening the modules would take longer than the device does.
    """

    graph: nnx.GraphDef[Keye]
    tree: Any

    def merge(self, arrays: Arrays) -> Keye:
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, arrays))


structure_of = functools.cache(Structure)


@functools.partial(jax.jit, static_argnames=("structure", "parallel", "implementation", "project"))
def encode(
    structure: Structure,
    arrays: Arrays,
    pixels: jax.Array,
    sizes: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    *,
    parallel: Parallel | None,
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

    model = structure.merge(arrays)
    modules, pixels = (model.vision, model.projector), pixels.astype(jnp.float32) * scale + shift
    if parallel is None:
        return run(modules, pixels, sizes)
    images = spec(parallel.vision_patches)
    return parallel.constrain(parallel.shard_module(modules, run, (images, images), images)(pixels, sizes))


@functools.partial(jax.jit, static_argnames=("structure", "parallel"))
def embed(
    structure: Structure,
    arrays: Arrays,
    ids: jax.Array,
    vision_embeds: jax.Array,
    vision_index: jax.Array,
    *,
    parallel: Parallel | None,
) -> jax.Array:
    """Embeddings of a chunk of prompts, `[b, t, embed]`; see `Keye.embed`."""
    return structure.merge(arrays).embed(ids, vision_embeds, vision_index, parallel)


@functools.partial(jax.jit, static_argnames=("structure", "parallel", "options", "all_logits"), donate_argnames="cache")
def read(
    structure: Structure,
    arrays: Arrays,
    x: jax.Array,
    positions: jax.Array,
    count: jax.Array,
    cache: Cache,
    *,
    parallel: Parallel | None,
    options: AttentionOptions,
    all_logits: bool,
) -> tuple[jax.Array, Cache, tuple[LayerIntermediates, ...]]:
    """Reads `count` of t new tokens of each sequence; see `Decoder`.

    Returns:
      float32 logits of each sequence's last new token, `[b, vocab]`, or of all, `[b, t, vocab]`, the cache, and
      intermediates of each layer if the options ask for them.
    """
    decoder = structure.merge(arrays).decoder
    hidden, cache, found = decoder(x, positions, count, cache, options, parallel)
    if parallel:
        # What is looked at is on all devices, its tokens as they stand in the chunk.
        found = jax.tree.map(lambda each: parallel.constrain(parallel.in_order(each)), found)
    if all_logits:
        hidden = parallel.in_order(hidden) if parallel else hidden
    elif parallel:
        last = parallel.token_order(x.shape[1]) == jnp.maximum(count - 1, 0)[:, None]
        hidden = jnp.sum(jnp.where(last[..., None], hidden, 0), axis=1)
    else:
        hidden = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return decoder.logits(hidden, parallel), _pinned(cache, parallel), found


def _decode(
    structure: Structure,
    arrays: Arrays,
    tokens: jax.Array,
    delta: jax.Array,
    cache: Cache,
    *,
    parallel: Parallel | None,
    options: AttentionOptions,
) -> tuple[jax.Array, Cache]:
    """Reads one token of each sequence, int32 `[b]`; see `Runner.decode`."""
    decoder = structure.merge(arrays).decoder
    positions = jnp.broadcast_to((cache.lengths + delta)[None, :, None], (3, tokens.shape[0], 1))
    x = decoder.embed(tokens[:, None], parallel)
    if parallel:
        x = parallel.constrain(x, parallel.batch)
    hidden, cache, _ = decoder(x, positions, jnp.ones_like(cache.lengths), cache, options, parallel)
    return decoder.logits(hidden[:, 0], parallel), _pinned(cache, parallel)


def _write(
    structure: Structure,
    arrays: Arrays,
    tokens: jax.Array,
    delta: jax.Array,
    cache: Cache,
    seeds: jax.Array,
    *,
    parallel: Parallel | None,
    options: AttentionOptions,
    sampling: Sampling,
) -> tuple[jax.Array, Cache]:
    """`_decode` with the sampling in it; see `Runner.write`."""
    logits, cache = _decode(structure, arrays, tokens, delta, cache, parallel=parallel, options=options)
    tokens = sample(logits, seeds, cache.lengths, sampling)
    return parallel.constrain(tokens) if parallel else tokens, cache


_COMPILER_OPTIONS = {
    "gpu": {
        # A step of decoding is one CUDA graph of some 1,500 short kernels: where they may, they run side by side.
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
        # Projections of one input are not made one product, for which their weights would be copied at every step.
        "xla_gpu_dot_merger_threshold_mb": "0",
    }
}


@functools.cache
def decode_step(platform: str) -> jax.stages.Wrapped:
    """The compiled step of `Runner.decode`."""
    return jax.jit(
        _decode,
        static_argnames=("structure", "parallel", "options"),
        donate_argnames="cache",
        compiler_options=_COMPILER_OPTIONS.get(platform),
    )


@functools.cache
def write_step(platform: str) -> jax.stages.Wrapped:
    """The compiled step of `Runner.write`."""
    # With the tokens donated, all that a step touches lies where it lay in the last one, and its CUDA graph, of some 34
    # nodes a layer, is launched without being updated first.
    return jax.jit(
        _write,
        static_argnames=("structure", "parallel", "options", "sampling"),
        donate_argnames=("tokens", "cache"),
        compiler_options=_COMPILER_OPTIONS.get(platform),
    )


def _pinned(cache: Cache, parallel: Parallel | None) -> Cache:
    """The cache as it lay before the step, so that it can be given to the next one."""
    return jax.lax.with_sharding_constraint(cache, cache.shardings(parallel)) if parallel else cache
