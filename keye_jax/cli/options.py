"""Options that several subcommands share, and what they set up."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keye_jax.errors import UserError, shorten
from keye_jax.runtime import distributed

if TYPE_CHECKING:
    from rich.progress import TaskID

    from keye_jax.config import KeyeConfig
    from keye_jax.model.attention import AttentionOptions
    from keye_jax.quantization.schemes import Quantization
    from keye_jax.sharding import MeshRules

Checkpoint = Annotated[
    Path, typer.Option(help="Directory of a checkpoint, safetensors or Orbax, or its gs:// or s3:// URL.")
]
VerifyChecksums = Annotated[
    bool, typer.Option("--verify-checksums", help="Read every file of the checkpoint first and compare its SHA-256.")
]
Attention = Annotated[str, typer.Option(help="'sparse', the model as released, or 'dense', for comparison.")]
Implementation = Annotated[
    str | None, typer.Option(help="Kernels to use; the best that the device supports if left out.")
]
PrefillChunk = Annotated[
    int | None, typer.Option(help="Prompt tokens that each device reads in one step; the answer does not depend on it.")
]
DenseBelow = Annotated[
    int,
    typer.Option(
        help="Prompt tokens at positions below this attend to all earlier ones. The model was trained with selection: "
        "above 0 it is another model, less exact, and faster for short prompts."
    ),
]
IndexerDtype = Annotated[
    str | None,
    typer.Option(help="'float8_e4m3fn': an indexer as the publisher serves it; the weights' dtype if left out."),
]
CacheDtype = Annotated[
    str | None,
    typer.Option(help="'float8_e4m3fn': keys and values of half the size, less exact; the weights' dtype if left out."),
]
ActivationDtype = Annotated[
    str | None,
    typer.Option(
        help="'float8_e4m3fn': experts in fp8 multiply activations in fp8 where prompts are read, less exact; the "
        "weights' dtype if left out."
    ),
]
Experts = Annotated[
    str | None, typer.Option(help="Bits of the experts: 'fp8', 'int8' or 'int4'; as they are if left out.")
]
Dtype = Annotated[str, typer.Option(help="'checkpoint', 'bfloat16' or 'float32': what the parameters are cast to.")]

Warmup = Annotated[bool, typer.Option(help="Compile all programs before the first request.")]

Fps = Annotated[float | None, typer.Option(help="Frames to look at a second of video.")]
MaxFrames = Annotated[int | None, typer.Option(help="Most frames of a video.")]
NumFrames = Annotated[int | None, typer.Option(help="Frames of a video, in place of --fps.")]
Start = Annotated[str | None, typer.Option(help="Where videos begin: seconds, mm:ss or hh:mm:ss.")]
End = Annotated[str | None, typer.Option(help="Where videos end: seconds, mm:ss or hh:mm:ss.")]
MinPixels = Annotated[int | None, typer.Option(help="Fewest pixels of an image or frame.")]
MaxPixels = Annotated[int | None, typer.Option(help="Most pixels of an image or frame.")]
TotalPixels = Annotated[int | None, typer.Option(help="Most pixels of all frames of a video.")]
AllowRemote = Annotated[bool, typer.Option("--allow-remote", help="Fetch http(s) URLs.")]

Sharding = Annotated[
    str | None,
    typer.Option(help="How the model lies over several devices: a preset's name, such as 'expert', or a file."),
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Of several processes: where process 0 is; 'auto', alone, asks the launcher and the TPU machine.",
    ),
]
Processes = Annotated[int | None, typer.Option(help="Of several processes: how many there are.")]
ProcessId = Annotated[int | None, typer.Option(help="Of several processes: which one this is, from 0.")]
StartupTimeout = Annotated[
    float, typer.Option(help="Of several processes: seconds that the others may take to arrive.")
]


def given(**values: Any) -> dict[str, Any]:
    """The options that were given: those that are not None, by name."""
    return {name: value for name, value in values.items() if value is not None}


def check_sharding_is_given(sharding: str | None) -> None:
    """Raises UserError if there are several processes and `--sharding` is left out."""
    if sharding is None and distributed.process_count() > 1:
        raise UserError(f"{distributed.process_count()} processes need --sharding, which says what each of them has")


def mesh_rules(sharding: str | None, config: KeyeConfig) -> MeshRules:
    """The rules of a preset or a sharding file on the devices there are; all on one device without.

    Raises UserError: the file, or what it asks of these devices or this model, is impossible.
    """
    import jax

    from keye_jax import presets
    from keye_jax.sharding import MeshRules, ShardingConfig
    from keye_jax.sharding.mesh_rules import unused

    check_sharding_is_given(sharding)
    if sharding is None:
        return MeshRules.single_device()
    rules = MeshRules.create(ShardingConfig.from_file(presets.sharding_file(sharding)), config)
    if note := unused(rules, jax.device_count()):
        print(f"keye-jax: {note}", file=sys.stderr)
    return rules


def attention_options(
    attention: str,
    implementation: str | None,
    indexer_dtype: str | None = None,
    cache_dtype: str | None = None,
    activation_dtype: str | None = None,
) -> AttentionOptions:
    """Checked attention options. Raises UserError for an unknown name."""
    from keye_jax.model.attention import AttentionOptions
    from pallas_kernels.dispatch import available

    if attention not in ("sparse", "dense"):
        raise UserError(f"--attention is {attention!r}; it must be 'sparse' or 'dense'")
    if implementation is not None and implementation not in available():
        raise UserError(f"--implementation is {implementation!r}; it must be one of: {', '.join(available())}")
    if indexer_dtype not in (None, "float8_e4m3fn"):
        raise UserError(f"--indexer-dtype is {indexer_dtype!r}; it must be 'float8_e4m3fn' or left out")
    if cache_dtype not in (None, "float8_e4m3fn"):
        raise UserError(f"--cache-dtype is {cache_dtype!r}; it must be 'float8_e4m3fn' or left out")
    if activation_dtype not in (None, "float8_e4m3fn"):
        raise UserError(f"--activation-dtype is {activation_dtype!r}; it must be 'float8_e4m3fn' or left out")
    return AttentionOptions(attention, implementation, indexer_dtype, cache_dtype, activation_dtype=activation_dtype)


def dense_limit(value: int) -> int:
    """A checked `--dense-below`. Raises UserError if it is negative."""
    if value < 0:
        raise UserError(f"--dense-below is {value}; it must be 0 or more")
    return value


def tokens(option: str, text: str) -> int:
    """A number of tokens, "8192", "8K" or "1M". Raises UserError for anything else."""
    found = re.fullmatch(r"([0-9]{1,12})([kKmM]?)", text)
    if found is None or int(found[1]) < 1:
        raise UserError(f"{option} has {shorten(text)}; it must be a number of tokens such as 8192, 8K or 1M")
    return int(found[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[found[2].casefold()]


def quantization(experts: str | None, attention: str | None = None, group: int | None = None) -> Quantization:
    """Checked schemes of weights. Raises UserError for an unknown format or a group that cannot be."""
    from keye_jax.quantization.schemes import ATTENTION_FORMATS, FORMATS, GROUP, Quantization, standard

    for option, value, allowed in (("--experts", experts, FORMATS), ("--attention", attention, ATTENTION_FORMATS)):
        if value is not None and value not in allowed:
            raise UserError(f"{option} is {shorten(value)}; it must be {' or '.join(map(repr, allowed))}")
    if group is not None and not 2 <= group <= 1 << 14:
        raise UserError(f"--group is {group}; it must be from 2 to {1 << 14:,}")
    formats = {"experts": experts, "attention": attention}
    return Quantization(
        **{part: standard(each, group or GROUP) for part, name in formats.items() for each in FORMATS if each == name}
    )


def with_quantization(config: KeyeConfig, quantization: Quantization) -> KeyeConfig:
    """A model's configuration with schemes that options ask for, if any. UserError if its weights have some."""
    import dataclasses

    if not quantization:
        return config
    if config.quantization_config is not None:
        raise UserError("--experts and --attention cannot be given for a checkpoint whose weights have fewer bits")
    return dataclasses.replace(config, quantization=quantization)


def prefill_chunk_size(value: int | None) -> int | None:
    """A checked prefill chunk; None for the device's own. Raises UserError if it is not positive."""
    if value is not None and value < 1:
        raise UserError(f"--prefill-chunk is {value}; it must be at least 1")
    return value


def parameter_dtype(value: str) -> str | None:
    """The dtype to cast parameters to, or None for the checkpoint's own. Raises UserError for another name."""
    if value not in ("checkpoint", "bfloat16", "float32"):
        raise UserError(f"--dtype is {value!r}; it must be 'checkpoint', 'bfloat16' or 'float32'")
    return None if value == "checkpoint" else value


class ProgressBars:
    """Progress bars on stderr, one for each step that reports, until `stop`; none when stderr is not a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Shows that `done` of `total` units of `step` are done; None while there is no telling."""
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(step, total=total)
        self._bars.update(self._tasks[step], completed=done, total=total)

    def stop(self) -> None:
        """Leaves the bars as they are; what is printed afterwards is not disturbed."""
        self._bars.stop()
