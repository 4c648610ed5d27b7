"""`python -m convert` is `keye-jax convert`."""

import sys

import typer

from keye_jax.cli import run
from keye_jax.cli.convert import convert

app = typer.Typer(name="keye-jax convert", add_completion=False, pretty_exceptions_enable=False)
app.command()(convert)

if __name__ == "__main__":
    sys.exit(run(app, sys.argv[1:]))
