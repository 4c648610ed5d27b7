"""What a job would take on devices that are not here: memory, work, collectives, and the longest context that fits.

Weights and cache are computed exactly, from the rules. Explicit collectives are counted in the traced program. Where
the platform's compiler is installed, the whole program is compiled, which needs no such device: memory and collectives
are the compiler's own figures then. Floating point operations and bytes read are estimates, by the formulas below.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from importlib.util import find_spec
from typing import Any, Literal

import jax

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.kv_cache import PAGE_SIZE
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.planning.collectives import Collective, of_program, of_trace
from keye_jax.planning.hardware import Platform
from keye_jax.planning.tpu_times import KERNELS, kernel_seconds, kernels_were_estimated
from keye_jax.planning.work import Work
from keye_jax.runtime import lowering
from keye_jax.runtime.memory import decode_workspace_bytes, pool_bytes, prefill_workspace_bytes, weight_bytes
from keye_jax.runtime.prefill import chunk_tokens
from keye_jax.runtime.runtime import PREFILL_CHUNK, Runtime
from keye_jax.sharding import MeshRules, ShardingConfig
from keye_jax.sharding.mesh_rules import unused
from pallas_kernels.errors import UnsupportedError

USABLE = 0.95
"""Share of a GPU's memory that a job can have; XLA takes 0.75 unless XLA_PYTHON_CLIENT_MEM_FRACTION says more."""

TPU_PREFILL_CHUNK = 1024

MOST_TOKENS = 2**31 - 1
"""Of all sequences together: programs count in int32."""

_COMPILER_OPTIONS = {"gpu": {"xla_gpu_autotune_level": "0"}}
"""Trying which way is the fastest takes a GPU."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of prefill, the last and most expensive one of a prompt, or a step of decode.

    Attributes:
      tokens: new tokens, of all sequences together.
      arguments, workspace: bytes on one device: weights, cache and inputs; what the step needs besides.
      peak: both, and of a step of reading the embeddings of the whole prompt.
      compiled: whether these are a compiler's figures; they are estimates otherwise.
      compile_seconds: how long compiling took, or None.
      flops: floating point operations on one device.
      bytes_moved: bytes that one device reads from and writes to its memory.
      collectives: what travels between devices.
      at_least_seconds: what operations, bytes and collectives take at the devices' peak rates; the largest of these.
      estimated_seconds: what a chunk of prefill takes on TPUs: its kernels by the compiler's estimates, the rest at
        peak rates; None for other steps, split heads, float8 index keys, and sizes that are not the released model's.
    """

    tokens: int
    arguments: int
    workspace: int
    peak: int
    compiled: bool
    compile_seconds: float | None
    flops: float
    bytes_moved: float
    collectives: tuple[Collective, ...]
    at_least_seconds: float | None
    estimated_seconds: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a job takes, on one device where nothing else is said.

    Attributes:
      platform, devices, mesh: the devices, how many, and the mesh's axes with their sizes.
      context, batch, prefill_chunk: the job.
      implementation: of the kernels in compiled programs.
      memory: bytes there are.
      weights, cache, prompt: bytes of each; the prompt's are of the embeddings of images and frames.
      prefill, decode: the two kinds of step.
      fits: whether all of it does.
      problem: what the compiler said if not.
      largest_context: the longest context that would fit, in tokens; 0 if none does.
      video: see `video_capacity`.
      notes: what a reader must know of the figures, one sentence each.
    """

    platform: str
    devices: int
    mesh: dict[str, int]
    context: int
    batch: int
    prefill_chunk: int
    implementation: str
    memory: int
    weights: int
    cache: int
    prompt: int
    prefill: Step | None
    decode: Step | None
    fits: bool
    problem: str | None
    largest_context: int
    video: list[dict[str, float]]
    notes: list[str]

    @property
    def workspace(self) -> int:
        """Bytes of the step that needs more."""
        return max((step.workspace for step in (self.prefill, self.decode) if step), default=0)

    @property
    def peak(self) -> int:
        return max((step.peak for step in (self.prefill, self.decode) if step), default=0)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"workspace": self.workspace, "peak": self.peak}


def plan(
    config: KeyeConfig,
    sharding: ShardingConfig,
    platform: Platform,
    *,
    context: int,
    batch: int = 1,
    prefill_chunk: int | None = None,
    implementation: str | None = None,
    indexer_dtype: Literal["float8_e4m3fn"] | None = None,
    cache_dtype: Literal["float8_e4m3fn"] | None = None,
    activation_dtype: Literal["float8_e4m3fn"] | None = None,
    compile_programs: bool = True,
) -> Plan:
    """Plans a job of `batch` sequences with room for `context` tokens each; prompts are read one at a time.

    Args:
      prefill_chunk: prompt tokens that a device reads in one step; what suits the platform if left out.
      indexer_dtype, cache_dtype, activation_dtype: as in `AttentionOptions`.
      implementation: of the kernels in the programs that are compiled; None takes the platform's own, or all portable
        ones where those refuse.
      compile_programs: False estimates what would be compiled: programs for TPUs, and for GPUs that are described where
        JAX's plugin for CUDA is installed.

    Raises:
      UserError: the context is longer than the model's, there are too many sequences, the sharding is impossible, the
        platform does not run the implementation, or the model cannot be computed so.
    """
    if not 1 <= context <= config.max_position_embeddings:
        raise UserError(
            f"--context is {context:,}; this model takes from 1 to {config.max_position_embeddings:,} tokens"
        )
    if batch < 1:
        raise UserError(f"--batch is {batch}; it must be at least 1")
    chip = platform.chip
    if implementation is not None and implementation not in chip.implementations:
        raise UserError(
            f"--implementation is {implementation!r}; on {platform.name} it must be {' or '.join(chip.implementations)}"
        )
    rules = abstract_rules(sharding, config, platform)
    devices, note = _compile_only_devices(platform) if compile_programs else (None, None)
    compiling = devices is not None
    if compiling:
        rules = MeshRules.create(sharding, config, devices=devices)
    chunk = prefill_chunk or PREFILL_CHUNK.get(chip.platform, TPU_PREFILL_CHUNK)

    dtypes: dict[str, Any] = {"indexer_dtype": indexer_dtype, "cache_dtype": cache_dtype}

    def traced_with(implementation: str) -> tuple[Runtime, dict[str, jax.stages.Traced]]:
        options = AttentionOptions(implementation=implementation, activation_dtype=activation_dtype, **dtypes)
        runtime = Runtime(Keye.abstract(config), config, rules=rules, options=options, prefill_chunk=chunk)
        (prefill,) = lowering.prefill_programs(runtime, context, pages=rows * runtime.table_width(context))
        return runtime, {"prefill": prefill, "decode": lowering.decode_program(runtime, rows, context, sample=False)}

    homes = rules.size("batch")
    rows = -(-batch // homes) * homes
    most = MOST_TOKENS // (-(-context // PAGE_SIZE) * PAGE_SIZE)
    if rows > most:
        raise UserError(
            f"--batch is {batch:,}; with --context {context:,} it must be at most {most // homes * homes:,}"
        )
    preferred = implementation or chip.implementations[0]
    own = preferred if compiling else implementation or "xla"
    try:
        runtime, programs = traced_with(own)
    except UnsupportedError:
        if implementation is not None:
            raise
        own = "xla"
        runtime, programs = traced_with(own)
    read_at_once = chunk_tokens(context, chunk, runtime.prefill_step)
    sizes = functools.partial(pool_bytes, config, rules=rules, **dtypes)
    weights, cache = weight_bytes(config, rules), sizes(batch, context)
    prompt = context * config.hidden_size * config.jax_dtype.itemsize
    memory = int(memory_bytes(platform))
    work, steps, problem = Work(config, rules, chunk, **dtypes), {}, None
    estimates = {
        "prefill": functools.partial(
            prefill_workspace_bytes,
            *(config, rules, chunk),
            implementation=own if compiling else preferred,
            activation_dtype=activation_dtype,
            **dtypes,
        ),
        "decode": functools.partial(decode_workspace_bytes, config, rules, batch),
    }
    for name, traced in programs.items():
        reading = name == "prefill"
        tokens = read_at_once if reading else batch
        collectives, seconds = of_trace(traced.jaxpr, rules.mesh.shape), None
        if compiling:
            begun = time.perf_counter()
            try:
                program = _compile(traced, _COMPILER_OPTIONS.get(chip.platform))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise UserError(f"{platform.name} has no program for {name}: {_sentence(str(error))}") from error
                problem = problem or f"{name}: {_sentence(str(error))}"
                continue
            seconds, figures, text = time.perf_counter() - begun, program.memory_analysis(), program.as_text()
            assert figures is not None and text is not None, "these compilers give both"
            # A program's arguments are those that it reads; the others are on the device all the same.
            others = ("vision", "projector", *(["embed_tokens"] if reading else []))
            arguments = figures.argument_size_in_bytes + weight_bytes(config, rules, only=others)
            fresh = figures.output_size_in_bytes - figures.alias_size_in_bytes
            workspace = figures.temp_size_in_bytes + figures.generated_code_size_in_bytes + fresh
            collectives = of_program(text)
        else:
            arguments = weights + cache
            workspace = estimates[name](context)
        flops, moved = work.prefill(context, tokens) if reading else work.decode(batch, context)
        steps[name] = Step(
            tokens=tokens,
            arguments=arguments,
            workspace=workspace,
            peak=arguments + workspace + (prompt if reading else 0),
            compiled=compiling,
            compile_seconds=seconds,
            flops=flops,
            bytes_moved=moved,
            collectives=collectives,
            at_least_seconds=_at_least(platform, flops, moved, collectives),
            estimated_seconds=_estimated(platform, work, context, tokens, collectives) if reading else None,
        )
    found = [steps.get("prefill"), steps.get("decode")]
    peak = max((step.peak for step in found if step), default=0)

    def needs(tokens: int) -> int:
        """Estimated bytes at another context: compiled workspaces follow it as estimated ones do."""
        workspaces = [
            step.workspace * estimate(tokens) / estimate(context) if step else estimate(tokens)
            for step, estimate in zip(found, estimates.values(), strict=True)
        ]
        embeds = tokens * config.hidden_size * config.jax_dtype.itemsize
        return int(weights + sizes(batch, tokens) + max(embeds + workspaces[0], workspaces[1]))

    return Plan(
        platform=platform.name if platform.slices == 1 else f"{platform.slices} x {platform.name}",
        devices=rules.devices,
        mesh=dict(rules.mesh.shape),
        context=context,
        batch=batch,
        prefill_chunk=read_at_once,
        implementation=own,
        memory=memory,
        weights=weights,
        cache=cache,
        prompt=prompt,
        prefill=found[0],
        decode=found[1],
        fits=problem is None and peak <= memory,
        problem=problem,
        largest_context=_largest(needs, memory, context - 1 if problem else config.max_position_embeddings),
        video=video_capacity(context),
        notes=[each for each in (unused(rules, platform.devices), note, *config.notes) if each],
    )


def abstract_rules(sharding: ShardingConfig, config: KeyeConfig, platform: Platform) -> MeshRules:
    """The rules of a job on a platform, without devices. Raises UserError where its launch would."""
    return MeshRules.abstract(
        sharding,
        config,
        platform.devices,
        platform.chip.platform,
        processes=platform.processes,
        stand_ins=platform.stand_ins(),
    )


def _compile_only_devices(platform: Platform) -> tuple[list[Any] | None, str | None]:
    """Devices that programs can be compiled for, though they are not here.

    Returns:
      None where there is no compiler for them; and a sentence that says what to install, if that would help.
    """
    from jax.experimental import topologies

    if platform.chip.description is not None:
        count, description = f"1x1x{platform.devices}", platform.chip.description
        if not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            return None, _without_compiler("XLA's compiler for NVIDIA GPUs", "cuda")
        try:
            found = topologies.get_topology_desc(platform="cuda", topology=count, target_config=description)
        except RuntimeError as error:
            return None, f"figures are estimates: the compiler for NVIDIA GPUs does not start: {_first_line(error)}"
        return found.devices, None
    if platform.topology is None:
        return None, None
    if find_spec("libtpu") is None:
        return None, _without_compiler("the TPU compiler", "tpu")
    more = {"num_slices": platform.slices} if platform.slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=platform.topology, **more).devices, None
    except RuntimeError as error:
        raise UserError(
            f"--platform is {platform.name!r}; the TPU compiler must know it, or --no-compile must be given: "
            f"{_first_line(error)}"
        ) from error


def _without_compiler(name: str, extra: str) -> str:
    return f"figures are estimates: {name} is not installed; pip install 'keye-jax[{extra}]' installs it"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _compile(program: jax.stages.Traced, options: dict[str, str] | None) -> jax.stages.Compiled:
    kept = jax.config.jax_enable_compilation_cache
    # What is compiled for devices that are not there cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return program.lower().compile(compiler_options=options)
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


def _at_least(platform: Platform, flops: float, moved: float, collectives: tuple[Collective, ...]) -> float | None:
    """Seconds at the devices' peak rates; None where nobody says what these are."""
    chip = platform.chip
    if chip.flops is None or chip.bandwidth is None or chip.interconnect is None:
        return None
    received = sum(each.bytes_received for each in collectives)
    return max(flops / chip.flops, moved / chip.bandwidth, received / chip.interconnect)


def _estimated(
    platform: Platform, work: Work, context: int, tokens: int, collectives: tuple[Collective, ...]
) -> float | None:
    """Seconds of a chunk: attention by the compiler's estimates, then the rest, then collectives, at peak rates."""
    generation, ranks = (platform.topology or "").partition(":")[0], work.ranks_of_one_head
    if generation not in KERNELS or ranks is None or not kernels_were_estimated(work.config):
        return None
    layers = work.config.num_hidden_layers
    rest = _at_least(platform, *work.prefill_but_attention(tokens), ())
    sent = _at_least(platform, 0, 0, collectives)
    assert rest is not None and sent is not None, "the makers publish these of TPUs"
    return layers * kernel_seconds(generation, tokens / ranks, context) + rest + sent


def memory_bytes(platform: Platform) -> float:
    """Bytes of one device that a job can have."""
    from keye_jax.runtime.device import memory_limit_bytes

    if platform.chip.memory is None:
        return memory_limit_bytes() * len(jax.local_devices()) / platform.devices
    return platform.chip.memory * (USABLE if platform.chip.platform == "gpu" else 1)


def _sentence(error: str) -> str:
    found = re.search(r"[Uu]sed [\d.]+[KMGT]? of [\d.]+[KMGT]? \w+", error)
    return found.group(0) if found else error.splitlines()[0]


def _largest(needs: Any, memory: int, limit: int, step: int = 1024) -> int:
    """The largest multiple of `step` up to `limit` that needs no more than `memory`."""
    low, high = 0, limit // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(middle * step) <= memory else (low, middle - 1)
    return low * step


def video_capacity(context: int, fps: float = 2.0) -> list[dict[str, float]]:
    """Frames, and seconds at `fps` frames a second, that a context holds with the smallest and the largest frames.

    Each frame has its time before it: a mark, and a token for each character of the seconds with one decimal.
    """
    found = []
    for tokens in (64, 256):
        frames, used = 0, 2
        while (used := used + 1 + len(f"{frames / fps:.1f}") + tokens) <= context:
            frames += 1
        found.append({"tokens_per_frame": tokens, "frames": frames, "seconds": frames / fps})
    return found
