"""A model ready to run: encoding images, reading a prompt in chunks, decoding token by token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from keye_jax import steps
from keye_jax.cache import Cache
from keye_jax.config import KeyeConfig
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.decoder import LayerIntermediates
from keye_jax.model.keye import Keye
from keye_jax.model.parallel import STRIPE_MULTIPLE, Axes, Parallel, spec
from keye_jax.sampling import Sampling

if TYPE_CHECKING:
    from keye_jax.sharding import Layout

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


class Runner:
    """A model ready to run.

    Attributes:
      config: its configuration.
      dtype: of its parameters and cache.
      options: how attention is computed.
      layout: where parameters and cache lie; None for one device.
      prefill_chunk: prompt tokens read in one step, or by each device that shares them, by default what suits the
        device; the result does not depend on it.
    """

    def __init__(
        self,
        model: Keye,
        config: KeyeConfig,
        *,
        options: AttentionOptions = AttentionOptions(),  # noqa: B008 (frozen)
        prefill_chunk: int | None = None,
        layout: Layout | None = None,
    ):
        """Takes a model; under a layout its parameters are put where that wants them (`keye_jax.sharding.place`).

        A model of shapes and dtypes in place of arrays can be compiled, not run.
        """
        self.config, self.options, self.layout = config, options, layout
        self.prefill_chunk = prefill_chunk or PREFILL_CHUNK.get(jax.default_backend(), _SMALL_PREFILL_CHUNK)
        self.dtype = model.decoder.embed_tokens.weight.dtype
        self._parallel = functools.cache(functools.partial(Parallel.of, layout)) if layout else None
        if layout:
            from keye_jax.sharding import place

            model = place(model, layout)
        graph, state = nnx.split(model)
        arrays, tree = jax.tree.flatten(state)
        self._structure, self._arrays = steps.structure_of(graph, tree), tuple(arrays)

    @property
    def platform(self) -> str:
        """Of its devices, to JAX."""
        return self.layout.platform if self.layout else jax.default_backend()

    def parallel(self, batch: int, tokens: int) -> Parallel | None:
        """How a step that reads `tokens` tokens of each of `batch` sequences lies over devices; None for one device."""
        return self._parallel(batch, tokens) if self._parallel else None

    def put(self, array: np.ndarray, *dimensions: Axes) -> jax.Array:
        """An array on the devices, its dimensions split over these mesh axes of the layout, () for not at all.

        Every process of a job gives the same array; of a split one each looks at its own parts only.
        """
        if self.layout is None:
            return jnp.asarray(array)
        sharding = jax.NamedSharding(self.layout.mesh, spec(*dimensions))
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    def new_cache(self, capacity: int, batch: int = 1) -> Cache:
        """An empty cache for `batch` sequences of at least `capacity` tokens each."""
        create, parallel = self._cache_maker(capacity, batch), self.parallel(batch, 1)
        if parallel is None:
            return create()
        return jax.jit(create, out_shardings=jax.eval_shape(create).shardings(parallel))()

    def _cache_maker(self, capacity: int, batch: int) -> Callable[[], Cache]:
        return functools.partial(
            Cache.create,
            self.config,
            batch,
            round_up(capacity),
            self.dtype,
            indexer_dtype=self.options.indexer_dtype,
            parallel=self.parallel(batch, 1),
        )

    def prefill_programs(self, tokens: int) -> list[jax.stages.Traced]:
        """The steps that `prefill` takes for a prompt of so many tokens, in a cache made for just these."""
        chunk = self.chunk(tokens)
        ends = [min(start + chunk, tokens) for start in range(0, tokens, chunk)]
        return [
            self._read_program(chunk, tokens, options)
            for options in {self.prefill_options(chunk, end): None for end in ends}
        ]

    def prefill_options(self, chunk: int, end: int) -> AttentionOptions:
        """The options of the step of `prefill` that reads a chunk of so many tokens, up to position `end`."""
        parallel = self.parallel(1, chunk)
        return self.options.for_context(end, split=bool(parallel and parallel.query_sequence))

    def _read_program(
        self, chunk: int, capacity: int, options: AttentionOptions, *, all_logits: bool = False
    ) -> jax.stages.Traced:
        parallel = self.parallel(1, chunk)
        split = ((), parallel.query_sequence) if parallel else ()
        x = self._shape((1, chunk, self.config.hidden_size), self.dtype, *split)
        positions = self._shape((3, 1, chunk), jnp.int32, (), *split)
        count, cache = self._shape((1,), jnp.int32), self._cache_shape(capacity, 1)
        static = {"parallel": parallel, "options": options, "all_logits": all_logits}
        return steps.read.trace(self._structure, self._arrays, x, positions, count, cache, **static)

    def decode_program(self, batch: int, capacity: int, sampling: Sampling | None = None) -> jax.stages.Traced:
        """The step of `decode` for caches of this size, or with `sampling` that of `write`."""
        each, cache = self._shape((batch,), jnp.int32), self._cache_shape(capacity, batch)
        arguments = self._structure, self._arrays, each, each, cache
        static = {"parallel": self.parallel(batch, 1), "options": self.options.for_context(cache.capacity)}
        if sampling is None:
            return steps.decode_step(self.platform).trace(*arguments, **static)
        seeds = self._shape((batch,), jnp.uint32)
        return steps.write_step(self.platform).trace(*arguments, seeds, **static, sampling=sampling)

    def compile_prefill(self, tokens: int) -> int:
        """Compiles the steps of `prefill_programs`.

        Returns:
          the most bytes that a step needs beyond its arguments and results, on each device.
        """
        return max(_workspace(step) for step in self.prefill_programs(tokens))

    def compile_trace(self, tokens: int, capacity: int) -> int:
        """Compiles the step of `trace` for a prompt of one chunk; returns what `compile_prefill` does."""
        options = dataclasses.replace(self.options, intermediates=True).for_context(tokens)
        return _workspace(self._read_program(self.chunk(tokens), capacity, options, all_logits=True))

    def compile_write(self, batch: int, capacity: int, sampling: Sampling) -> int:
        """Compiles the step of `write` for caches of this size; returns what `compile_prefill` does."""
        return _workspace(self.decode_program(batch, capacity, sampling))

    def _shape(self, shape: tuple[int, ...], dtype: jnp.dtype, *dimensions: Axes) -> jax.ShapeDtypeStruct:
        sharding = jax.NamedSharding(self.layout.mesh, spec(*dimensions)) if self.layout else None
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _cache_shape(self, capacity: int, batch: int) -> Cache:
        parallel = self.parallel(batch, 1)
        cache = jax.eval_shape(self._cache_maker(capacity, batch))
        if parallel is None:
            return cache
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            cache,
            cache.shardings(parallel),
        )

    def chunk(self, tokens: int) -> int:
        """Tokens that `prefill` reads in one step of a prompt of so many."""
        if tokens == 1:
            return 1
        parallel = self.parallel(1, tokens)
        devices = parallel.size(parallel.query_sequence) if parallel else 1
        if devices == 1:
            return min(self.prefill_chunk, round_up(tokens))
        multiple = devices * STRIPE_MULTIPLE
        return -(-min(self.prefill_chunk * devices, round_up(tokens)) // multiple) * multiple

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
        """Encodes images, or frames, a bounded number of patches at a time on each device.

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
        parallel = self.parallel(1, 1)
        over = parallel.vision_patches if parallel else ()
        devices = parallel.size(over) if parallel else 1
        embeds, done = [], 0
        for height, columns, images in _runs(grids):
            each = height * columns
            padded = round_up(each)
            at_once = _at_once(images, each, devices)
            for first in range(0, images, at_once):
                here = min(at_once, images - first)
                chunk = np.zeros((at_once, padded, flat.shape[1]), flat.dtype)
                chunk[:here, :each] = flat[done : done + here * each].reshape(here, each, -1)
                encoded = steps.encode(
                    self._structure,
                    self._arrays,
                    self.put(chunk, over),
                    self.put(np.tile(np.asarray([height, columns], np.int32), (at_once, 1)), over),
                    self.put(scale_of),
                    self.put(shift_of),
                    parallel=parallel,
                    implementation=self.options.implementation,
                    project=project,
                )
                tokens = each // merge
                embeds.append(encoded[:here, :tokens].reshape(here * tokens, width))
                done += here * each
                if progress:
                    progress(done, len(patches))
        return jnp.concatenate(embeds) if embeds else self.put(np.zeros((0, width), self.dtype))

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
        chunks = self._chunks(input_ids, positions, vision_embeds)
        chunk = next(chunks, None)
        while chunk:
            x, places, count, done = chunk
            # Before this one is read: a loop whose end devices decide keeps this thread until they are there.
            chunk = next(chunks, None)
            tokens = x.shape[1]
            static = {"parallel": self.parallel(1, tokens), "options": self.prefill_options(tokens, done)}
            arrays = self._structure, self._arrays, x, places, count, cache
            logits, cache, _ = steps.read(*arrays, **static, all_logits=False)
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
            logits, cache, found = steps.read(
                self._structure,
                self._arrays,
                x,
                places,
                count,
                cache,
                parallel=self.parallel(1, x.shape[1]),
                options=options,
                all_logits=True,
            )
            yield logits, cache, found, done

    def _chunks(
        self, input_ids: np.ndarray, positions: np.ndarray, vision_embeds: jax.Array
    ) -> Iterator[tuple[jax.Array, jax.Array, jax.Array, int]]:
        """Embeddings, positions and count of each chunk of a prompt, and the tokens up to its end."""
        total = len(input_ids)
        chunk = self.chunk(total)
        parallel = self.parallel(1, chunk)
        # Tokens and their positions are given to the devices that will have them.
        order = parallel.token_order(chunk) if parallel else np.arange(chunk)
        split = ((), parallel.query_sequence) if parallel else ()
        index = vision_rows(input_ids, self.config)
        if len(vision_embeds) != np.count_nonzero(index >= 0):
            raise ValueError(f"{len(vision_embeds)} vision embeddings for {np.count_nonzero(index >= 0)} pads")
        if not isinstance(vision_embeds, jax.Array):
            vision_embeds = self.put(vision_embeds)
        # At least one row, so that a prompt of text alone can index it.
        vision_embeds = jnp.pad(vision_embeds, ((0, round_up(max(1, len(vision_embeds))) - len(vision_embeds)), (0, 0)))
        padding = -total % chunk
        ids = np.pad(input_ids, (0, padding))
        index = np.pad(index, (0, padding), constant_values=-1)
        positions = np.pad(positions, ((0, 0), (0, padding)))
        for start in range(0, total, chunk):
            part = start + order
            here, rows = self.put(ids[None, part], *split), self.put(index[None, part], *split)
            x = steps.embed(self._structure, self._arrays, here, vision_embeds, rows, parallel=parallel)
            count = min(chunk, total - start)
            places = self.put(positions[:, None, part], (), *split)
            yield x, places, self.put(np.asarray([count], np.int32)), start + count

    def decode(self, tokens: jax.Array, delta: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One step of decoding.

        Args:
          tokens: int32 `[b]`, the last token of each sequence, not yet in the cache.
          delta: int32 `[b]`; a token at index i of its sequence stands at position i + delta.
          cache: donated.

        Returns:
          float32 `[b, vocab]` logits of the next tokens, and the cache with `tokens` in it.
        """
        options, parallel = self.options.for_context(cache.capacity), self.parallel(len(cache.lengths), 1)
        step = steps.decode_step(self.platform)
        return step(self._structure, self._arrays, tokens, delta, cache, parallel=parallel, options=options)

    def write(
        self, tokens: jax.Array, delta: jax.Array, cache: Cache, seeds: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, Cache]:
        """A step of decoding with the sampling in it.

        Args:
          tokens, delta, cache: as for `decode`; tokens are donated too.
          seeds: uint32 `[b]`, what each sequence draws by.

        Returns:
          int32 `[b]`, the next tokens, and the cache with `tokens` in it.
        """
        static = {
            "parallel": self.parallel(len(cache.lengths), 1),
            "options": self.options.for_context(cache.capacity),
            "sampling": sampling,
        }
        step = steps.write_step(self.platform)
        return step(self._structure, self._arrays, tokens, delta, cache, seeds, **static)


def _workspace(step: jax.stages.Traced) -> int:
    analysis = step.lower().compile().memory_analysis()
    return analysis.temp_size_in_bytes if analysis else 0


def _at_once(images: int, patches: int, devices: int) -> int:
    """Of so many images of so many patches, how many are encoded in one step."""
    return devices * max(1, min(-(-images // devices), ENCODE_PATCHES // round_up(patches)))


def images_here(grids: np.ndarray, layout: Layout) -> np.ndarray:
    """Which images, or frames, `Runner.encode` gives to devices of this process; it does not look at others' pixels.

    Args:
      grids: int `[g, 3]`, as for `encode`.

    Returns:
      bool `[g]`.
    """
    here, first = np.zeros(len(grids), bool), 0
    over = layout.sharding("vision_patches")
    for height, columns, images in _runs(grids):
        at_once = _at_once(images, height * columns, layout.size("vision_patches"))
        for index in over.addressable_devices_indices_map((at_once,)).values():
            for start in range(0, images, at_once):
                own = range(at_once)[index[0] if index else slice(None)]
                here[first + start + own.start : first + min(start + own.stop, images)] = True
        first += images
    return here


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
