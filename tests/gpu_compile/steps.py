"""Steps of the model, compiled for an H100 on a machine without a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.decode_layer import exchanges_tokens
from keye_jax.model.keye import Keye
from keye_jax.planning.hardware import CHIPS
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding import MeshRules, ShardingConfig
from tests.gpu_compile.compiler import compilers, prepared, use_plugin


def use_compilers(parser: argparse.ArgumentParser) -> None:
    """Lets JAX find the compilers for NVIDIA GPUs; an error of the command line where there are none."""
    folder = prepared()
    if folder is None:
        parser.error("the compilers are not there: `make test-gpu-compile` installs them, or set GPU_COMPILERS_PATH")
    use_plugin(folder)
    ptxas = compilers(folder)[0].parent
    os.environ["PATH"] = f"{ptxas}:{os.environ['PATH']}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={ptxas.parent}"


def hopper_runtime(
    config: KeyeConfig,
    options: AttentionOptions,
    *,
    layers: int,
    prefill_chunk: int | None = None,
    sharding: str = "one_device",
    devices: int = 1,
) -> Runtime:
    """A runtime of the first layers of a model without weights, whose programs are compiled for H100s of one host.

    Its kernels exchange tokens where those of GPUs that are there would.
    """
    described: Any = {"platform": "cuda", "topology": f"1x1x{devices}", "target_config": CHIPS["h100"].description}
    found = topologies.get_topology_desc(**described).devices
    config = dataclasses.replace(config, num_hidden_layers=layers)
    rules_file = ShardingConfig.from_file(presets.sharding_file(sharding))
    rules = MeshRules.create(rules_file, config, devices=found)
    runtime = Runtime(Keye.abstract(config), config, rules=rules, options=options, prefill_chunk=prefill_chunk)
    if exchanges_tokens(step := runtime.decode_step):
        addresses: Any = jax.ShapeDtypeStruct((devices, 2 * devices + 1), jnp.int32, sharding=rules.over(step.rows))
        runtime.addresses = addresses
    return runtime


def compile_step(program: jax.stages.Traced) -> jax.stages.Compiled:
    """Compiles a program; which way is the fastest is not tried, since that takes a GPU."""
    return program.lower().compile(compiler_options={"xla_gpu_autotune_level": "0"})
