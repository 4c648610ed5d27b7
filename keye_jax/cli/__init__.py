"""The `keye-jax` command: one small module per subcommand."""

from __future__ import annotations

import errno
import sys

import typer

from keye_jax.cli import batch, bench, convert, eval, frames, generate, inspect, paths, plan, train, verify
from keye_jax.errors import UserError
from keye_jax.runtime import distributed
from pallas_kernels.errors import UnsupportedError

app = paths.App(
    name="keye-jax",
    help="Keye-VL-2.0-30B-A3B in JAX: convert a checkpoint, inspect, verify, measure and train it, ask about videos.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("plan")(plan.plan)
app.command("frames")(frames.frames)
app.add_typer(eval.app, name="eval")
app.command("batch")(batch.batch)
app.command("train")(train.train)
app.command("generate", cls=generate.InOrder)(generate.generate)


# What a file system can answer although the program is right. Any other OSError is a defect.
_OF_THE_MACHINE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EBUSY, errno.EXDEV),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENOLCK, errno.EMFILE, errno.ENFILE, errno.ENODEV, errno.ENXIO),
}


def run(command: typer.Typer, arguments: list[str]) -> int:
    """Runs `command` with `arguments` and returns its exit code: a user's mistake is one line on stderr and 2."""
    try:
        code = command(arguments or ["--help"], standalone_mode=False)
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
        print("keye-jax: interrupted", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the `keye-jax` command."""
    sys.exit(run(app, sys.argv[1:]))
