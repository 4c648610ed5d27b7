"""`keye-jax serve`: answer requests over HTTP."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keye_jax.cli import options
from keye_jax.cli.batch import follow
from keye_jax.cli.groups import EngineGroup, MediaGroup, ModelGroup, at_least, expanded
from keye_jax.errors import UserError
from keye_jax.runtime import distributed

if TYPE_CHECKING:
    from keye_jax.engine.options import EngineOptions

KEY_VARIABLE = "KEYE_JAX_API_KEY"
ROWS = 16
"""Answers that are written at once, if nobody says."""


@expanded
def serve(
    checkpoint: options.Checkpoint,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen; 0 for a free port.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Of the model in answers; the folder's if left out.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File with the key that clients send; {KEY_VARIABLE} if left out.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of web pages that may use the server; may be repeated.")
    ] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Fetch http(s) URLs of public addresses.")
    ] = False,
    media_root: Annotated[Path | None, typer.Option(help="Folder whose files requests may name.")] = None,
    max_body: Annotated[int, typer.Option(help="Most bytes of a request, uploads excepted.")] = 64 << 20,
    max_file: Annotated[int, typer.Option(help="Most bytes of an uploaded file.")] = 8 << 30,
    max_stored: Annotated[int, typer.Option(help="Most bytes of all uploaded files.")] = 64 << 30,
    max_media: Annotated[int, typer.Option(help="Most bytes of an image or a video.")] = 8 << 30,
    max_source_pixels: Annotated[
        int, typer.Option(help="Most pixels of an image, or of a frame of a video, as it is stored.")
    ] = 100_000_000,
    max_seconds: Annotated[float, typer.Option(help="Longest video, in seconds.")] = 6 * 3600.0,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer, and if none are asked for.")] = None,
    max_queue: Annotated[int, typer.Option(help="Answers that wait; more are refused.")] = 256,
    max_connections: Annotated[int, typer.Option(help="Connections at once.")] = 1024,
    heartbeat: Annotated[float, typer.Option(help="Seconds of silence before a stream gets a comment.")] = 15.0,
    stall: Annotated[float, typer.Option(help="Seconds that a client may pause while it sends or reads.")] = 30.0,
    grace: Annotated[float, typer.Option(help="Seconds for running answers after SIGTERM.")] = 60.0,
    watchdog: Annotated[float, typer.Option(help="Seconds without a step of work until /health fails.")] = 300.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write what is asked into the log.")] = False,
    state_dir: Annotated[Path | None, typer.Option(help="Folder that keeps files and batches between runs.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Folder for traces, which POST /debug/profile begins.")] = None,
    *,
    media: MediaGroup,
    rows: Annotated[int, typer.Option(help="Answers that are written at once.")] = ROWS,
    max_context: Annotated[
        str | None, typer.Option(help="Most tokens of a prompt with its answer, such as 128K; the model's if left out.")
    ] = None,
    chunks_between: Annotated[int, typer.Option(help="Chunks of prompts that are read before answers go on.")] = 1,
    target_gap: Annotated[float | None, typer.Option(help="Most milliseconds between two tokens of an answer.")] = None,
    engine: EngineGroup,
    warmup: options.Warmup = True,
    model: ModelGroup,
) -> int:
    """Answer requests over HTTP, in the shape of OpenAI's interface, with a page for the browser at /."""
    settings = model.settings()
    at_least(1, rows=rows, chunks_between=chunks_between, max_source_pixels=max_source_pixels, max_media=max_media)
    _check_extra()
    from keye_jax.processor.guard import MediaGuard
    from keye_jax.serve.options import ServeOptions

    limits = ServeOptions(
        host=host,
        port=port,
        api_key=_api_key(api_key_file),
        cors_origins=tuple(cors_origin or ()),
        max_queue=max_queue,
        max_connections=max_connections,
        max_body_bytes=max_body,
        max_file_bytes=max_file,
        max_stored_bytes=max_stored,
        max_tokens=max_tokens,
        heartbeat_s=heartbeat,
        stall_s=stall,
        grace_s=grace,
        watchdog_s=watchdog,
        log_prompts=log_prompts,
        state_dir=state_dir,
        profile_dir=profile,
    )
    guard = MediaGuard(root=media_root, max_bytes=max_media, max_pixels=max_source_pixels, max_seconds=max_seconds)
    model.start()
    options.check_sharding_is_given(model.sharding)

    from convert import buckets, kind_of
    from keye_jax.jobs.batch import open_engine
    from keye_jax.processor.options import read_options

    directory = buckets.local(checkpoint)
    kind_of(directory)
    chosen = media.given()
    for kind in ("image", "video"):
        read_options(kind, chosen, "", shared=True)
    opener = functools.partial(
        open_engine,
        str(directory),
        warmup=warmup,
        options=engine_options(
            engine,
            model,
            rows=rows,
            max_context=max_context,
            chunks_between=chunks_between,
            target_gap_ms=target_gap,
        ),
        sharding=model.sharding,
        allow_remote=allow_remote,
        guard=guard,
        media=chosen,
        **settings,
    )
    if not distributed.is_main():
        return follow(opener)
    from keye_jax.serve.server import listen
    from keye_jax.serve.server import serve as run

    listener = listen(host, port)
    distributed.tell("serves")
    return run(limits, directory, name or checkpoint.resolve().name, opener, listener)


def engine_options(
    engine: EngineGroup, model: ModelGroup, *, rows: int, max_context: str | None, **others: Any
) -> EngineOptions:
    """The options of a server's engine. Raises UserError."""
    return engine.engine_options(
        rows=rows,
        selection_heat=model.attention == "sparse",  # the page shows it
        max_context=None if max_context is None else options.tokens("--max-context", max_context),
        **others,
    )


def _check_extra() -> None:
    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing; a server needs: pip install 'keye-jax[serve]'") from error


def _api_key(file: Path | None) -> bytes | None:
    """The key of a file, or of the environment; None if neither has one."""
    if file is None:
        key, shown = os.environ.get(KEY_VARIABLE, "").encode(), KEY_VARIABLE
        if not key:
            return None
    else:
        shown = f"--api-key-file is {str(file)!r}, whose content"
        try:
            key = file.read_bytes()
        except OSError as error:
            raise UserError(f"--api-key-file is {str(file)!r}; it must be a file that can be read") from error
    key = key.strip()
    if not key or not all(0x21 <= byte <= 0x7E for byte in key):
        raise UserError(f"{shown} is not a key; it must be one line of visible ASCII characters")
    return key
