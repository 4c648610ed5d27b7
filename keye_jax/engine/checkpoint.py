"""From a checkpoint's directory to what an engine needs of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from convert import abstract_params, buckets, kind_of, load_params
from convert.detect import read_config
from keye_jax.config import KeyeConfig
from keye_jax.engine.compilation import engine_programs, image_sizes, most_patches, programs_for
from keye_jax.engine.generation_config import GenerationDefaults
from keye_jax.engine.options import EngineOptions, scheduler_config
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.model.params import parameter_shardings
from keye_jax.processor import Processor, PromptPlan
from keye_jax.processor.guard import MediaGuard
from keye_jax.runtime.lowering import compile_side_by_side
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding import MeshRules

_log = logging.getLogger(__name__)


def read_checkpoint(
    directory: str | Path,
    *,
    allow_remote: bool = False,
    allow_files: bool = True,
    media: Mapping[str, Any] | None = None,
    guard: MediaGuard | None = None,
) -> tuple[KeyeConfig, Processor, GenerationDefaults]:
    """Reads all of a checkpoint but its weights.

    Args:
      directory: safetensors or Orbax, or the URL of one of them in a bucket.
      allow_remote, allow_files, guard: as for `Processor`.
      media: options of media that hold where a request sets none, `Processor`'s `defaults`.

    Raises:
      UserError: the checkpoint is not whole, or a value is not allowed.
    """
    directory = buckets.local(directory)
    kind_of(directory)
    config = read_config(directory)
    processor = Processor.from_checkpoint(
        directory, config, allow_remote=allow_remote, allow_files=allow_files, defaults=media, guard=guard
    )
    defaults = GenerationDefaults.from_checkpoint(directory, fallback_end=config.extra.get("eos_token_id"))
    return config, processor, defaults


def load_runtime(
    directory: str | Path,
    config: KeyeConfig,
    *,
    rules: MeshRules | None = None,
    dtype: str | None = None,
    attention: AttentionOptions = AttentionOptions(),  # noqa: B008 (frozen)
    prefill_chunk: int | None = None,
    dense_below: int = 0,
    verify_checksums: bool = False,
    abstract: bool = False,
) -> Runtime:
    """Loads the weights of a checkpoint.

    Args:
      rules: where parameters and pages lie; all on one device if left out.
      dtype: what the parameters are cast to; as they are if left out.
      attention, prefill_chunk, dense_below: as for `Runtime`.
      verify_checksums: as for `convert.load_params`.
      abstract: whether no weights are loaded, so that the runtime can compile, and not run.

    Raises:
      UserError: the checkpoint is not whole, or cannot be computed so.
    """
    attention.check(config)
    rules = rules or MeshRules.single_device()
    how: dict[str, Any] = {"dtype": dtype, "shardings": parameter_shardings(config, rules)}
    if abstract:
        params = abstract_params(directory, config, **how)
    else:
        params = load_params(directory, config, **how, verify_checksums=verify_checksums)
    return Runtime(
        Keye.from_params(config, params),
        config,
        options=attention,
        prefill_chunk=prefill_chunk,
        dense_below=dense_below,
        rules=rules,
    )


def load_and_compile(
    directory: str | Path,
    config: KeyeConfig,
    processor: Processor,
    options: EngineOptions,
    *,
    prompt: PromptPlan | None = None,
    **settings: Any,
) -> Runtime:
    """Loads the weights of a checkpoint, and compiles meanwhile what an engine with these options is going to run.

    Several processes must compile in the same order, so they compile later.

    Args:
      prompt: the only one that the engine is going to read; all its programs are compiled if left out.
      settings: of `load_runtime`.

    Raises:
      UserError: as `load_runtime`, and an option that is not allowed, before weights are read.
    """
    if jax.process_count() > 1:
        return load_runtime(directory, config, **settings)
    runtime = load_runtime(directory, config, **settings, abstract=True)
    largest = most_patches(runtime, processor)
    scheduler = scheduler_config(runtime, options, largest)

    def compile_programs() -> None:
        try:
            normalisation = runtime.pixel_normalisation(processor.pixel_scale, processor.pixel_shift)
            if prompt is None:
                sizes, heat = image_sizes(largest), options.selection_heat
                programs = engine_programs(runtime, scheduler, normalisation, images=sizes, heat=heat)
            else:
                programs = programs_for(prompt, runtime, scheduler, normalisation)
            compile_side_by_side(programs)
        except Exception:  # the engine compiles them later, and says what is wrong
            _log.debug("programs were not compiled ahead", exc_info=True)

    # A daemon, so that whoever interrupts the loading does not wait for a compiler.
    compiling = threading.Thread(target=compile_programs, name="keye-jax compiling", daemon=True)
    compiling.start()
    loaded = load_runtime(directory, config, **settings)
    compiling.join()
    return loaded


def load(
    directory: str | Path,
    *,
    allow_remote: bool = False,
    allow_files: bool = True,
    media: Mapping[str, Any] | None = None,
    guard: MediaGuard | None = None,
    compile_for: EngineOptions | None = None,
    **settings: Any,
) -> tuple[Runtime, Processor, GenerationDefaults]:
    """All that an engine needs of a checkpoint: `read_checkpoint`, and `load_runtime` with `settings`.

    Args:
      compile_for: options of the engine whose programs are compiled meanwhile; None for compiling nothing.
    """
    directory = buckets.local(directory)
    config, processor, defaults = read_checkpoint(
        directory, allow_remote=allow_remote, allow_files=allow_files, media=media, guard=guard
    )
    if compile_for is None:
        return load_runtime(directory, config, **settings), processor, defaults
    return load_and_compile(directory, config, processor, compile_for, **settings), processor, defaults
