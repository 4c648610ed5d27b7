"""From a checkpoint's directory to what an engine needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import buckets, kind_of, load_params
from convert.detect import read_config
from keye_jax.config import KeyeConfig
from keye_jax.engine.generation_config import GenerationDefaults
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.model.params import parameter_shardings
from keye_jax.processor import Processor
from keye_jax.processor.guard import MediaGuard
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding import MeshRules


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
) -> Runtime:
    """Loads the weights of a checkpoint.

    Args:
      rules: where parameters and pages lie; all on one device if left out.
      dtype: what the parameters are cast to; as they are if left out.
      attention, prefill_chunk, dense_below: as for `Runtime`.
      verify_checksums: as for `convert.load_params`.

    Raises:
      UserError: the checkpoint is not whole, or cannot be computed so.
    """
    attention.check(config)
    rules = rules or MeshRules.single_device()
    shardings = parameter_shardings(config, rules)
    params = load_params(directory, config, dtype=dtype, shardings=shardings, verify_checksums=verify_checksums)
    return Runtime(
        Keye.from_params(config, params),
        config,
        options=attention,
        prefill_chunk=prefill_chunk,
        dense_below=dense_below,
        rules=rules,
    )


def load(
    directory: str | Path,
    *,
    allow_remote: bool = False,
    allow_files: bool = True,
    media: Mapping[str, Any] | None = None,
    guard: MediaGuard | None = None,
    **settings: Any,
) -> tuple[Runtime, Processor, GenerationDefaults]:
    """All that an engine needs of a checkpoint: `read_checkpoint`, and `load_runtime` with `settings`."""
    directory = buckets.local(directory)
    config, processor, defaults = read_checkpoint(
        directory, allow_remote=allow_remote, allow_files=allow_files, media=media, guard=guard
    )
    return load_runtime(directory, config, **settings), processor, defaults
