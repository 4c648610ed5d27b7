"""The compiled steps of a model: encoding images, reading a prompt in chunks, decoding token by token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from keye_jax.cache import Cache
from keye_jax.config import KeyeConfig
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.decoder import LayerIntermediates
from keye_jax.model.keye import Keye
from keye_jax.sampling import Sampling, sample

PREFILL_CHUNK = {"gpu": 8192}
_SMALL_PREFILL_CHUNK = 1024
"""Prompt tokens read in one step: with 8,192, each of 128 experts has rows enough to keep a GPU's tensor cores busy."""

ENCODE_PATCHES = 8192
"""Patches encoded in one step: whole frames, at least one (the publisher's Chunk ViT)."""

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""


def round_up(size: int) -> int:
    """`size` rounded up by at most an eighth (to 64 at least), so that similar sizes share a compiled step."""
    step = max(64, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


type Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Structure:
    """A model without its arrays.

    Equal to itself alone, and the arrays a flat tuple: a step of decoding looks its program up in microseconds, where
    comparing and flattening the modules would take longer than the device does.
    """

    graph: nnx.GraphDef[Keye]
    tree: Any

    def merge(self, arrays: Arrays) -> Keye:
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, arrays))


_structure = functools.cache(_Structure)


@functools.partial(jax.jit, static_argnames=("structure", "implementation", "project"))
def _encode(
    structure: _Structure,
    arrays: Arrays,
    pixels: jax.Array,
    sizes: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    *,
    implementation: str | None,
    project: bool,
) -> jax.Array:
    model = structure.merge(arrays)
    hidden = model.vision(pixels.astype(jnp.float32) * scale + shift, sizes, implementation=implementation)
    return model.projector(hidden, sizes) if project else hidden


@functools.partial(jax.jit, static_argnames="structure")
def _embed(
    structure: _Structure, arrays: Arrays, ids: jax.Array, vision_embeds: jax.Array, vision_index: jax.Array
) -> jax.Array:
    return structure.merge(arrays).embed(ids, vision_embeds, vision_index)


@functools.partial(jax.jit, static_argnames=("structure", "options", "all_logits"), donate_argnames="cache")
def _read(
    structure: _Structure,
    arrays: Arrays,
    x: jax.Array,
    positions: jax.Array,
    count: jax.Array,
    cache: Cache,
    *,
    options: AttentionOptions,
    all_logits: bool = False,
) -> tuple[jax.Array, Cache, tuple[LayerIntermediates, ...]]:
    """Logits of each sequence's last new token, `[b, vocab]`, or of all, `[b, t, vocab]`."""
    decoder = structure.merge(arrays).decoder
    hidden, cache, found = decoder(x, positions, count, cache, options)
    if not all_logits:
        hidden = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return decoder.logits(hidden), cache, found


def _decode(
    structure: _Structure,
    arrays: Arrays,
    tokens: jax.Array,
    delta: jax.Array,
    cache: Cache,
    *,
    options: AttentionOptions,
) -> tuple[jax.Array, Cache]:
    decoder = structure.merge(arrays).decoder
    positions = jnp.broadcast_to((cache.lengths + delta)[None, :, None], (3, tokens.shape[0], 1))
    x = decoder.embed_tokens(tokens[:, None])
    hidden, cache, _ = decoder(x, positions, jnp.ones_like(cache.lengths), cache, options)
    return decoder.logits(hidden[:, 0]), cache


def _write(
    structure: _Structure,
    arrays: Arrays,
    tokens: jax.Array,
    delta: jax.Array,
    cache: Cache,
    keys: jax.Array,
    *,
    options: AttentionOptions,
    sampling: Sampling,
) -> tuple[jax.Array, Cache]:
    logits, cache = _decode(structure, arrays, tokens, delta, cache, options=options)
    return sample(logits, jax.vmap(jax.random.fold_in)(keys, cache.lengths), sampling), cache


_COMPILER_OPTIONS = {
    "gpu": {
        # A step of decoding is one CUDA graph of some 1,500 short kernels: where they may, they run side by side.
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
        # Projections of one input are not made one product, for which their weights would be copied at every step.
        "xla_gpu_dot_merger_threshold_mb": "0",
    }
}


@functools.cache
def _decode_step(platform: str) -> jax.stages.Wrapped:
    return jax.jit(
        _decode,
        static_argnames=("structure", "options"),
        donate_argnames="cache",
        compiler_options=_COMPILER_OPTIONS.get(platform),
    )


@functools.cache
def _write_step(platform: str) -> jax.stages.Wrapped:
    # With the tokens donated, all that a step touches lies where it lay in the last one: an unchanged CUDA graph is
    # launched in half the time that it takes to update it.
    return jax.jit(
        _write,
        static_argnames=("structure", "options", "sampling"),
        donate_argnames=("tokens", "cache"),
        compiler_options=_COMPILER_OPTIONS.get(platform),
    )


class Runner:
    """A model ready to run.

    Attributes:
      config: its configuration.
      dtype: of its parameters and cache.
      options: how attention is computed.
      prefill_chunk: prompt tokens read in one step, by default what suits the device; the result does not depend on it.
    """

    def __init__(
        self,
        model: Keye,
        config: KeyeConfig,
        *,
        options: AttentionOptions = AttentionOptions(),  # noqa: B008 (frozen)
        prefill_chunk: int | None = None,
    ):
        self.config, self.options = config, options
        self.prefill_chunk = prefill_chunk or PREFILL_CHUNK.get(jax.default_backend(), _SMALL_PREFILL_CHUNK)
        self.dtype = model.decoder.embed_tokens.weight.dtype
        graph, state = nnx.split(model)
        arrays, tree = jax.tree.flatten(state)
        self._structure, self._arrays = _structure(graph, tree), tuple(arrays)

    def new_cache(self, capacity: int, batch: int = 1) -> Cache:
        """An empty cache for `batch` sequences of at least `capacity` tokens each."""
        return Cache.create(
            self.config, batch, round_up(capacity), self.dtype, indexer_dtype=self.options.indexer_dtype
        )

    def compile_prefill(self, tokens: int) -> int:
        """Compiles the steps that `prefill` takes for a prompt of so many tokens, in a cache made for just these.

        Returns:
          the most bytes that a step needs beyond its arguments and results.
        """
        chunk = min(self.prefill_chunk, round_up(tokens))
        ends = [min(start + chunk, tokens) for start in range(0, tokens, chunk)]
        return max(
            _workspace(self._lower_read(chunk, tokens, options))
            for options in {self.options.for_context(end) for end in ends}
        )

    def compile_trace(self, tokens: int, capacity: int) -> int:
        """Compiles the step of `trace` for a prompt of one chunk; returns what `compile_prefill` does."""
        chunk = round_up(tokens)
        options = dataclasses.replace(self.options, intermediates=True).for_context(tokens)
        return _workspace(self._lower_read(chunk, capacity, options, all_logits=True))

    def _lower_read(
        self, chunk: int, capacity: int, options: AttentionOptions, *, all_logits: bool = False
    ) -> jax.stages.Lowered:
        x = jax.ShapeDtypeStruct((1, chunk, self.config.hidden_size), self.dtype)
        positions, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3, 1, chunk), (1,)))
        cache = jax.eval_shape(lambda: self.new_cache(capacity))
        return _read.lower(
            self._structure, self._arrays, x, positions, count, cache, options=options, all_logits=all_logits
        )

    def compile_write(self, batch: int, capacity: int, sampling: Sampling) -> int:
        """Compiles the step of `write` for caches of this size; returns what `compile_prefill` does."""
        each = jax.ShapeDtypeStruct((batch,), jnp.int32)
        cache = jax.eval_shape(lambda: self.new_cache(capacity, batch))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
        step = _write_step(jax.default_backend())
        static = {"options": self.options.for_context(cache.capacity), "sampling": sampling}
        return _workspace(step.lower(self._structure, self._arrays, each, each, cache, keys, **static))

    def encode(
        self,
        patches: np.ndarray,
        grids: np.ndarray,
        *,
        scale: np.ndarray | float = 1.0,
        shift: np.ndarray | float = 0.0,
        project: bool = True,
        progress: Progress | None = None,
    ) -> jax.Array:
        """Encodes images, or frames, a bounded number of patches at a time.

        Args:
          patches: uint8 or float `[sum(t*h*w), channels, patch, patch]`, each grid's in raster order.
          grids: int `[g, 3]`: 1, height and width in patches.
          scale, shift: float32 `[channels]`; the encoder sees `patches * scale + shift`.
          project: False stops before the projector.
          progress: told the patches done.

        Returns:
          `[sum(h*w) / 4, embed]` token embeddings, in order; without the projector `[sum(h*w), vision_embed]`.
        """
        vision = self.config.vision_config
        pixels = vision.patch_size**2
        flat = patches.reshape(len(patches), vision.num_channels * pixels)
        scale_of, shift_of = (
            np.repeat(np.broadcast_to(np.asarray(x, np.float32), vision.num_channels), pixels) for x in (scale, shift)
        )
        width = self.config.hidden_size if project else vision.hidden_size
        merge = vision.spatial_merge_size**2 if project else 1
        embeds, done = [jnp.zeros((0, width), self.dtype)], 0
        for height, columns, images in _runs(grids):
            each = height * columns
            padded = round_up(each)
            at_once = max(1, min(images, ENCODE_PATCHES // padded))
            for first in range(0, images, at_once):
                here = min(at_once, images - first)
                chunk = np.zeros((at_once, padded, flat.shape[1]), flat.dtype)
                chunk[:here, :each] = flat[done : done + here * each].reshape(here, each, -1)
                encoded = _encode(
                    self._structure,
                    self._arrays,
                    jnp.asarray(chunk),
                    jnp.tile(jnp.asarray([height, columns], jnp.int32), (at_once, 1)),
                    jnp.asarray(scale_of),
                    jnp.asarray(shift_of),
                    implementation=self.options.implementation,
                    project=project,
                )
                tokens = each // merge
                embeds.append(encoded[:here, :tokens].reshape(here * tokens, width))
                done += here * each
                if progress:
                    progress(done, len(patches))
        return jnp.concatenate(embeds)

    def prefill(
        self,
        input_ids: np.ndarray,
        positions: np.ndarray,
        vision_embeds: jax.Array,
        cache: Cache,
        *,
        progress: Progress | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Reads a prompt into an empty cache of one sequence.

        Args:
          input_ids: int32 `[t]`.
          positions: int32 `[3, t]`.
          vision_embeds: `[v, embed]`, images first, then frames, in the order of the prompt's pads.
          cache: donated.
          progress: told the tokens done.

        Returns:
          float32 `[1, vocab]` logits of the last token, and the cache.
        """
        logits = None
        for x, places, count, done in self._chunks(input_ids, positions, vision_embeds):
            options = self.options.for_context(done)
            logits, cache, _ = _read(self._structure, self._arrays, x, places, count, cache, options=options)
            if progress:
                jax.block_until_ready(logits)
                progress(done, len(input_ids))
        assert logits is not None, "an empty prompt"
        return logits, cache

    def trace(
        self, input_ids: np.ndarray, positions: np.ndarray, vision_embeds: jax.Array, cache: Cache
    ) -> Iterator[tuple[jax.Array, Cache, tuple[LayerIntermediates, ...], int]]:
        """`prefill` that yields what each chunk computed.

        Yields:
          float32 `[1, chunk, vocab]` logits, the cache, each layer's intermediates, and the tokens done so far; rows
          of the last chunk behind the prompt's end mean nothing.
        """
        options = dataclasses.replace(self.options, intermediates=True).for_context(len(input_ids))
        for x, places, count, done in self._chunks(input_ids, positions, vision_embeds):
            logits, cache, found = _read(
                self._structure, self._arrays, x, places, count, cache, options=options, all_logits=True
            )
            yield logits, cache, found, done

    def _chunks(
        self, input_ids: np.ndarray, positions: np.ndarray, vision_embeds: jax.Array
    ) -> Iterator[tuple[jax.Array, jax.Array, jax.Array, int]]:
        """Embeddings, positions and count of each chunk of a prompt, and the tokens up to its end."""
        total = len(input_ids)
        chunk = min(self.prefill_chunk, round_up(total))
        index = vision_rows(input_ids, self.config)
        if len(vision_embeds) != np.count_nonzero(index >= 0):
            raise ValueError(f"{len(vision_embeds)} vision embeddings for {np.count_nonzero(index >= 0)} pads")
        # At least one row, so that a prompt of text alone can index it.
        vision_embeds = jnp.pad(vision_embeds, ((0, round_up(max(1, len(vision_embeds))) - len(vision_embeds)), (0, 0)))
        padding = -total % chunk
        ids = np.pad(input_ids, (0, padding))
        index = np.pad(index, (0, padding), constant_values=-1)
        positions = np.pad(positions, ((0, 0), (0, padding)))
        for start in range(0, total, chunk):
            part = slice(start, start + chunk)
            here, rows = jnp.asarray(ids[None, part]), jnp.asarray(index[None, part])
            x = _embed(self._structure, self._arrays, here, vision_embeds, rows)
            count = min(chunk, total - start)
            yield x, jnp.asarray(positions[:, None, part]), jnp.asarray([count], jnp.int32), start + count

    def decode(self, tokens: jax.Array, delta: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One step of decoding.

        Args:
          tokens: int32 `[b]`, the last token of each sequence, not yet in the cache.
          delta: int32 `[b]`; a token at index i of its sequence stands at position i + delta.
          cache: donated.

        Returns:
          float32 `[b, vocab]` logits of the next tokens, and the cache with `tokens` in it.
        """
        step, options = _decode_step(jax.default_backend()), self.options.for_context(cache.capacity)
        return step(self._structure, self._arrays, tokens, delta, cache, options=options)

    def write(
        self, tokens: jax.Array, delta: jax.Array, cache: Cache, keys: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, Cache]:
        """A step of decoding with the sampling in it.

        Args:
          tokens, delta, cache: as for `decode`; tokens are donated too.
          keys: a random key for each sequence, `[b]`, the same in every step.

        Returns:
          int32 `[b]`, the next tokens, and the cache with `tokens` in it.
        """
        step, options = _write_step(jax.default_backend()), self.options.for_context(cache.capacity)
        return step(self._structure, self._arrays, tokens, delta, cache, keys, options=options, sampling=sampling)


def _workspace(step: jax.stages.Lowered) -> int:
    analysis = step.compile().memory_analysis()
    return analysis.temp_size_in_bytes if analysis else 0


def vision_rows(input_ids: np.ndarray, config: KeyeConfig) -> np.ndarray:
    """Row of the vision embeddings (images first, then frames) that stands at each token, int32 `[t]`; -1 for text."""
    images, frames = input_ids == config.image_token_id, input_ids == config.video_token_id
    rows = np.full(len(input_ids), -1, np.int32)
    rows[images] = np.arange(np.count_nonzero(images))
    rows[frames] = np.count_nonzero(images) + np.arange(np.count_nonzero(frames))
    return rows


def _runs(grids: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Height, width and number of each run of grids of one size."""
    start = 0
    for end in range(1, len(grids) + 1):
        if end == len(grids) or (grids[end] != grids[start]).any():
            yield int(grids[start, 1]), int(grids[start, 2]), end - start
            start = end
