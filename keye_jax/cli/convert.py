"""`keye-jax convert`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import typer

from keye_jax import interrupts
from keye_jax.cli import options
from keye_jax.errors import UserError

_PLAIN_INTERVAL_S = 30.0
_NAMED = 3


def convert(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[SRC] DST",
            help="The checkpoint, unless it is on a hub, and the directory to make; gs:// and s3:// URLs are taken.",
        ),
    ],
    hf: Annotated[str | None, typer.Option(metavar="ID", help="Take the checkpoint from the Hugging Face Hub.")] = None,
    modelscope: Annotated[str | None, typer.Option(metavar="ID", help="Take the checkpoint from ModelScope.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where downloads are kept, in place of the user's cache directory.")
    ] = None,
    check_finite: Annotated[
        bool, typer.Option("--check-finite", help="Read everything first and refuse infinities and NaNs.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the checkpoint in DST; begin again where DST.partial is another's."),
    ] = False,
    shard_size: Annotated[
        int, typer.Option(metavar="BYTES", help="Tensor data in one safetensors file.")
    ] = 5_000_000_000,
    merge_lora: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Add a LoRA adapter in PEFT's layout to the weights.")
    ] = None,
    sharding: options.Sharding = None,
) -> None:
    """Converts a checkpoint: safetensors into Orbax, Orbax into safetensors.

    What SRC is decides the direction. A conversion that was stopped goes on when the same command is run again. What it
    makes restores onto any devices; with --sharding a file that does not suit the model is refused before it begins.
    """
    source, destination = _paths(paths, hf, modelscope)
    if source is not None and (revision is not None or cache_dir is not None):
        raise UserError("--revision and --cache-dir belong to --hf or --modelscope; SRC is a directory")
    _keep_off_accelerators()
    from convert import conversion, hub

    interrupts.set_hint("the same command continues where this one stopped")
    with ConversionProgress() as progress:
        if source is None:
            # A download takes hours: what the destination will refuse is refused before it.
            conversion.check_destination(destination, overwrite=overwrite)
            source = hub.download(
                hf=hf,
                modelscope=modelscope,
                revision=revision,
                cache_dir=cache_dir,
                destination=destination,
                progress=progress,
            )
        if sharding is not None:
            _check_sharding(sharding, source)
        done = conversion.convert(
            source,
            destination,
            check_finite=check_finite,
            overwrite=overwrite,
            shard_size=shard_size,
            merge_lora=merge_lora,
            progress=progress,
        )
    print(
        f"{done.destination}: {done.kind}, {done.tensors:,} tensors, {done.nbytes:,} bytes, in {done.seconds:.0f} s"
        + (f" ({done.continued:,} bytes were there from an earlier run)" if done.continued else "")
    )
    if done.dequantized:
        shown = ", ".join(done.dequantized[:_NAMED]) + (", ..." if len(done.dequantized) > _NAMED else "")
        print(f"{len(done.dequantized):,} weights of fewer bits became numbers of 16 bits: {shown}")


def _paths(paths: list[Path], hf: str | None, modelscope: str | None) -> tuple[Path | None, Path]:
    if hf is not None and modelscope is not None:
        raise UserError("--hf and --modelscope are both given; only one of them can be")
    if hf is not None or modelscope is not None:
        if len(paths) != 1:
            raise UserError(f"with --hf or --modelscope the command takes DST alone; it got {len(paths)}")
        return None, paths[0]
    if len(paths) != 2:
        raise UserError(f"the command takes SRC and DST, or DST with --hf or --modelscope; it got {len(paths)}")
    return paths[0], paths[1]


def _check_sharding(sharding: str, source: Path) -> None:
    """Raises UserError if the model cannot lie over devices as the sharding file says; "auto" is settled later."""
    from convert import buckets
    from keye_jax import presets
    from keye_jax.config import KeyeConfig
    from keye_jax.sharding import ShardingConfig

    read = ShardingConfig.from_file(presets.sharding_file(sharding))
    read.check(KeyeConfig.from_file(buckets.local(source)), {axis: size or 1 for axis, size in read.mesh})


def _keep_off_accelerators() -> None:
    # Conversion is the host's work; an accelerator's memory would only be taken from others.
    import jax

    jax.config.update("jax_platforms", "cpu")


class ConversionProgress:
    """Shows phase, bytes, rate and time left on stderr: a bar on a terminal, otherwise a line every 30 seconds."""

    def __init__(self) -> None:
        self._bar = None
        self._task = None
        self._phase = ""
        self._start = (0.0, 0)
        self._printed = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Takes the phase, the bytes done in it, and its bytes in all."""
        if phase != self._phase:
            self._phase, self._start, self._printed = phase, (time.monotonic(), done), time.monotonic()
            if sys.stderr.isatty():
                self._begin_bar(phase, done, total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)
        elif time.monotonic() - self._printed >= _PLAIN_INTERVAL_S:
            self._printed = time.monotonic()
            print(f"keye-jax: {self._line(done, total)}", file=sys.stderr, flush=True)

    def _begin_bar(self, phase: str, done: int, total: int) -> None:
        from rich import progress
        from rich.console import Console

        if self._bar is None:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                speed_estimate_period=120,
            )
            self._bar.start()
        self._task = self._bar.add_task(phase, total=total, completed=done)

    def _line(self, done: int, total: int) -> str:
        began, already = self._start
        rate = (done - already) / max(time.monotonic() - began, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
        return f"{self._phase}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s{left}"
