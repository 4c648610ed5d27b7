"""Measures steps of training on one long sample of random tokens, with a model of random weights.

    python -m keye_jax.bench.train --stage indexer_warmup --layers 16 --length 32768

Prints the time of a step, that of its forward pass alone, tokens a second, and of the indexer's warm-up the floating-
point operations that the step needs, beside what the device could do in that time. With --compile-only it makes no
weights and runs nothing: it prints the memory that the compiled step needs, by the compiler.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.synthetic import with_layers
from keye_jax import presets
from keye_jax.bench.inputs import random_model
from keye_jax.config import KeyeConfig
from keye_jax.model.keye import Keye
from keye_jax.runtime.compilation_cache import enable_compilation_cache
from keye_jax.runtime.device import peak_memory_bytes
from keye_jax.sharding import MeshRules, StepSharding
from keye_jax.train.config import PAGE_TOKENS, StageConfig
from keye_jax.train.forward import TrainOptions
from keye_jax.train.optimizer import init_optimizer, make_optimizer
from keye_jax.train.packing import PackedArrays
from keye_jax.train.steps import TrainStep
from keye_jax.train.weights import ModelDef, Weights


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one step.

    Attributes:
      step, forward: seconds of a step and of its forward pass alone, medians.
      tokens: how many it reads.
      flops: that it needs, or None where that is not known.
      peak_bytes: the most memory that was in use.
    """

    step: float
    forward: float
    tokens: int
    flops: float | None
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def measure(config: KeyeConfig, stage: StageConfig, length: int, repeats: int) -> Timing:
    """Times a stage's step on one sample.

    Args:
      length: its tokens, a multiple of a page's.
      repeats: steps that are timed, after one that compiles and one that warms up.
    """
    structure, weights = ModelDef.split(random_model(config))
    trained, frozen, step = _stage_step(structure, weights, stage)
    if stage.master:
        trained = {path: value.astype("float32") for path, value in trained.items()}
    moments = init_optimizer(step.optimizer, trained)
    batch = step.place(_sample(config, length))
    forward = jax.jit(step.losses)

    def timed(run: Any) -> float:
        times = []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    forward_s = timed(lambda: forward(trained, frozen, batch))
    state = (trained, moments)

    def train() -> Any:
        nonlocal state
        *state, found = step.train(*state, frozen, (batch,))
        return found

    step_s = timed(train)
    warmup = stage.attention == "dense" and not stage.loss.language
    flops = warmup_flops(config, length) if warmup else None
    return Timing(step_s, forward_s, length, flops, peak_memory_bytes())


def compiled_memory(config: KeyeConfig, stage: StageConfig, length: int) -> tuple[int, int]:
    """Compiles a stage's step on one sample, for the default device, without weights.

    Args:
      length: as for `measure`.

    Returns:
      bytes of the step's arguments, and what it needs besides them and its results.
    """
    structure, weights = ModelDef.split(Keye.abstract(config))
    trained, frozen, step = _stage_step(structure, weights, stage)
    masters = {path: jax.ShapeDtypeStruct(value.shape, "float32") for path, value in trained.items()}
    moments = jax.eval_shape(step.optimizer.init, masters)
    batch = step.place(_sample(config, length))
    step_program = TrainStep.train.lower(step, masters if stage.master else trained, moments, frozen, (batch,))
    memory = step_program.compile().memory_analysis()
    assert memory is not None, "the compilers of CPUs, GPUs and TPUs say it"
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def _stage_step(structure: ModelDef, weights: Weights, stage: StageConfig) -> tuple[Weights, Weights, TrainStep]:
    """The weights that train, those that do not, and the step, on one device."""
    trained = {path: value for path, value in weights.items() if stage.trains(path)}
    frozen = {path: value for path, value in weights.items() if path not in trained}
    options = TrainOptions(
        attention=stage.attention,
        kl=stage.loss.kl > 0,
        recall=stage.attention == "sparse",
        remat=stage.remat,
        scan_layers=stage.scan_layers,
    )
    dtypes = {path: value.dtype for path, value in trained.items()}
    optimizer = make_optimizer(stage.optimizer, 1000, list(trained))
    step = StepSharding.prefill(MeshRules.single_device())
    return trained, frozen, TrainStep(structure, options, stage.loss, 0.0, dtypes, optimizer, {}, step)


def warmup_flops(config: KeyeConfig, length: int) -> float:
    """Floating-point operations that a step of the indexer's warm-up needs, for one sample: products of matrices alone.

    The forward pass is the whole model with dense attention. The backward pass computes attention's probabilities, the
    teacher, and the indexer's scores once more; only the indexer has gradients, and none of its input.
    """
    sa, hidden = config.sa_config, config.hidden_size
    pairs = length * (length + 1) / 2
    heads, head_dim = config.num_attention_heads, config.head_dim
    attention_rows = (2 * heads + 2 * config.num_key_value_heads) * head_dim
    indexer_rows = (sa.indexer_num_heads + 1) * sa.indexer_head_dim + sa.indexer_num_heads
    experts = config.num_experts_per_tok * 3 * config.moe_intermediate_size + config.num_experts
    products = 2 * length * hidden
    dots, index_dots = 2 * pairs * heads * head_dim, 2 * pairs * sa.indexer_num_heads * sa.indexer_head_dim
    forward = products * (attention_rows + indexer_rows + experts) + 2 * dots + index_dots
    backward = dots + 3 * index_dots + products * indexer_rows
    return config.num_hidden_layers * (forward + backward)


def _sample(config: KeyeConfig, length: int) -> PackedArrays:
    """One sample of random tokens, in one row; each is followed by the next."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, length), dtype=np.int32)
    targets = np.concatenate([ids[:, 1:], np.full((1, 1), -1, np.int32)], axis=1)
    zero = np.zeros(1, np.int32)
    return PackedArrays(
        ids=ids,
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), (3, 1, length)),
        targets=targets,
        vision_index=np.full((1, length), -1, np.int32),
        page_table=np.arange(length // PAGE_TOKENS, dtype=np.int32)[None],
        start=zero,
        count=np.full(1, length, np.int32),
        sequence=zero,
        images=(),
    )


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m keye_jax.bench.train", description=__doc__)
    parser.add_argument("--config", type=Path, default=presets.RELEASED, help="config.json; default: the released one")
    parser.add_argument("--stage", default="indexer_warmup", help="preset of configs/train, or a file; without LoRA")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers, in place of the configuration's")
    parser.add_argument("--length", type=int, default=32768, metavar="N", help="tokens of the sample")
    parser.add_argument("--compile-only", action="store_true", help="print the compiled step's memory, and run nothing")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="steps that are timed")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of the device in bfloat16; default: of an H100"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the figures to")
    arguments = parser.parse_args()
    stage = StageConfig.from_file(presets.train_file(arguments.stage))
    if stage.lora is not None:
        parser.error(f"--stage is {arguments.stage!r}, which has LoRA; it must be a stage without")
    if arguments.length < 1 or arguments.length % PAGE_TOKENS:
        parser.error(f"--length is {arguments.length}; it must be a positive multiple of {PAGE_TOKENS}")
    enable_compilation_cache()
    config = with_layers(KeyeConfig.from_file(arguments.config), arguments.layers)
    device = jax.devices()[0].device_kind
    if arguments.compile_only:
        held, scratch = (size / 2**30 for size in compiled_memory(config, stage, arguments.length))
        sizes = f"{held:.2f} GiB of weights, moments and batch, {scratch:.2f} GiB besides"
        print(f"{arguments.stage}, {config.num_hidden_layers} layers, {arguments.length:,} tokens, {device}: {sizes}")
        return
    found = measure(config, stage, arguments.length, arguments.repeats)
    print(f"{arguments.stage}, {config.num_hidden_layers} layers, one sample of {found.tokens:,} tokens, {device}")
    print(f"step {found.step * 1e3:,.0f} ms, its forward pass alone {found.forward * 1e3:,.0f} ms")
    print(f"{found.tokens / found.step:,.0f} tokens a second")
    if found.flops is not None:
        rate = found.flops / found.step / 1e12
        print(
            f"it needs {found.flops / 1e12:,.1f} TFLOP: {rate:,.1f} TFLOP/s, {rate / arguments.peak_tflops:.1%} of the "
            f"peak; at the peak {found.tokens * arguments.peak_tflops * 1e12 / found.flops:,.0f} tokens a second"
        )
    print(f"peak memory {found.peak_bytes / 2**30:.1f} GiB")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
