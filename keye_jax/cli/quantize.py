"""`keye-jax quantize`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from keye_jax import interrupts
from keye_jax.cli import options
from keye_jax.cli.convert import ConversionProgress
from keye_jax.errors import UserError
from keye_jax.quantization.schemes import GROUP

_INTERVAL_S = 30.0


def quantize(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint; gs:// and s3:// URLs are taken.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make, an Orbax checkpoint.")],
    experts: options.Experts = None,
    attention: Annotated[
        str | None, typer.Option(help="Bits of attention's matrices: 'fp8' or 'int8'; as they are if left out.")
    ] = None,
    group: Annotated[int, typer.Option(help="Of int4: inputs that share a scale.")] = GROUP,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of int4: requests, as for batch. The model reads them first, and scales follow from its activations.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the checkpoint in DST; begin again where DST.partial is another's."),
    ] = False,
) -> None:
    """Makes a checkpoint whose experts, nine tenths of the model, have 8 or 4 bits.

    All else stays as it is: router, norms, indexer, vision encoder and head, and attention by default. A run that was
    stopped goes on when the same command is run again. `keye-jax convert` makes safetensors of the result.
    """
    quantization = options.quantization(experts, attention, group)
    if not quantization:
        raise UserError("give --experts, --attention or both; without them nothing has fewer bits")
    if calibrate is not None and experts != "int4":
        raise UserError(f"--experts is {experts!r}; --calibrate goes with 'int4', whose scales it chooses")
    if calibrate is None:
        import jax

        # The host does the work; an accelerator's memory would only be taken from others.
        jax.config.update("jax_platforms", "cpu")
    from convert.quantize import quantize_checkpoint

    interrupts.set_hint("the same command continues where this one stopped")
    with ConversionProgress() as progress:
        calibration = None
        if calibrate is not None:
            from keye_jax.jobs.calibration import PromptCalibration
            from keye_jax.runtime.compilation_cache import enable_compilation_cache

            enable_compilation_cache()
            calibration = PromptCalibration(src, calibrate, progress=CalibrationProgress())
        done = quantize_checkpoint(
            src, dst, quantization, calibration=calibration, overwrite=overwrite, progress=progress
        )
    print("relative error of the outputs" + ("" if calibrate is None else ", of experts for the calibration's inputs"))
    width = max(map(len, done.errors), default=0)
    for name, error in done.errors.items():
        without = "" if error.uncalibrated is None else f"  ({error.uncalibrated:.4f} without calibration)"
        print(f"  {name.ljust(width)}  {error.outputs:.4f}{without}")
    print(
        f"{done.destination}: {quantization}; {done.nbytes:,} bytes of {done.before:,}, in {done.seconds:.0f} s"
        + (f" ({done.continued:,} bytes were there from an earlier run)" if done.continued else "")
    )


class CalibrationProgress:
    """Says on stderr how many tokens the model has read: at the first, every 30 seconds, and at the last."""

    def __init__(self) -> None:
        self._began, self._printed = time.monotonic(), 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._printed >= _INTERVAL_S or done == total:
            self._printed = now
            rate = done / max(now - self._began, 1e-9)
            print(f"keye-jax: calibrate: {done:,} of {total:,} tokens, {rate:,.0f}/s", file=sys.stderr, flush=True)
