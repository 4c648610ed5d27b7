"""`keye-jax quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keye_jax import interrupts
from keye_jax.cli import options
from keye_jax.cli.convert import ConversionProgress
from keye_jax.errors import UserError
from keye_jax.quantization.schemes import GROUP


def quantize(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint; gs:// and s3:// URLs are taken.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make, an Orbax checkpoint.")],
    experts: options.Experts = None,
    attention: Annotated[
        str | None, typer.Option(help="Bits of attention's matrices: 'fp8' or 'int8'; as they are if left out.")
    ] = None,
    group: Annotated[int, typer.Option(help="Of int4: inputs that share a scale.")] = GROUP,
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
    import jax

    # The host does the work; an accelerator's memory would only be taken from others.
    jax.config.update("jax_platforms", "cpu")
    from convert.quantize import quantize_checkpoint

    interrupts.set_hint("the same command continues where this one stopped")
    with ConversionProgress() as progress:
        done = quantize_checkpoint(src, dst, quantization, overwrite=overwrite, progress=progress)
    print("relative error of the outputs")
    width = max(map(len, done.errors), default=0)
    for name, error in done.errors.items():
        print(f"  {name.ljust(width)}  {error:.4f}")
    print(
        f"{done.destination}: {quantization}; {done.nbytes:,} bytes of {done.before:,}, in {done.seconds:.0f} s"
        + (f" ({done.continued:,} bytes were there from an earlier run)" if done.continued else "")
    )
