"""A model ready to run: encoding images, prefill of prompts, decode token by token.

The runtime owns no pages. Its caller makes a pool, says which pages a sequence holds, and gives the pool to each step,
which gives it back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import BatchMetadata, PagePool
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.decode_layer import exchange_addresses
from keye_jax.model.decoder import LayerIntermediates
from keye_jax.model.keye import Keye
from keye_jax.model.params import shard_params
from keye_jax.page_allocator import PAGE_SIZE, PageAllocator, pages_for
from keye_jax.progress import Progress
from keye_jax.runtime import programs
from keye_jax.runtime.decode import DecodeState, WideValues, active_row, idle_row, pack_row, wide_values
from keye_jax.runtime.encode import ImageBatch, batch_images, image_batch
from keye_jax.runtime.prefill import (
    Chunk,
    Segment,
    fixed_shape,
    pad_rows,
    plan_chunk,
    plan_chunks,
    round_up,
    vision_rows,
)
from keye_jax.sharding.collectives import Axes
from keye_jax.sharding.mesh_rules import MeshRules
from keye_jax.sharding.step import StepSharding

PREFILL_CHUNK = {"gpu": 8192}
_SMALL_PREFILL_CHUNK = 1024
"""Prompt tokens read in one step: with 8,192, each of 128 experts has rows enough to keep a GPU's tensor cores busy."""

PAGES_AT_ONCE = 128
"""Pages that are copied to or from the host in one step."""


class Runtime:
    """A model ready to run.

    Attributes:
      config: its configuration.
      model_def, params: the model without its parameters, and they as a flat tuple.
      dtype: of its parameters, and of pages unless the options say another.
      options: how attention is computed.
      rules: where parameters and pages lie.
      prefill_chunk: prompt tokens that each device reads in one step; the result does not depend on it.
      dense_below: prompt tokens at positions below it attend to all keys that they see; the model as released has 0.
      addresses: where the GPUs exchange tokens inside kernels, as `exchange_addresses` gives it.
    """

    def __init__(
        self,
        model: Keye,
        config: KeyeConfig,
        *,
        options: AttentionOptions = AttentionOptions(),  # noqa: B008 (frozen)
        prefill_chunk: int | None = None,
        dense_below: int = 0,
        rules: MeshRules | None = None,
    ):
        """Takes a model, whose parameters are put where the rules want them (`keye_jax.model.params.shard_params`).

        A model of shapes and dtypes in place of arrays can be compiled, not run.

        Args:
          prefill_chunk: what suits the device if left out.
          rules: all on one device if left out.

        Raises:
          UserError: the model cannot be computed with these options.
        """
        options.check(config)
        self.config, self.options, self.dense_below = config, options, dense_below
        self.rules = rules or MeshRules.single_device()
        self.prefill_chunk = prefill_chunk or PREFILL_CHUNK.get(self.rules.platform, _SMALL_PREFILL_CHUNK)
        self.dtype = model.decoder.embed_tokens.weight.dtype
        self.prefill_step, self.decode_step = StepSharding.prefill(self.rules), StepSharding.decode(self.rules)
        graph, state = nnx.split(shard_params(model, self.rules))
        arrays, tree = jax.tree.flatten(state)
        self.model_def, self.params = programs.model_def(graph, tree), tuple(arrays)
        # Shapes in place of arrays have a sharding where the arrays are going to be committed to one.
        committed = (x.sharding for x in arrays if not isinstance(x, jax.Array) or x.committed)
        self._device = next(committed, None) if self.rules.sharding() is None else None
        self.addresses = exchange_addresses(self.decode_step)
        # What many steps take, by its shape, so that it is on the devices once.
        self._idle_rows: dict[tuple[int, int], tuple[DecodeState, jax.Array, WideValues]] = {}
        self._no_vision: dict[int, jax.Array] = {}

    def put(self, array: np.ndarray, *dimensions: Axes) -> jax.Array:
        """An array on the devices, its dimensions split over these mesh axes, () for not at all.

        Every process of a job gives the same array; of a split one each looks at its own parts only.
        """
        sharding = self.placement(*dimensions)
        if sharding is None:
            # `jnp.asarray` compiles a program for each shape. `device_put` may share the host's memory: hence a copy.
            return jax.device_put(np.array(array))
        return jax.make_array_from_callback(array.shape, sharding, lambda part: np.array(array[part]))

    def placement(self, *dimensions: Axes) -> jax.sharding.Sharding | None:
        """Where an array lies whose dimensions are split over these mesh axes; None for the default device.

        Where there is no mesh, that is the device to which the parameters are committed, as those of Orbax are. A
        program is compiled once more if only some of its arguments are committed.
        """
        return self.rules.over(*dimensions) or self._device

    # Pages.

    @property
    def page_multiple(self) -> int:
        """A page table has a multiple of this number of columns: the shards that share a sequence's pages."""
        return self.decode_step.size(self.decode_step.cache_sequence)

    def table_width(self, tokens: int) -> int:
        """Columns of a page table for this number of tokens, with the room that lets similar sizes share programs."""
        return -(-pages_for(round_up(tokens)) // self.page_multiple) * self.page_multiple

    def new_pool(self, pages: int) -> PagePool:
        """A pool of at least this number of pages, equally many on each shard."""
        make = self.pool_maker(pages)
        if self.rules.sharding() is None:
            return make() if self._device is None else jax.jit(make, out_shardings=self._device)()
        return jax.jit(make, out_shardings=jax.eval_shape(make).shardings(self.rules))()

    def pool_maker(self, pages: int) -> Callable[[], PagePool]:
        """Makes the arrays of `new_pool`, wherever they lie."""
        shards = self.rules.size("batch") * self.page_multiple
        count = -(-pages // shards) * shards
        dtypes = {"indexer_dtype": self.options.indexer_dtype, "cache_dtype": self.options.cache_dtype}
        return lambda: PagePool.create(self.config, count, self.dtype, **dtypes)

    def new_cache(self, sequences: int, tokens: int) -> tuple[PagePool, np.ndarray]:
        """A pool with room for a number of sequences; each shard along `batch` is the home of an equal share, in order.

        Args:
          tokens: most tokens of each.

        Returns:
          the pool, and the pages of each sequence, int32 `[sequences, m]`.
        """
        pool, width = self.new_pool(self.cache_pages(sequences, tokens)), self.table_width(tokens)
        allocator = PageAllocator(pool.page_count, homes=self.rules.size("batch"), turns=self.page_multiple)
        per_home = -(-sequences // self.rules.size("batch"))
        return pool, np.stack([allocator.allocate(width, home=index // per_home) for index in range(sequences)])

    def cache_pages(self, sequences: int, tokens: int) -> int:
        """Pages of the pool that `new_cache` makes."""
        homes = self.rules.size("batch")
        return -(-sequences // homes) * homes * self.table_width(tokens)

    def take_pages(self, pool: PagePool, pages: Sequence[int]) -> PagePool:
        """The content of some pages, NumPy arrays, `PAGES_AT_ONCE` of them in one step of a fixed shape."""
        parts = []
        for first in range(0, len(pages), PAGES_AT_ONCE):
            part = np.asarray(pages[first : first + PAGES_AT_ONCE], np.int32)
            padded = np.pad(part, (0, PAGES_AT_ONCE - len(part)), mode="edge")
            parts.append(jax.tree.map(np.asarray, programs.take_pages(pool, self.put(padded), step=self.decode_step)))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(pages)], *parts)

    def put_pages(self, pool: PagePool, pages: Sequence[int], values: PagePool) -> PagePool:
        """The pool with the content of `take_pages` in some pages. The pool is donated."""
        for first in range(0, len(pages), PAGES_AT_ONCE):
            part = np.asarray(pages[first : first + PAGES_AT_ONCE], np.int32)
            rest = PAGES_AT_ONCE - len(part)
            jax.block_until_ready(pool)  # so that one part at a time is on its way
            padded = np.pad(part, (0, rest), constant_values=pool.page_count)
            content = jax.tree.map(
                lambda x, first=first, rest=rest: self.put(
                    np.pad(x[first : first + PAGES_AT_ONCE], ((0, rest), *((0, 0),) * (x.ndim - 1)))
                ),
                values,
            )
            pool = programs.put_pages(pool, self.put(padded), content, step=self.decode_step)
        return pool

    # Images.

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
        vision, step = self.config.vision_config, self.prefill_step
        flat = patches.reshape(len(patches), math.prod(patches.shape[1:]))
        normalisation = self.pixel_normalisation(scale, shift)
        width = self.config.hidden_size if project else vision.hidden_size
        merge = vision.spatial_merge_size**2 if project else 1
        embeds, done = [], 0
        for batch in batch_images(flat, grids, step.size(step.vision_patches)):
            encoded = self._encode_batch(batch, normalisation, project=project)
            tokens = batch.height * batch.width // merge
            embeds.append(encoded[: batch.images, :tokens].reshape(batch.images * tokens, width))
            done += batch.images * batch.height * batch.width
            if progress:
                progress(done, len(patches))
        return jnp.concatenate(embeds) if embeds else self.put(np.zeros((0, width), self.dtype))

    def encode_images(
        self, patches: np.ndarray, grid: np.ndarray, normalisation: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """Encodes images of one size in a step of a fixed shape.

        Args:
          patches: uint8 `[n * h * w, channels, patch, patch]` of at most `images_at_once` images.
          grid: int `[3]`: 1, height and width in patches.
          normalisation: what `pixel_normalisation` returned.

        Returns:
          `[images_at_once, padded patches / 4, embed]`; the first n images, and the first h * w / 4 tokens, count.
        """
        step = self.prefill_step
        batch = image_batch(
            patches.reshape(len(patches), math.prod(patches.shape[1:])), grid, step.size(step.vision_patches)
        )
        return self._encode_batch(batch, normalisation, project=True)

    def pixel_normalisation(self, scale: np.ndarray | float, shift: np.ndarray | float) -> tuple[jax.Array, jax.Array]:
        """Scale and shift of channels, float32 `[channels]`, on the devices, one value a feature of a patch."""
        vision = self.config.vision_config
        scale, shift = (np.broadcast_to(np.asarray(x, np.float32), vision.num_channels) for x in (scale, shift))
        return self.put(np.repeat(scale, vision.patch_size**2)), self.put(np.repeat(shift, vision.patch_size**2))

    def _encode_batch(
        self, batch: ImageBatch, normalisation: tuple[jax.Array, jax.Array], *, project: bool
    ) -> jax.Array:
        step = self.prefill_step
        sizes = np.tile(np.asarray([batch.height, batch.width], np.int32), (len(batch.patches), 1))
        return programs.encode(
            self.model_def,
            self.params,
            self.put(batch.patches, step.vision_patches),
            self.put(sizes, step.vision_patches),
            *normalisation,
            step=step,
            implementation=self.options.implementation,
            project=project,
        )

    # Prefill.

    def read_chunk(
        self, segments: Sequence[Segment], pool: PagePool, *, tokens: int, sequences: int = 1, table_width: int
    ) -> tuple[jax.Array, PagePool]:
        """Reads new tokens of one sequence, or of several, in a step of a fixed shape.

        Args:
          segments: each of at most `tokens` tokens. `vision_embeds` are those of its own pads, a NumPy array, in the
            order of the pads. A segment may need pages that another one writes.
          pool: donated.
          tokens: of each sequence in the shape, on all devices together.
          sequences: of the shape. More than 1 are read on one device only, and without `dense_below`.
          table_width: columns of the page table, of the shape.

        Returns:
          float32 `[sequences, vocab]` logits of each segment's last token, and the pool.
        """
        rows = pad_rows(segments, self.config)
        vision = self._pad_embeds(tokens * sequences, [segment.vision_embeds for segment in segments])
        shape = fixed_shape(tokens, sequences, table_width, self.prefill_step)
        below = self.dense_below if self.options.attention == "sparse" else 0
        assert not below or sequences == 1, "parts of several prompts that attend to all keys are not read together"
        cut, logits = int(np.clip(below - segments[0].start, 0, tokens)), None
        for first, end, dense in ((0, cut, True), (cut, tokens, False)):
            parts = [segment.part(first, end) for segment in segments]
            if not len(parts[0].input_ids):
                continue
            chunk = plan_chunk(parts, shape, self.prefill_step, pool.page_count)
            inputs = self._chunk_inputs(chunk, [row[first:end] for row in rows], vision)
            logits, pool = self._read(inputs, pool, dense=dense)
        assert logits is not None, "a segment has no tokens"
        return logits, pool

    def _chunk_inputs(
        self, chunk: Chunk, rows: Sequence[np.ndarray], vision: jax.Array
    ) -> tuple[jax.Array, jax.Array, BatchMetadata, jax.Array]:
        """See `programs.chunk_inputs`; `rows` are for `Chunk.pack`."""
        (tokens, others), step = chunk.pack(rows), self.prefill_step
        arrays = self.put(tokens, (), step.rows), self.put(others), vision
        return programs.chunk_inputs(self.model_def, self.params, *arrays, sequences=len(chunk.segments), step=step)

    def _read(
        self, inputs: tuple[jax.Array, jax.Array, BatchMetadata, jax.Array], pool: PagePool, *, dense: bool
    ) -> tuple[jax.Array, PagePool]:
        """Logits of each segment's last token in a chunk, and the pool, which is donated."""
        how: dict[str, Any] = {"step": self.prefill_step, "options": self.chunk_options(dense=dense)}
        return programs.prefill_chunk(self.model_def, self.params, *inputs, pool, **how)

    def _pad_embeds(self, tokens: int, embeds: Sequence[np.ndarray | jax.Array | None]) -> jax.Array:
        """Embeddings of pads in `[tokens, embed]`, with zeros behind them."""
        given = [each for each in embeds if each is not None and len(each)]
        if not given and tokens in self._no_vision:
            return self._no_vision[tokens]
        vision = np.zeros((tokens, self.config.hidden_size), self.dtype)
        if not given:
            return self._no_vision.setdefault(tokens, self.put(vision))
        vision[: sum(map(len, given))] = np.concatenate(given)
        return self.put(vision)

    def prefill(
        self, segments: Sequence[Segment], pool: PagePool, *, progress: Progress | None = None
    ) -> tuple[jax.Array, PagePool]:
        """Reads new tokens of one or several sequences into their pages.

        Args:
          segments: of different sequences; each has at least one token.
          pool: donated.
          progress: told the tokens done.

        Returns:
          float32 `[len(segments), vocab]` logits of each segment's last token, and the pool.
        """
        logits: list[jax.Array | None] = [None] * len(segments)
        total, done = sum(len(segment.input_ids) for segment in segments), 0
        chunks = self.chunks(segments, pool)
        chunk = next(chunks, None)
        while chunk:
            planned, inputs = chunk[0], chunk[1:]
            # Before this one is read: a loop whose end devices decide keeps this thread until they are there.
            chunk = next(chunks, None)
            found, pool = self._read(inputs, pool, dense=planned.dense)
            for member, (segment, upto) in enumerate(zip(planned.segments, planned.done, strict=False)):
                if upto == len(segments[segment].input_ids):
                    logits[segment] = found[member]
            done += int(planned.batch.count.sum())
            if progress:
                jax.block_until_ready(found)
                progress(done, total)
        assert all(each is not None for each in logits), "a segment has no tokens"
        return jnp.stack([each for each in logits if each is not None]), pool

    def forward_with_intermediates(
        self, segment: Segment, pool: PagePool
    ) -> Iterator[tuple[jax.Array, PagePool, tuple[LayerIntermediates, ...], int]]:
        """`prefill` of one segment that yields what each chunk computed.

        Yields:
          float32 `[tokens, vocab]` logits of a chunk's tokens, the pool, each layer's intermediates `[tokens, ...]`,
          and the tokens done so far.
        """
        for planned, x, positions, batch, _ in self.chunks([segment], pool):
            options = dataclasses.replace(self.chunk_options(dense=planned.dense), intermediates=True)
            logits, pool, found = programs.forward_with_intermediates(
                self.model_def, self.params, x, positions, batch, pool, step=self.prefill_step, options=options
            )
            there = planned.places()
            yield logits[there], pool, jax.tree.map(lambda x, there=there: x[there], found), planned.done[0]

    def chunks(
        self, segments: Sequence[Segment], pool: PagePool
    ) -> Iterator[tuple[Chunk, jax.Array, jax.Array, BatchMetadata, jax.Array]]:
        """Each chunk with its embeddings, positions, metadata and last tokens on the devices."""
        step = self.prefill_step
        rows, count = vision_rows(segments, self.config)
        embeds = [x for x in (segment.vision_embeds for segment in segments) if x is not None and len(x)]
        given = [x if isinstance(x, jax.Array) else self.put(x) for x in embeds]
        # At least one row, so that prompts of text alone can index it.
        padding = round_up(max(1, count)) - count
        if padding:
            given.append(self.put(np.zeros((padding, self.config.hidden_size), self.dtype)))
        # Those of one long video are as large as a layer's weights, and are not copied.
        vision = given[0] if len(given) == 1 else jnp.concatenate(given)
        dense_below = self.dense_below if self.options.attention == "sparse" else 0
        for chunk in plan_chunks(segments, self.prefill_chunk, step, pool.page_count, dense_below=dense_below):
            yield chunk, *self._chunk_inputs(chunk, rows, vision)

    def chunk_options(self, *, dense: bool) -> AttentionOptions:
        """The options of a step of prefill, which may be dense (`dense_below`)."""
        return dataclasses.replace(self.options, attention="dense") if dense else self.options

    # Decode.

    def new_state(self, rows: int, table_width: int, *, heat: bool = False) -> DecodeState:
        """A batch of idle rows, a multiple of the homes; row i is for a sequence of home `i // (rows / homes)`.

        Args:
          heat: whether steps of decode count the positions that they select.
        """
        assert rows % self.rules.size("batch") == 0, "each home has the same number of rows"
        row = idle_row(table_width, self.config.vocab_size, table_width * PAGE_SIZE if heat else 0)
        return jax.tree.map(lambda value: self.put(np.repeat(np.asarray(value)[None], rows, axis=0)), row)

    def set_row(self, state: DecodeState, row: int, **values: Any) -> DecodeState:
        """The state, which is donated, with a sequence in row `row`: `values` are arguments of `active_row`."""
        return programs.set_row(state, *self._put_row(state, row, values))

    def begin_row(
        self, logits: jax.Array, place: int, state: DecodeState, row: int, **values: Any
    ) -> tuple[DecodeState, jax.Array]:
        """`set_row`, and the row draws the first token of its answer; returns the state and `drawn` of this row alone.

        Args:
          logits: float32 `[n, vocab]`; those at `place` are of the prompt's last token, which is the row's token.
        """
        how: dict[str, Any] = {"step": self.decode_step, "implementation": self.options.implementation}
        return programs.begin_row(logits, state, *self._put_row(state, row, values, place), **how)

    def _put_row(
        self, state: DecodeState, row: int, values: Mapping[str, Any], place: int = 0
    ) -> tuple[jax.Array, WideValues]:
        """Arguments of `programs.set_row`."""

        def put(value: np.ndarray, idle: np.ndarray, there: jax.Array) -> jax.Array:
            return there if value is idle or np.array_equal(value, idle) else self.put(value)

        width, heat_tokens = state.page_table.shape[1], state.heat.shape[1]
        found = active_row(**values, table_width=width, heat_tokens=heat_tokens, vocab=self.config.vocab_size)
        idle, _, wide = self._idle_row(state)
        return self.put(pack_row(row, found, place)), jax.tree.map(put, wide_values(found), wide_values(idle), wide)

    def clear_rows(self, state: DecodeState, rows: Sequence[int]) -> DecodeState:
        """The state with some rows idle. The state is donated."""
        chosen = np.zeros(len(state.active), bool)
        chosen[list(rows)] = True
        _, packed, wide = self._idle_row(state)
        return programs.clear_rows(state, self.put(chosen), packed, wide)

    def set_pages(self, state: DecodeState, row: int, pages: np.ndarray) -> DecodeState:
        """The state with other pages, int32 `[n]`, of the sequence in row `row`. The state is donated."""
        row_and_table = np.zeros(1 + state.page_table.shape[1], np.int32)
        row_and_table[0], row_and_table[1 : 1 + len(pages)] = row, pages
        return programs.set_pages(state, self.put(row_and_table))

    def set_allowed(self, state: DecodeState, masks: Mapping[int, np.ndarray]) -> DecodeState:
        """The state in which some rows may draw other tokens than before. It is donated.

        Args:
          masks: uint32 `[ceil(vocab / 32)]` by row, as in `SamplingState`.
        """
        rows, words = np.zeros(len(state.active), bool), np.zeros(state.sampling.allowed.shape, np.uint32)
        for row, mask in masks.items():
            rows[row], words[row] = True, mask
        return programs.set_allowed(state, self.put(rows), self.put(words))

    def heat(self, state: DecodeState, row: int) -> jax.Array:
        """The heat of row `row`, int32 `[h]`, in an array that no step overwrites."""
        return programs.heat(state, self.put(np.asarray(row, np.int32)), step=self.decode_step)

    def _idle_row(self, state: DecodeState) -> tuple[DecodeState, jax.Array, WideValues]:
        """An idle row of a state's sizes: on the host, and on the devices as `pack_row` and `wide_values` give it."""
        sizes = state.page_table.shape[1], state.heat.shape[1]
        if sizes not in self._idle_rows:
            row = idle_row(sizes[0], self.config.vocab_size, sizes[1])
            self._idle_rows[sizes] = row, self.put(pack_row(0, row)), jax.tree.map(self.put, wide_values(row))
        return self._idle_rows[sizes]

    def drawn(self, state: DecodeState) -> jax.Array:
        """What the rows drew last, in an array that no step overwrites, for `unpack_drawn` of `programs`."""
        return programs.drawn(state, step=self.decode_step)

    def decode(self, state: DecodeState, pool: PagePool) -> tuple[jax.Array, DecodeState, PagePool]:
        """Reads the last token of each row.

        Args:
          state, pool: donated.

        Returns:
          float32 `[b, vocab]` logits of the next tokens, the state that `draw` takes next, and the pool.
        """
        inputs = self.model_def, self.params, self.addresses, state, pool
        return programs.decode(self.rules.platform)(*inputs, step=self.decode_step, options=self.options)

    def draw(self, logits: jax.Array, state: DecodeState) -> DecodeState:
        """The state, which is donated, after active rows have drawn their next token from `logits`, `[b, vocab]`."""
        return programs.draw(logits, state, step=self.decode_step, implementation=self.options.implementation)

    def decode_and_sample(self, state: DecodeState, pool: PagePool) -> tuple[DecodeState, PagePool]:
        """`decode` and `draw` in one program, for which both are donated."""
        inputs = self.model_def, self.params, self.addresses, state, pool
        return programs.decode_and_sample(self.rules.platform)(*inputs, step=self.decode_step, options=self.options)
