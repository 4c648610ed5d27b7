"""Which programs an engine runs."""

from __future__ import annotations

from collections.abc import Iterable

import jax

from keye_jax.engine.plan import PROGRAMS, Program, SchedulerConfig
from keye_jax.processor import Processor, PromptPlan
from keye_jax.runtime import lowering
from keye_jax.runtime.encode import ENCODE_PATCHES, IMAGE_PATCHES, padded_patches
from keye_jax.runtime.runtime import Runtime


def most_patches(runtime: Runtime, processor: Processor) -> int:
    """Patches of the largest image that an engine encodes."""
    most = processor.media.most_pixels // runtime.config.vision_config.patch_size**2
    # On a CPU a larger image takes minutes.
    return min(most, ENCODE_PATCHES) if runtime.rules.platform == "cpu" else most


def image_sizes(most: int) -> list[int]:
    """The sizes to which images of up to `most` patches are padded."""
    return [size for size in IMAGE_PATCHES if size <= padded_patches(most)]


def engine_programs(
    runtime: Runtime,
    config: SchedulerConfig,
    normalisation: tuple[jax.Array, jax.Array],
    *,
    images: Iterable[int],
    chunks: Iterable[Program] = PROGRAMS,
    heat: bool = False,
    grammars: bool = True,
) -> list[jax.stages.Traced]:
    """The large programs of an engine with this scheduler; other arguments as for `lowering.engine_programs`."""
    return lowering.engine_programs(
        runtime,
        rows=config.rows,
        pages=config.pages_per_shard * config.homes * config.turns,
        table_width=config.table_width,
        chunks=[config.chunk_shape(program) for program in chunks],
        images=list(images),
        normalisation=normalisation,
        heat=heat,
        grammars=grammars,
    )


def programs_for(
    prompt: PromptPlan, runtime: Runtime, config: SchedulerConfig, normalisation: tuple[jax.Array, jax.Array]
) -> list[jax.stages.Traced]:
    """Those of `engine_programs` that answering one prompt takes."""
    tokens = [image.num_tokens for image in prompt.images] + [video.tokens_per_frame for video in prompt.videos]
    sizes = sorted({padded_patches(4 * each) for each in tokens})  # a token stands for 2 x 2 patches
    large, rest = divmod(prompt.num_tokens, config.large)
    some: dict[Program, int] = {"large": large, "small": rest}
    chunks: list[Program] = [program for program in PROGRAMS if some[program]]
    return engine_programs(runtime, config, normalisation, images=sizes, chunks=chunks, grammars=False)
