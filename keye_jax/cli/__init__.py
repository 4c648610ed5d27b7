"""The `keye-jax` command: one small module per subcommand."""

# ruff: noqa: E402
from __future__ import annotations

from keye_jax import interrupts

# Before the other imports, which take a while.
interrupts.handle_if_command("keye-jax", __name__)

import errno
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from keye_jax.cli import (
    batch,
    bench,
    convert,
    doctor,
    eval,
    frames,
    generate,
    inspect,
    paths,
    plan,
    quantize,
    serve,
    train,
    verify,
    warmup,
)
from keye_jax.errors import UserError
from keye_jax.runtime import distributed
from pallas_kernels.errors import UnsupportedError


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Keeps typer from ending at Ctrl-C without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Abort from error


app = paths.App(
    name="keye-jax",
    cls=_Group,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("convert")(convert.convert)
app.command("quantize")(quantize.quantize)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("plan")(plan.plan)
app.command("frames")(frames.frames)
app.add_typer(eval.app, name="eval")
app.command("batch")(batch.batch)
app.command("serve")(serve.serve)
app.command("warmup")(warmup.warmup)
app.command("train")(train.train)
app.command("generate", cls=generate.InOrder)(generate.generate)
app.command("doctor")(doctor.doctor)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=doctor.print_versions, help="Print versions and devices."),
    ] = False,
) -> None:
    """Keye-VL-2.0-30B-A3B in JAX: convert a checkpoint, inspect, verify, measure and train it, ask about videos."""


# What a file system can answer although the program is right. Any other OSError is a defect.
_OF_THE_MACHINE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EBUSY, errno.EXDEV),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENOLCK, errno.EMFILE, errno.ENFILE, errno.ENODEV, errno.ENXIO),
}


def run(command: typer.Typer, arguments: list[str]) -> int:
    """Runs `command` with `arguments` and returns its exit code: a user's mistake is one line on stderr and 2."""
    interrupts.set_hint()
    try:
        try:
            code = command(arguments or ["--help"], standalone_mode=False)
        finally:
            interrupts.end_if_told()
        distributed.finish()
    except typer.TyperException as error:
        print(f"keye-jax: {error.format_message()}", file=sys.stderr)
        return error.exit_code
    except (UserError, UnsupportedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _OF_THE_MACHINE:
            raise
        distributed.fail(str(error), 2)
        print(f"keye-jax: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        distributed.fail("interrupted", 130)
        sys.stderr.write(interrupts.line(signal.SIGINT))
        return 130
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the `keye-jax` command."""
    interrupts.handle()
    with interrupts.raised():
        code = run(app, sys.argv[1:])
    sys.exit(code)
