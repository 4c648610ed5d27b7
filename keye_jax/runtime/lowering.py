"""The programs of a runtime from shapes alone: traced, compiled and sized without an array."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.kv_cache import BatchMetadata, PagePool
from keye_jax.page_allocator import PAGE_SIZE
from keye_jax.progress import Progress
from keye_jax.runtime import programs
from keye_jax.runtime.decode import idle_row, pack_row, wide_values
from keye_jax.runtime.encode import images_at_once
from keye_jax.runtime.prefill import ChunkShape, fixed_shape, packed_shape, single_shape
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding.collectives import Axes


def prefill_programs(runtime: Runtime, tokens: int, *, pages: int | None = None) -> list[jax.stages.Traced]:
    """The programs that `Runtime.prefill` runs for one prompt of this length.

    Args:
      pages: of the pool; those of `Runtime.new_cache` for one such sequence if left out.
    """
    width = runtime.table_width(tokens)
    dense = min(runtime.dense_below, tokens) if runtime.options.attention == "sparse" else 0
    lengths = {part: length for part, length in ((True, dense), (False, tokens - dense)) if length}
    shapes = (
        dataclasses.replace(single_shape(length, width, runtime.prefill_chunk, runtime.prefill_step), dense=part)
        for part, length in lengths.items()
    )
    return [_chunk_program(runtime, shape, pages) for shape in shapes]


def packed_program(runtime: Runtime, sequences: int, tokens: int) -> jax.stages.Traced:
    """The program that packs a number of prompts, shorter than a chunk, in the pool of `Runtime.new_cache` for them."""
    shape = packed_shape(runtime.table_width(tokens), runtime.prefill_chunk, runtime.prefill_step)
    return _chunk_program(runtime, shape, runtime.cache_pages(sequences, tokens))


def intermediates_program(runtime: Runtime, tokens: int, cached: int) -> jax.stages.Traced:
    """The program of `Runtime.forward_with_intermediates` for one chunk, in a pool for `cached` tokens."""
    shape = single_shape(tokens, runtime.table_width(cached), runtime.prefill_chunk, runtime.prefill_step)
    return _chunk_program(runtime, shape, intermediates=True)


def decode_program(
    runtime: Runtime, rows: int, tokens: int, *, sample: bool = True, pages: int | None = None
) -> jax.stages.Traced:
    """The program of `Runtime.decode_and_sample`, or without `sample` that of `Runtime.decode`.

    Args:
      rows: of the batch.
      tokens: that each row has room for.
      pages: of the pool; just those of these rows if left out.
    """
    width = runtime.table_width(tokens)
    return _decode_program(runtime, rows, width, pages or rows * width, sample=sample)


def _decode_program(
    runtime: Runtime, rows: int, width: int, pages: int, *, sample: bool = True, heat: bool = False
) -> jax.stages.Traced:
    program = (programs.decode_and_sample if sample else programs.decode)(runtime.rules.platform)
    pool = _pool_shape(runtime, pages)
    state = _state_shape(runtime, rows, width, heat)
    arguments: Any = runtime.model_def, runtime.params, runtime.addresses, state, pool
    return program.trace(*arguments, step=runtime.decode_step, options=runtime.options)


def engine_programs(
    runtime: Runtime,
    *,
    rows: int,
    pages: int,
    table_width: int,
    chunks: Sequence[tuple[int, int]],
    images: Sequence[int],
    normalisation: tuple[jax.Array, jax.Array],
    heat: bool = False,
    grammars: bool = True,
) -> list[jax.stages.Traced]:
    """The large programs of an engine: `decode_and_sample`, `decode`, `draw`, `begin_row`, `read_chunk` and
    `encode_images`.

    Args:
      rows: of the batch.
      pages: of the pool.
      table_width: columns of page tables.
      chunks: tokens and sequences of the shapes in which `read_chunk` reads.
      images: patches that images are padded to.
      normalisation: what `Runtime.pixel_normalisation` returned.
      heat: as for `Runtime.new_state`.
      grammars: whether rows may have one, which takes `decode` and `draw`.
    """
    sparse = runtime.options.attention == "sparse"
    shapes = [
        dataclasses.replace(fixed_shape(tokens, sequences, table_width, runtime.prefill_step), dense=dense)
        for tokens, sequences in chunks
        for dense in ((True, False) if sparse and runtime.dense_below else (False,))
    ]
    with_grammars = [
        _decode_program(runtime, rows, table_width, pages, sample=False, heat=heat),
        _draw_program(runtime, rows, table_width, heat),
    ]
    return [
        _decode_program(runtime, rows, table_width, pages, heat=heat),
        *(with_grammars if grammars else ()),
        *(_begin_program(runtime, rows, table_width, heat, count) for count in sorted({count for _, count in chunks})),
        *(_chunk_program(runtime, shape, pages) for shape in shapes),
        *(_encode_program(runtime, patches, normalisation) for patches in images),
    ]


def compile_side_by_side(traced: Sequence[jax.stages.Traced], progress: Progress = lambda done, total: None) -> None:
    """Compiles programs, which are then there for calls of the same shapes.

    Processes of one job must compile in the same order, so they do it one after the other.

    Args:
      progress: told the programs done.
    """
    # In order: Mosaic GPU numbers the kernels that it lowers, and their names are part of the persistent cache's keys.
    lowered = [program.lower() for program in traced]
    with ThreadPoolExecutor(1 if jax.process_count() > 1 else None) as pool:
        for done, _ in enumerate(pool.map(lambda program: program.compile(), lowered), 1):
            progress(done, len(traced))


def _draw_program(runtime: Runtime, rows: int, width: int, heat: bool) -> jax.stages.Traced:
    logits: Any = _shape(runtime, (rows, runtime.config.vocab_size), jnp.float32)
    state = _state_shape(runtime, rows, width, heat)
    return programs.draw.trace(logits, state, step=runtime.decode_step, implementation=runtime.options.implementation)


def _begin_program(runtime: Runtime, rows: int, width: int, heat: bool, sequences: int) -> jax.stages.Traced:
    row = idle_row(width, runtime.config.vocab_size, width * PAGE_SIZE if heat else 0)
    packed, wide = jax.tree.map(lambda x: _shape(runtime, x.shape, x.dtype), (pack_row(0, row), wide_values(row)))
    logits: Any = _shape(runtime, (sequences, runtime.config.vocab_size), jnp.float32)
    how: dict[str, Any] = {"step": runtime.decode_step, "implementation": runtime.options.implementation}
    return programs.begin_row.trace(logits, _state_shape(runtime, rows, width, heat), packed, wide, **how)


def workspace_bytes(traced: Iterable[jax.stages.Traced]) -> int:
    """Compiles programs; returns the most bytes that one needs beyond its arguments and results, on each device."""
    found = (program.lower().compile().memory_analysis() for program in traced)
    return max(analysis.temp_size_in_bytes if analysis else 0 for analysis in found)


def _chunk_program(
    runtime: Runtime, shape: ChunkShape, pages: int | None = None, *, intermediates: bool = False
) -> jax.stages.Traced:
    step, integers = runtime.prefill_step, jnp.int32
    x = _shape(runtime, (shape.rows, shape.tokens, runtime.config.hidden_size), runtime.dtype, step.rows)
    positions = _shape(runtime, (3, shape.rows, shape.tokens), integers, (), step.rows)
    per_row: Any = _shape(runtime, (shape.rows,), integers)
    table: Any = _shape(runtime, (shape.sequences, shape.table_width), integers)
    batch = BatchMetadata(table, per_row, per_row, None if shape.rows == 1 else per_row)
    pool = _pool_shape(runtime, pages or shape.table_width * runtime.rules.size("batch"))
    options = runtime.chunk_options(dense=shape.dense)
    arguments: Any = runtime.model_def, runtime.params, x, positions, batch
    if intermediates:
        options = dataclasses.replace(options, intermediates=True)
        return programs.forward_with_intermediates.trace(*arguments, pool, step=step, options=options)
    last = _shape(runtime, (shape.sequences,), integers)
    return programs.prefill_chunk.trace(*arguments, last, pool, step=step, options=options)


def _encode_program(runtime: Runtime, patches: int, normalisation: tuple[jax.Array, jax.Array]) -> jax.stages.Traced:
    step, vision = runtime.prefill_step, runtime.config.vision_config
    images = images_at_once(patches, step.size(step.vision_patches))
    features = vision.num_channels * vision.patch_size**2
    return programs.encode.trace(
        runtime.model_def,
        runtime.params,
        _shape(runtime, (images, patches, features), jnp.uint8, step.vision_patches),
        _shape(runtime, (images, 2), jnp.int32, step.vision_patches),
        *normalisation,
        step=step,
        implementation=runtime.options.implementation,
        project=True,
    )


def _shape(runtime: Runtime, shape: tuple[int, ...], dtype: Any, *dimensions: Axes) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=runtime.placement(*dimensions))


def _state_shape(runtime: Runtime, rows: int, width: int, heat: bool) -> Any:
    row = idle_row(width, runtime.config.vocab_size, width * PAGE_SIZE if heat else 0)
    return jax.tree.map(lambda x: _shape(runtime, (rows, *np.shape(x)), np.asarray(x).dtype), row)


def _pool_shape(runtime: Runtime, pages: int) -> PagePool:
    pool = jax.eval_shape(runtime.pool_maker(pages))
    if runtime.rules.sharding() is None:
        return jax.tree.map(lambda x: _shape(runtime, x.shape, x.dtype), pool)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        pool,
        pool.shardings(runtime.rules),
    )
