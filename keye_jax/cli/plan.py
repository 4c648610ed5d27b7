"""`keye-jax plan`: whether a job will fit, before any device is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keye_jax import presets
from keye_jax.cli import options
from keye_jax.errors import UserError

if TYPE_CHECKING:
    from keye_jax.planning.hardware import Platform
    from keye_jax.planning.plan import Plan, Step
    from keye_jax.planning.train import TrainPlan

_GIB = 2**30


def plan(
    platform: Annotated[
        str, typer.Option(help="The devices: KIND:COUNT, such as h200:4, or of TPUs KIND:TOPOLOGY, such as v5p:2x2x4.")
    ],
    context: Annotated[
        str | None, typer.Option(help="Tokens that each sequence has room for, such as 131072, 128K or 1M.")
    ] = None,
    train: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Plan training by a stage's preset or file, in place of a job.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences that are decoded together.")] = 1,
    config: Annotated[
        Path, typer.Option(help="Configuration of the model: a config.json, or a checkpoint.")
    ] = presets.RELEASED,
    sharding: options.Sharding = None,
    prefill_chunk: options.PrefillChunk = None,
    device_memory: Annotated[
        str | None,
        typer.Option(help="Memory of a device, such as 80GiB; with it KIND may be the name of any other GPU."),
    ] = None,
    device_bandwidth: Annotated[
        str | None, typer.Option(help="Memory bandwidth of a device, such as 3.35TB/s, for the least time of a step.")
    ] = None,
    slices: Annotated[int, typer.Option(help="How many TPU slices of this topology.")] = 1,
    implementation: Annotated[
        str | None, typer.Option(help="Kernels in the programs that are compiled; by default the platform's.")
    ] = None,
    experts: options.Experts = None,
    attention: Annotated[
        str | None, typer.Option(help="Bits of attention's matrices: 'fp8' or 'int8'; as they are if left out.")
    ] = None,
    group: Annotated[int | None, typer.Option(help="Of int4: inputs that share a scale; 128 if left out.")] = None,
    indexer_dtype: options.IndexerDtype = None,
    cache_dtype: options.CacheDtype = None,
    activation_dtype: options.ActivationDtype = None,
    compile_: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile where there is a compiler for it, in minutes.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Says what a job takes on devices that need not be there, and whether it fits.

    Exits with 1 if it does not.
    """
    chunk = options.prefill_chunk_size(prefill_chunk)
    if (context is None) == (train is None):
        raise UserError("give either --context, for a job that answers, or --train, for one that trains")

    from keye_jax.planning.hardware import Platform, quantity

    devices = Platform.parse(
        platform,
        slices,
        memory=None if device_memory is None else quantity("--device-memory", device_memory),
        bandwidth=None if device_bandwidth is None else quantity("--device-bandwidth", device_bandwidth, "/s"),
    )
    if train is not None:
        others = {"--batch": None if batch == 1 else batch, "--prefill-chunk": prefill_chunk}
        others |= {"--implementation": implementation, "--indexer-dtype": indexer_dtype}
        others |= {"--cache-dtype": cache_dtype, "--activation-dtype": activation_dtype}
        others |= {"--experts": experts, "--attention": attention, "--group": group}
        if given := [name for name, value in others.items() if value is not None]:
            raise UserError(f"{' and '.join(given)} cannot go with --train; the stage says what a step of training is")
        return _plan_train(train, config, sharding, devices, as_json=as_json)
    assert context is not None
    quantization = options.quantization(experts, attention, group)
    computed = options.attention_options("sparse", None, indexer_dtype, cache_dtype, activation_dtype)
    tokens = options.tokens("--context", context)
    _without_devices()

    from convert.detect import read_config
    from keye_jax.planning.plan import plan as compute
    from keye_jax.sharding import ShardingConfig
    from pallas_kernels.dispatch import IMPLEMENTATIONS

    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise UserError(f"--implementation is {implementation!r}; it must be one of: {', '.join(IMPLEMENTATIONS)}")
    found = compute(
        options.with_quantization(read_config(config), quantization),
        ShardingConfig.from_file(presets.sharding_file(sharding or "one_device")),
        devices,
        context=tokens,
        batch=batch,
        prefill_chunk=chunk,
        implementation=implementation,
        indexer_dtype=computed.indexer_dtype,
        cache_dtype=computed.cache_dtype,
        activation_dtype=computed.activation_dtype,
        compile_programs=compile_,
    )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found)
    return 0 if found.fits else 1


def _plan_train(train: str, config: Path, sharding: str | None, platform: Platform, *, as_json: bool) -> int:
    stage_file = presets.train_file(train)
    _without_devices()

    from convert.detect import read_config
    from keye_jax.planning.train import plan_train
    from keye_jax.sharding import ShardingConfig
    from keye_jax.train.config import StageConfig

    found = plan_train(
        read_config(config),
        StageConfig.from_file(stage_file),
        ShardingConfig.from_file(presets.sharding_file(sharding or "train")),
        platform,
        source=str(stage_file),
    )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _print_train(found)
    return 0 if found.fits else 1


def _print_train(found: TrainPlan) -> None:
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    print(f"{found.platform}: {found.devices} devices ({mesh})")
    print(f"{found.trained:,} numbers train, of {found.total:,}; {found.tokens:,} tokens a step")
    print()
    names = ("frozen", "weights", "gradients", "moments", "activations", "workspace", "peak")
    _print_table(
        [
            ("GiB on each device", *names, ""),
            ("training", *(_gib(getattr(found, name)) for name in names), "estimated"),
        ]
    )
    print(f"weights, gradients and moments are computed; there are {_gib(found.memory)} GiB")
    _print_notes(found.notes)
    print()
    needed = "" if found.needed is None else f"; the least power of two that fits is {found.needed} of these devices"
    print(f"it fits{needed}" if found.fits else f"it does NOT fit{needed}")


def _without_devices() -> None:
    """Keeps JAX off accelerators, and the TPU compiler from looking for the machine it would run on."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    import jax

    jax.config.update("jax_platforms", "cpu")


def _print(found: Plan) -> None:
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    print(f"{found.platform}: {found.devices} devices ({mesh})")
    print(f"{found.batch} x {found.context:,} tokens, prefill of {found.prefill_chunk:,} tokens a step")
    print()
    steps = {"prefill": found.prefill, "decode": found.decode}
    lines: list[tuple[str, ...]] = [("GiB on each device", "weights", "cache and inputs", "workspace", "peak", "")]
    for name, step in steps.items():
        if step:
            how = f"compiled in {step.compile_seconds:.0f} s" if step.compiled else "estimated"
            own = step.peak - step.workspace - found.weights
            lines.append((name, *map(_gib, (found.weights, own, step.workspace, step.peak)), how))
    _print_table(lines)
    print(f"weights and cache are computed; there are {_gib(found.memory)} GiB")
    _print_notes(found.notes)
    print()
    columns = {"at least": "at_least_seconds"}
    if any(step and step.estimated_seconds is not None for step in steps.values()):
        columns["estimate"] = "estimated_seconds"
    lines = [("on each device", "TFLOP", "GB moved", *columns, "collectives")]
    for name, step in steps.items():
        if step:
            seconds = (getattr(step, field) for field in columns.values())
            times = ("?" if each is None else f"{each * 1e3:.2f} ms" for each in seconds)
            work = f"{step.flops / 1e12:.3f}", f"{step.bytes_moved / 1e9:.2f}"
            lines.append((name, *work, *times, _collectives(step)))
    _print_table(lines)
    print("operations and bytes moved are estimated, the last chunk's of a prompt; 'at least' is at peak rates")
    print()
    for each in found.video:
        minutes, seconds = divmod(round(each["seconds"]), 60)
        print(
            f"{found.context:,} tokens hold {each['frames']:,} frames of {each['tokens_per_frame']} tokens: "
            f"{minutes} min {seconds} s of video at 2 frames a second"
        )
    print()
    largest = f"the largest context that would is about {found.largest_context:,} tokens"
    if found.fits:
        print(f"it fits; {largest}")
    else:
        print(f"it does NOT fit{f' ({found.problem})' if found.problem else ''}; {largest}")


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}")


def _collectives(step: Step) -> str:
    parts = (f"{each.count} {each.kind} {each.bytes_received / 1e6:,.1f} MB" for each in step.collectives)
    return ", ".join(parts) or "none"


def _print_table(lines: list[tuple[str, ...]]) -> None:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells, line[-1]]).rstrip())


def _gib(count: float) -> str:
    return f"{count / _GIB:.2f}"
