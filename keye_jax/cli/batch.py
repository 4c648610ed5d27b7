"""`keye-jax batch`: answer many requests from a file, or the same question about each video of a folder."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keye_jax import interrupts
from keye_jax.cli import options
from keye_jax.cli.groups import EngineGroup, MediaGroup, ModelGroup, at_least, expanded
from keye_jax.errors import UserError
from keye_jax.runtime import distributed

if TYPE_CHECKING:
    from keye_jax.engine.options import EngineOptions
    from keye_jax.jobs.batch import Engine
    from keye_jax.jobs.report import Tally

ROWS = 32
"""Answers that are written at once, if nobody says."""
# Exit codes.
SOME_FAILED, STOPPED = 1, 3
# Told to the other processes of a job before process 0 opens its engine.
_OPENS = "opens its engine"


@expanded
def batch(
    checkpoint: options.Checkpoint,
    output: Annotated[Path, typer.Option(help="File of results, a line each. The same command resumes it.")],
    input: Annotated[Path | None, typer.Option(help="File of requests, a line each.")] = None,
    videos: Annotated[str | None, typer.Option(help="Pattern of video files, in place of --input.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask about each of --videos.")] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="The part of the lines to answer, from 0/N; of all if left out.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer, if a line does not say.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="If a line does not say; the checkpoint's if left out.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="If a line does not say; the checkpoint's if left out.")] = None,
    top_k: Annotated[int | None, typer.Option(help="If a line does not say; the checkpoint's if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random draws, if a line does not say.")] = 0,
    *,
    media: MediaGroup,
    subtitles: Annotated[str | None, typer.Option(help="'container': subtitles that are in the videos.")] = None,
    allow_remote: options.AllowRemote = False,
    rows: Annotated[int, typer.Option(help="Answers that are written at once.")] = ROWS,
    engine: EngineGroup,
    warmup: options.Warmup = True,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests that the engine has at once, media included; twice --rows if left out.")
    ] = None,
    retries: Annotated[int, typer.Option(help="How often to try again what may pass later.")] = 2,
    grace: Annotated[float, typer.Option(help="Seconds for running requests after SIGINT or SIGTERM.")] = 20.0,
    ray: Annotated[int | None, typer.Option(help="Workers on a Ray cluster, in place of this machine.")] = None,
    ray_gpus: Annotated[float, typer.Option(help="GPUs of each Ray worker.")] = 1.0,
    model: ModelGroup,
) -> int:
    """Answer many requests from a file, or the same question about each video of a folder.

    Results go to --output, in any order, each exactly once. The same command resumes a job that was killed.
    """
    settings = model.settings()
    at_least(1, rows=rows, concurrency=concurrency, max_tokens=max_tokens, ray=ray)
    at_least(0, retries=retries, grace=grace, ray_gpus=ray_gpus)
    if ray is None:
        model.start(lost_code=STOPPED)
        options.check_sharding_is_given(model.sharding)
    elif model.coordinator or model.processes is not None or model.process_id is not None:
        raise UserError("--coordinator, --processes and --process-id do not go with --ray")

    from convert import buckets, kind_of
    from keye_jax.engine.generation_config import GenerationDefaults
    from keye_jax.jobs.batch import Answerer, Batch, open_engine, token_text
    from keye_jax.jobs.journal import JobStoppedError, Journal, checkpoint_hash
    from keye_jax.jobs.lines import Shard, count_lines, read_lines
    from keye_jax.jobs.report import Progress, Tally
    from keye_jax.processor.options import read_options

    directory = buckets.local(checkpoint)
    kind_of(directory)
    asked = options.given(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    sampling = dataclasses.replace(GenerationDefaults.from_checkpoint(directory).sampling, **asked)
    chosen = media.given() | options.given(subtitles=subtitles)
    for kind in ("image", "video"):
        read_options(kind, chosen, "", shared=True)
    environment = dict(os.environ)
    if distributed.process_count() > 1:
        environment.pop("JOB_COMPLETION_INDEX", None)  # of a pod that answers together with the others
    part = Shard.from_environment(environment) if shard is None else Shard.parse(shard)
    output = part.output(output)
    # What answers depend on, by the names of options.
    key_options = dataclasses.asdict(sampling) | chosen | {"max_tokens": max_tokens, "shard": str(part), "rows": rows}
    key_options |= {"attention": model.attention, "implementation": model.implementation, "sharding": model.sharding}
    key_options |= {name: settings[name] for name in ("dense_below", "prefill_chunk", "dtype")}
    key_options |= {"indexer_dtype": model.indexer_dtype, "cache_dtype": model.cache_dtype}
    key_options |= {"activation_dtype": model.activation_dtype}
    if engine.prompts_together != 1:
        key_options["prompts_together"] = engine.prompts_together
    outstanding = concurrency or 2 * rows * (ray or 1)
    opener = functools.partial(
        open_engine,
        # A worker on another machine looks for a bucket's small files itself.
        str(directory if ray is None else checkpoint),
        warmup=warmup,
        options=engine_options(engine, rows=rows),
        sharding=model.sharding,
        allow_remote=allow_remote,
        media=chosen,
        **settings,
    )
    if not distributed.is_main():
        return follow(opener)
    try:
        source = _input(input, videos, prompt, output)
        digest, lines = count_lines(source)
        key = {"input": digest, "checkpoint": checkpoint_hash(directory), "options": key_options}
        with Journal(output, key) as journal, source.open("rb") as file:
            tally, ended = Tally(part.size(lines), journal.succeeded, journal.failures), None
            if tally.done == tally.total:
                print(f"all {tally.total:,} requests have a result in {output}", file=sys.stderr)
            else:
                with _engine(opener, ray, ray_gpus, outstanding) as opened:
                    tally.begin()
                    name, text = checkpoint.resolve().name, token_text(directory)
                    answerer = Answerer(opened, name, text, sampling, max_tokens, retries)
                    job = Batch(
                        *(answerer, journal, read_lines(file, part), tally, Progress()),
                        concurrency=outstanding,
                        grace_s=grace,
                    )
                    distributed.take_passed_on(job.pass_signal)
                    ended = asyncio.run(job.run())
                _write_report(tally, output, plot=ended is None)
    except JobStoppedError as error:
        print(f"keye-jax: {error}", file=sys.stderr)
        return STOPPED
    if ended is not None:
        rest = f"{tally.total - tally.done:,} of {tally.total:,} requests have no result yet"
        return interrupts.say_stopped(ended, f"; {rest}, and the same command goes on")
    if tally.failed:
        print(f"keye-jax: {tally.failed:,} of {tally.total:,} requests failed; see {output}", file=sys.stderr)
        return SOME_FAILED
    return 0


def engine_options(engine: EngineGroup, *, rows: int) -> EngineOptions:
    """The options of a job's engine. Raises UserError."""
    # No one waits for a first word, so free rows are filled before others go on.
    return engine.engine_options(rows=rows, chunks_between=rows)


def follow(opener: Callable[[], Any]) -> int:
    """Does what process 0 says until its job is done or stopped; Ctrl-C is left to it, SIGTERM is passed on to it."""
    passed: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        passed.append(number)
        distributed.pass_on(number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, pass_on)
    if distributed.tell(""):
        with opener():
            pass
    return interrupts.SIGNALLED + passed[0] if passed else 0


def _input(file: Path | None, videos: str | None, prompt: str | None, output: Path) -> Path:
    """The file of requests; for `--videos` it is written beside the output."""
    from keye_jax.jobs.journal import JobStoppedError, write_whole
    from keye_jax.jobs.lines import video_lines

    if (file is None) == (videos is None):
        raise UserError("give either --input or --videos")
    if (videos is None) != (prompt is None):
        raise UserError("--videos and --prompt go together")
    if file is not None:
        if not file.is_file():
            raise UserError(f"--input is {str(file)!r}; it must be a file that is there")
        return file
    assert videos is not None and prompt is not None
    lines = list(video_lines(videos, prompt))
    written = output.with_name(f"{output.stem}.requests.jsonl")
    try:
        write_whole(written, lines)
    except OSError as error:
        raise JobStoppedError(f"{written} cannot be written ({error.strerror or error})") from error
    print(f"{len(lines):,} videos, whose requests are in {written}", file=sys.stderr)
    return written


@contextlib.contextmanager
def _engine(opener: Any, workers: int | None, gpus: float, concurrency: int) -> Iterator[Engine]:
    """The engine of this process, or those of workers on a Ray cluster."""
    if workers is None:
        start = time.monotonic()
        distributed.tell(_OPENS)
        with opener() as engine:
            ready = f"the engine is ready after {time.monotonic() - start:.0f} s"
            print(f"{ready}; its cache holds {engine.cache_tokens:,} tokens", file=sys.stderr)
            yield engine
        return
    from keye_jax.jobs import ray

    ray.start()
    try:
        yield ray.RayEngines(opener, workers=workers, gpus=gpus, concurrency=concurrency)
    finally:
        ray.stop()


def _write_report(tally: Tally, output: Path, *, plot: bool) -> None:
    """Writes the report and its plot beside the output. What cannot be written is said, and does no harm.

    Args:
      plot: no, where a signal has told the command to end soon: Matplotlib takes seconds to import.
    """
    from keye_jax.jobs.journal import write_whole

    try:
        write_whole(output.with_name(f"{output.name}.report.json"), [json.dumps(tally.report(), indent=2).encode()])
        if plot:
            tally.plot(output.with_name(f"{output.name}.report.svg"))
    except ModuleNotFoundError:
        print("keye-jax: no plot, which needs Matplotlib: pip install 'keye-jax[bench]'", file=sys.stderr)
    except OSError as error:
        print(f"keye-jax: the report cannot be written ({error.strerror or error})", file=sys.stderr)
