"""From a checkpoint's directory to what an engine needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import kind_of, load_params
from keye_jax.config import KeyeConfig
from keye_jax.engine.generation_config import GenerationDefaults
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.model.params import parameter_shardings
from keye_jax.processor import Processor
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding import MeshRules


def load(
    directory: str | Path,
    *,
    rules: MeshRules | None = None,
    dtype: str | None = None,
    attention: AttentionOptions = AttentionOptions(),  # noqa: B008 (frozen)
    prefill_chunk: int | None = None,
    dense_below: int = 0,
    allow_remote: bool = False,
    allow_files: bool = True,
    media: Mapping[str, Any] | None = None,
) -> tuple[Runtime, Processor, GenerationDefaults]:
    """Loads the weights of a checkpoint, and reads its other files.

    Args:
      directory: safetensors or Orbax.
      rules: where parameters and pages lie; all on one device if left out.
      dtype: what the parameters are cast to; as they are if left out.
      attention, prefill_chunk, dense_below: as for `Runtime`.
      allow_remote, allow_files: as for `Processor`.
      media: options of media that hold where a request sets none, `Processor`'s `defaults`.

    Raises:
      UserError: the checkpoint is not whole, or a value is not allowed.
    """
    directory, rules = Path(directory), rules or MeshRules.single_device()
    kind_of(directory)
    config = KeyeConfig.from_file(directory)
    processor = Processor.from_checkpoint(
        directory, config, allow_remote=allow_remote, allow_files=allow_files, defaults=media
    )
    defaults = GenerationDefaults.from_checkpoint(directory, fallback_end=config.extra.get("eos_token_id"))
    params = load_params(directory, config, dtype=dtype, shardings=parameter_shardings(config, rules))
    model = Keye.from_params(config, params)
    runtime = Runtime(
        model, config, options=attention, prefill_chunk=prefill_chunk, dense_below=dense_below, rules=rules
    )
    return runtime, processor, defaults
