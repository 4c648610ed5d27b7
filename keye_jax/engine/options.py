"""How an engine shares the devices out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from keye_jax.engine.memory import pages_per_shard
from keye_jax.engine.plan import SchedulerConfig
from keye_jax.errors import UserError
from keye_jax.page_allocator import PAGE_SIZE
from keye_jax.runtime.prefill import round_up
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding import MeshRules


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How an engine shares the devices out.

    Attributes:
      rows: sequences that are decoded together.
      cache_tokens: tokens that the page pool holds, of all sequences together; what the devices have room for if left
        out (`keye_jax.engine.memory`).
      max_context: most tokens of a sequence; what the model's positions allow if left out.
      small_chunk: tokens of a small chunk of a prompt, and of a block of the prefix cache.
      prompts_together: most small chunks that one step reads, at most `prefill_chunk / small_chunk`; 1 on several
        devices and with `dense_below`. More than 1 suits jobs of many short prompts: experts are read once for all of
        them. A short prompt that is alone takes longer, since the step has the same shape.
      chunks_between, decodes_between, target_gap_ms, optimistic, prefix_cache: as in `SchedulerConfig`.
      media_workers: processes that decode media; 0 for a thread of this process, where a crash is not contained.
      media_bytes: shared memory for decoded frames that are not encoded yet.
      media_timeout: seconds that a plan, or a piece of a video, may take.
      frame_cache: directory for decoded frames; None for none.
      frame_cache_bytes: most bytes of it.
      embedding_cache_bytes: most bytes of embeddings of media that are kept in host memory.
      selection_heat: whether requests may ask what their answers looked at. Each row then counts that on the devices:
        four bytes for each token of `max_context`.

    Raises:
      UserError: a number is not allowed. `scheduler_config` checks those of the scheduler and of the pool.
    """

    rows: int = 8
    cache_tokens: int | None = None
    max_context: int | None = None
    small_chunk: int = 512
    prompts_together: int = 1
    chunks_between: int = 1
    decodes_between: int = 1
    target_gap_ms: float | None = None
    optimistic: bool = False
    prefix_cache: bool = True
    media_workers: int = 2
    media_bytes: int = 1 << 30
    media_timeout: float = 300.0
    frame_cache: Path | None = None
    frame_cache_bytes: int = 32 << 30
    embedding_cache_bytes: int = 2 << 30
    selection_heat: bool = False

    def __post_init__(self) -> None:
        least = {"media_workers": 0, "media_bytes": 1, "frame_cache_bytes": 0, "embedding_cache_bytes": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {number}")
        if not self.media_timeout > 0:
            raise UserError(f"media_timeout is {self.media_timeout}; it must be above 0")


def options_for_one(rules: MeshRules, tokens: int) -> EngineOptions:
    """Options of an engine that answers one request, with just the pages that it needs.

    Args:
      rules: how the model lies over devices.
      tokens: of the prompt and the answer.
    """
    homes = rules.size("batch")
    return EngineOptions(
        rows=homes,
        cache_tokens=homes * round_up(tokens),
        prefix_cache=False,
        media_workers=0,
        embedding_cache_bytes=0,
    )


def scheduler_config(runtime: Runtime, options: EngineOptions, most_patches: int) -> SchedulerConfig:
    """The scheduler's settings for a model and options.

    Args:
      most_patches: of the largest image that is going to be encoded.

    Raises:
      UserError: an option is not allowed, or the page pool does not fit into the devices' memory.
    """
    homes, turns = runtime.rules.size("batch"), runtime.page_multiple
    devices = runtime.prefill_step.size(runtime.prefill_step.query_sequence)
    positions = runtime.config.max_position_embeddings
    if options.selection_heat and runtime.options.attention == "dense":
        raise UserError("selection_heat is True; it must be False with dense attention, which selects nothing")
    if options.max_context is not None and not 1 <= options.max_context <= positions:
        raise UserError(f"max_context is {options.max_context}; it must be from 1 to {positions}")
    chunk = runtime.prefill_chunk * devices
    # A small chunk is no larger than what a step reads, but at least a page.
    small = min(options.small_chunk, max(PAGE_SIZE, chunk // PAGE_SIZE * PAGE_SIZE))
    large = max(small, chunk // small * small)
    if options.prompts_together > 1 and (runtime.rules.devices > 1 or runtime.dense_below):
        together = f"prompts_together is {options.prompts_together}"
        raise UserError(f"{together}; it must be 1 on several devices, and where prompts are dense below a position")
    context = options.max_context or positions
    pages = pages_per_shard(
        runtime,
        options.cache_tokens,
        rows=options.rows,
        max_context=context,
        large=large,
        most_patches=most_patches,
        optimistic=options.optimistic,
        heat=options.selection_heat,
    )
    return SchedulerConfig(
        rows=options.rows,
        pages_per_shard=pages,
        max_context=context,
        homes=homes,
        turns=turns,
        large=large,
        small=small,
        prompts_together=options.prompts_together,
        chunks_between=options.chunks_between,
        decodes_between=options.decodes_between,
        target_gap_ms=options.target_gap_ms,
        optimistic=options.optimistic,
        prefix_cache=options.prefix_cache,
    )
