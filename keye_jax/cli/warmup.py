"""`keye-jax warmup`: compile the programs of a server or a batch job, so that these compile none."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from keye_jax.cli import batch, options, serve
from keye_jax.cli.groups import EngineGroup, MediaGroup, ModelGroup, at_least, expanded
from keye_jax.errors import UserError, shorten


@expanded
def warmup(
    command: Annotated[str, typer.Argument(help="Whose programs: serve or batch.")],
    checkpoint: options.Checkpoint,
    rows: Annotated[
        int | None, typer.Option(help="Answers that are written at once; the command's if left out.")
    ] = None,
    max_context: Annotated[
        str | None, typer.Option(help="Of serve: most tokens of a prompt with its answer; the model's if left out.")
    ] = None,
    *,
    media: MediaGroup,
    engine: EngineGroup,
    model: ModelGroup,
) -> int:
    """Compile the programs of a server or a batch job, so that these compile none.

    Give it the options of that command. The programs are kept in the compilation cache.
    """
    settings = model.settings()
    at_least(1, rows=rows)
    if command == "serve":
        engine_options = serve.engine_options(engine, model, rows=rows or serve.ROWS, max_context=max_context)
    elif command == "batch":
        if max_context is not None:
            raise UserError("--max-context is an option of serve; batch has none")
        engine_options = batch.engine_options(engine, rows=rows or batch.ROWS)
    else:
        raise UserError(f"COMMAND is {shorten(command)}; it must be serve or batch")
    model.start()
    options.check_sharding_is_given(model.sharding)

    from convert import buckets, kind_of
    from keye_jax.jobs.batch import open_engine
    from keye_jax.processor.options import read_options
    from keye_jax.runtime.compilation_cache import cache_directory

    directory = buckets.local(checkpoint)
    kind_of(directory)
    chosen = media.given()
    for kind in ("image", "video"):
        read_options(kind, chosen, "", shared=True)
    start = time.monotonic()
    with open_engine(str(directory), options=engine_options, sharding=model.sharding, media=chosen, **settings):
        pass
    print(f"all programs are compiled after {time.monotonic() - start:.0f} s", file=sys.stderr)
    print(f"they are kept in {cache_directory()}", file=sys.stderr)
    return 0
