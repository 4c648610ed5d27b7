"""A model ready to run: encoding images, prefill of prompts, decode token by token.

The runtime owns no pages. Its caller makes a pool, says which pages a sequence holds, and gives the pool to each step,
which gives it back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import BatchMetadata, PageAllocator, PagePool, pages_for
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.decoder import LayerIntermediates
from keye_jax.model.keye import Keye
from keye_jax.model.params import shard_params
from keye_jax.progress import Progress
from keye_jax.runtime import programs
from keye_jax.runtime.encode import batch_images
from keye_jax.runtime.prefill import (
    Chunk,
    ChunkShape,
    Segment,
    packed_shape,
    plan_chunks,
    round_up,
    single_shape,
    vision_rows,
)
from keye_jax.runtime.programs import DecodeState
from keye_jax.runtime.sampling import SamplingParams, sampling_row
from keye_jax.sharding.collectives import Axes
from keye_jax.sharding.mesh_rules import MeshRules
from keye_jax.sharding.step import StepSharding

PREFILL_CHUNK = {"gpu": 8192}
_SMALL_PREFILL_CHUNK = 1024
"""Prompt tokens read in one step: with 8,192, each of 128 experts has rows enough to keep a GPU's tensor cores busy."""


class Runtime:
    """A model ready to run.

    Attributes:
      config: its configuration.
      dtype: of its parameters and pages.
      options: how attention is computed.
      rules: where parameters and pages lie.
      prefill_chunk: prompt tokens that each device reads in one step; the result does not depend on it.
      dense_below: prompt tokens at positions below it attend to all keys that they see; the model as released has 0.
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
        """
        self.config, self.options, self.dense_below = config, options, dense_below
        self.rules = rules or MeshRules.single_device()
        self.prefill_chunk = prefill_chunk or PREFILL_CHUNK.get(self.rules.platform, _SMALL_PREFILL_CHUNK)
        self.dtype = model.decoder.embed_tokens.weight.dtype
        self.prefill_step, self.decode_step = StepSharding.prefill(self.rules), StepSharding.decode(self.rules)
        graph, state = nnx.split(shard_params(model, self.rules))
        arrays, tree = jax.tree.flatten(state)
        self._model, self._params = programs.model_def(graph, tree), tuple(arrays)

    def put(self, array: np.ndarray, *dimensions: Axes) -> jax.Array:
        """An array on the devices, its dimensions split over these mesh axes, () for not at all.

        Every process of a job gives the same array; of a split one each looks at its own parts only.
        """
        sharding = self.rules.over(*dimensions)
        if sharding is None:
            return jnp.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

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
        make, shardings = self._pool_maker(pages)
        return make() if self.rules.sharding() is None else jax.jit(make, out_shardings=shardings)()

    def new_cache(self, sequences: int, tokens: int) -> tuple[PagePool, np.ndarray]:
        """A pool with room for a number of sequences; each shard along `batch` is the home of an equal share, in order.

        Args:
          tokens: most tokens of each.

        Returns:
          the pool, and the pages of each sequence, int32 `[sequences, m]`.
        """
        width, homes = self.table_width(tokens), self.rules.size("batch")
        pool = self.new_pool(-(-sequences // homes) * homes * width)
        allocator = PageAllocator(pool.page_count, self.rules)
        per_home = -(-sequences // homes)
        return pool, np.stack([allocator.allocate(width, home=index // per_home) for index in range(sequences)])

    def _pool_maker(self, pages: int) -> tuple[Callable[[], PagePool], Any]:
        shards = self.rules.size("batch") * self.page_multiple
        count = -(-pages // shards) * shards

        def make() -> PagePool:
            return PagePool.create(self.config, count, self.dtype, indexer_dtype=self.options.indexer_dtype)

        return make, jax.eval_shape(make).shardings(self.rules)

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
        vision = self.config.vision_config
        pixels = vision.patch_size**2
        flat = patches.reshape(len(patches), vision.num_channels * pixels)
        scale_of, shift_of = (
            self.put(np.repeat(np.broadcast_to(np.asarray(x, np.float32), vision.num_channels), pixels))
            for x in (scale, shift)
        )
        width = self.config.hidden_size if project else vision.hidden_size
        merge = vision.spatial_merge_size**2 if project else 1
        step = self.prefill_step
        embeds, done = [], 0
        for batch in batch_images(flat, grids, step.size(step.vision_patches)):
            sizes = np.tile(np.asarray([batch.height, batch.width], np.int32), (len(batch.patches), 1))
            encoded = programs.encode(
                self._model,
                self._params,
                self.put(batch.patches, step.vision_patches),
                self.put(sizes, step.vision_patches),
                scale_of,
                shift_of,
                step=step,
                implementation=self.options.implementation,
                project=project,
            )
            tokens = batch.height * batch.width // merge
            embeds.append(encoded[: batch.images, :tokens].reshape(batch.images * tokens, width))
            done += batch.images * batch.height * batch.width
            if progress:
                progress(done, len(patches))
        return jnp.concatenate(embeds) if embeds else self.put(np.zeros((0, width), self.dtype))

    # Prefill.

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
        chunks = self._chunks(segments, pool)
        chunk = next(chunks, None)
        while chunk:
            planned, x, positions, batch = chunk
            # Before this one is read: a loop whose end devices decide keeps this thread until they are there.
            chunk = next(chunks, None)
            found, pool = programs.prefill_chunk(
                self._model,
                self._params,
                x,
                positions,
                batch,
                self.put(planned.last),
                pool,
                step=self.prefill_step,
                options=self._chunk_options(planned.dense),
            )
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
        options = dataclasses.replace(self._chunk_options(dense=False), intermediates=True)
        for planned, x, positions, batch in self._chunks([segment], pool):
            logits, pool, found = programs.forward_with_intermediates(
                self._model, self._params, x, positions, batch, pool, step=self.prefill_step, options=options
            )
            # The tokens that there are, in their order.
            rows, columns = np.nonzero(np.arange(planned.ids.shape[1]) < planned.batch.count[:, None])
            order = np.argsort(planned.token[rows, columns])
            there = rows[order], columns[order]
            yield logits[there], pool, jax.tree.map(lambda x, there=there: x[there], found), planned.done[0]

    def _chunks(
        self, segments: Sequence[Segment], pool: PagePool
    ) -> Iterator[tuple[Chunk, jax.Array, jax.Array, BatchMetadata]]:
        """Each chunk with its embeddings, positions and metadata on the devices."""
        step = self.prefill_step
        embeds, index, before = [], [], 0
        for segment in segments:
            found = vision_rows(segment.input_ids, self.config)
            count = 0 if segment.vision_embeds is None else len(segment.vision_embeds)
            if count != np.count_nonzero(found >= 0):
                raise ValueError(f"{count} vision embeddings for {np.count_nonzero(found >= 0)} pads")
            if segment.vision_embeds is not None:
                given = segment.vision_embeds
                embeds.append(given if isinstance(given, jax.Array) else self.put(given))
            index.append(np.where(found >= 0, found + before, -1).astype(np.int32))
            before += count
        # At least one row, so that prompts of text alone can index it.
        vision = jnp.concatenate(embeds) if before else self.put(np.zeros((0, self.config.hidden_size), self.dtype))
        vision = jnp.pad(vision, ((0, round_up(max(1, before)) - before), (0, 0)))
        dense_below = self.dense_below if self.options.attention == "sparse" else 0
        for chunk in plan_chunks(segments, self.prefill_chunk, step, pool.page_count, dense_below=dense_below):
            rows = chunk.batch.sequence if chunk.batch.sequence is not None else np.zeros(1, np.int32)
            seen = np.full(chunk.ids.shape, -1, np.int32)
            for row, member in enumerate(rows):
                there = slice(0, chunk.batch.count[row])
                seen[row, there] = index[chunk.segments[member]][chunk.token[row, there]]
            ids, seen = self.put(chunk.ids, step.rows), self.put(seen, step.rows)
            x = programs.embed(self._model, self._params, ids, vision, seen, step=step)
            yield chunk, x, self.put(chunk.positions, (), step.rows), jax.tree.map(self.put, chunk.batch)

    def _chunk_options(self, dense: bool) -> AttentionOptions:
        return dataclasses.replace(self.options, attention="dense") if dense else self.options

    # Decode.

    def new_state(self, rows: int, table_width: int) -> DecodeState:
        """A batch of idle rows, a multiple of the homes; row i is for a sequence of home `i // (rows / homes)`."""
        homes = self.rules.size("batch")
        assert rows % homes == 0, "each home has the same number of rows"
        one = self._row_values(0, 0, 0, np.zeros(0, np.int32), table_width, SamplingParams(), active=False)
        return jax.tree.map(lambda value: self.put(np.repeat(np.asarray(value)[None], rows, axis=0)), one)

    def set_row(
        self,
        state: DecodeState,
        row: int,
        *,
        token: int,
        length: int,
        position_delta: int,
        pages: np.ndarray,
        sampling: SamplingParams,
        **kwargs: Any,
    ) -> DecodeState:
        """The state with a sequence in row `row`.

        Args:
          state: donated.
          token: the last token of the sequence, not yet in its pages.
          length: tokens that its pages hold.
          position_delta: how far a token's position is ahead of its index.
          pages: int32 `[m]`, no more than the state's page tables have columns.
          sampling: how its tokens are drawn.
          kwargs: `prompt`, `answer`, `bias` and `allowed` of `sampling_row`.
        """
        width = state.page_table.shape[1]
        values = self._row_values(token, length, position_delta, pages, width, sampling, active=True, **kwargs)
        return programs.set_row(state, self.put(np.asarray(row, np.int32)), jax.tree.map(self._put_value, values))

    def clear_row(self, state: DecodeState, row: int) -> DecodeState:
        """The state with row `row` idle. The state is donated."""
        width = state.page_table.shape[1]
        values = self._row_values(0, 0, 0, np.zeros(0, np.int32), width, SamplingParams(), active=False)
        return programs.set_row(state, self.put(np.asarray(row, np.int32)), jax.tree.map(self._put_value, values))

    def _put_value(self, value: Any) -> jax.Array:
        return self.put(np.asarray(value))

    def _row_values(
        self,
        token: int,
        length: int,
        position_delta: int,
        pages: np.ndarray,
        table_width: int,
        sampling: SamplingParams,
        *,
        active: bool,
        **kwargs: Any,
    ) -> Any:
        """A `DecodeState` of one row, NumPy arrays without the batch dimension."""
        table = np.zeros(table_width, np.int32)
        table[: len(pages)] = pages
        values: dict[str, Any] = {
            "tokens": np.int32(token),
            "lengths": np.int32(length),
            "position_delta": np.int32(position_delta),
            "active": np.bool_(active),
            "page_table": table,
        }
        return DecodeState(**values, sampling=sampling_row(sampling, self.config.vocab_size, **kwargs))

    def decode(self, state: DecodeState, pool: PagePool) -> tuple[jax.Array, PagePool]:
        """Reads the last token of each row.

        Args:
          pool: donated.

        Returns:
          float32 `[b, vocab]` logits of the next tokens, and the pool. `draw` makes the next state of them.
        """
        run = programs.decode(self.rules.platform)
        return run(self._model, self._params, state, pool, step=self.decode_step, options=self.options)

    def draw(self, logits: jax.Array, state: DecodeState, rows: jax.Array | None = None) -> DecodeState:
        """The state after some rows have drawn their next token from `logits` (float32 `[b, vocab]`).

        After prefill it makes the first token of an answer: `set_row` with the prompt's last token, then draw.

        Args:
          state: donated.
          rows: bool `[b]`; all active ones if left out.
        """
        return programs.draw(logits, state, jnp.copy(state.active) if rows is None else rows, step=self.decode_step)

    def decode_and_sample(self, state: DecodeState, pool: PagePool) -> tuple[DecodeState, PagePool]:
        """`decode` and `draw` in one program, for which both are donated."""
        run = programs.decode_and_sample(self.rules.platform)
        return run(self._model, self._params, state, pool, step=self.decode_step, options=self.options)

    # Programs, traced and compiled from shapes alone.

    def prefill_programs(self, tokens: int, *, pages: int | None = None) -> list[jax.stages.Traced]:
        """The programs that `prefill` runs for one prompt of this length.

        Args:
          pages: of the pool; those of `new_cache` for one such sequence if left out.
        """
        width = self.table_width(tokens)
        dense = min(self.dense_below, tokens) if self.options.attention == "sparse" else 0
        lengths = {part: length for part, length in ((True, dense), (False, tokens - dense)) if length}
        return [
            self._chunk_program(
                dataclasses.replace(single_shape(length, width, self.prefill_chunk, self.prefill_step), dense=part),
                pages,
            )
            for part, length in lengths.items()
        ]

    def _chunk_program(
        self, shape: ChunkShape, pages: int | None = None, *, intermediates: bool = False
    ) -> jax.stages.Traced:
        step, integers = self.prefill_step, jnp.int32
        x = self._shape((shape.rows, shape.tokens, self.config.hidden_size), self.dtype, step.rows)
        positions = self._shape((3, shape.rows, shape.tokens), integers, (), step.rows)
        per_row: Any = self._shape((shape.rows,), integers)
        table: Any = self._shape((shape.sequences, shape.table_width), integers)
        batch = BatchMetadata(table, per_row, per_row, None if shape.rows == 1 else per_row)
        pool = self._pool_shape(pages or shape.table_width * self.rules.size("batch"))
        options = self._chunk_options(shape.dense)
        arguments: Any = self._model, self._params, x, positions, batch
        if intermediates:
            options = dataclasses.replace(options, intermediates=True)
            return programs.forward_with_intermediates.trace(*arguments, pool, step=step, options=options)
        last = self._shape((shape.sequences,), integers)
        return programs.prefill_chunk.trace(*arguments, last, pool, step=step, options=options)

    def decode_program(
        self, rows: int, tokens: int, *, sample: bool = True, pages: int | None = None
    ) -> jax.stages.Traced:
        """The program of `decode_and_sample`, or of `decode`, for a number of rows with room for `tokens` each.

        Args:
          pages: of the pool; just those of these rows if left out.
        """
        width = self.table_width(tokens)
        one = self._row_values(0, 0, 0, np.zeros(0, np.int32), width, SamplingParams(), active=False)
        state = jax.tree.map(lambda x: self._shape((rows, *np.shape(x)), np.asarray(x).dtype), one)
        program = (programs.decode_and_sample if sample else programs.decode)(self.rules.platform)
        pool = self._pool_shape(pages or rows * width)
        return program.trace(self._model, self._params, state, pool, step=self.decode_step, options=self.options)

    def compile_prefill(self, tokens: int) -> int:
        """Compiles the programs of `prefill_programs`.

        Returns:
          the most bytes that a step needs beyond its arguments and results, on each device.
        """
        return max(_workspace(program) for program in self.prefill_programs(tokens))

    def compile_packed_prefill(self, tokens: int) -> int:
        """Compiles the program that packs prompts of at most this length; returns what `compile_prefill` does."""
        shape = packed_shape(self.table_width(tokens), self.prefill_chunk, self.prefill_step)
        return _workspace(self._chunk_program(shape))

    def compile_forward_with_intermediates(self, tokens: int, cached: int) -> int:
        """Compiles the program that reads `tokens` tokens in one chunk; returns what `compile_prefill` does.

        Args:
          cached: tokens that the pool is made for.
        """
        width = self.table_width(cached)
        shape = single_shape(tokens, width, self.prefill_chunk, self.prefill_step)
        return _workspace(self._chunk_program(shape, intermediates=True))

    def compile_decode(self, rows: int, tokens: int) -> int:
        """Compiles the program of `decode_and_sample`; returns what `compile_prefill` does."""
        return _workspace(self.decode_program(rows, tokens))

    def _shape(self, shape: tuple[int, ...], dtype: Any, *dimensions: Axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.rules.over(*dimensions))

    def _pool_shape(self, pages: int) -> PagePool:
        make, shardings = self._pool_maker(pages)
        pool = jax.eval_shape(make)
        if self.rules.sharding() is None:
            return pool
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), pool, shardings
        )


def _workspace(program: jax.stages.Traced) -> int:
    analysis = program.lower().compile().memory_analysis()
    return analysis.temp_size_in_bytes if analysis else 0
