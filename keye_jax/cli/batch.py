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

from keye_jax.cli import options
from keye_jax.errors import UserError
from keye_jax.runtime import distributed

if TYPE_CHECKING:
    from keye_jax.jobs.batch import Engine
    from keye_jax.jobs.report import Tally

# Exit codes; SIGNALLED plus the number of a signal.
SOME_FAILED, STOPPED, SIGNALLED = 1, 3, 128
# Told to the other processes of a job before process 0 opens its engine.
_OPENS = "opens its engine"


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
    fps: options.Fps = None,
    max_frames: options.MaxFrames = None,
    num_frames: options.NumFrames = None,
    start: options.Start = None,
    end: options.End = None,
    subtitles: Annotated[str | None, typer.Option(help="'container': subtitles that are in the videos.")] = None,
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    total_pixels: options.TotalPixels = None,
    allow_remote: options.AllowRemote = False,
    rows: Annotated[int, typer.Option(help="Answers that are written at once.")] = 32,
    cache_tokens: Annotated[
        str | None,
        typer.Option(help="Tokens of all requests at once that the cache holds, such as 640K; what fits if left out."),
    ] = None,
    optimistic: Annotated[
        bool,
        typer.Option("--optimistic", help="Begin more answers than the cache surely holds; some may pause."),
    ] = False,
    media_workers: Annotated[int, typer.Option(help="Processes that decode videos and images.")] = 2,
    frame_cache: Annotated[Path | None, typer.Option(help="Folder that keeps decoded frames between runs.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests that the engine has at once, media included; twice --rows if left out.")
    ] = None,
    warmup: Annotated[bool, typer.Option(help="Compile all programs before the first request.")] = True,
    retries: Annotated[int, typer.Option(help="How often to try again what may pass later.")] = 2,
    grace: Annotated[float, typer.Option(help="Seconds for running requests after SIGINT or SIGTERM.")] = 20.0,
    ray: Annotated[int | None, typer.Option(help="Workers on a Ray cluster, in place of this machine.")] = None,
    ray_gpus: Annotated[float, typer.Option(help="GPUs of each Ray worker.")] = 1.0,
    attention: options.Attention = "sparse",
    implementation: options.Implementation = None,
    dense_below: options.DenseBelow = 0,
    indexer_dtype: options.IndexerDtype = None,
    prefill_chunk: options.PrefillChunk = None,
    dtype: options.Dtype = "checkpoint",
    verify_checksums: options.VerifyChecksums = False,
    sharding: options.Sharding = None,
    coordinator: options.Coordinator = None,
    processes: options.Processes = None,
    process_id: options.ProcessId = None,
) -> int:
    """Answer many requests from a file, or the same question about each video of a folder.

    Results go to --output, in any order, each exactly once. The same command resumes a job that was killed.
    """
    chosen = options.attention_options(attention, implementation, indexer_dtype)
    dense = options.dense_limit(dense_below)
    chunk = options.prefill_chunk_size(prefill_chunk)
    cast = options.parameter_dtype(dtype)
    _at_least(1, rows=rows, media_workers=media_workers, concurrency=concurrency, max_tokens=max_tokens, ray=ray)
    _at_least(0, retries=retries, grace=grace, ray_gpus=ray_gpus)
    if ray is None:
        distributed.start(coordinator, processes, process_id, lost_code=STOPPED)
        options.check_sharding_is_given(sharding)
    elif coordinator or processes is not None or process_id is not None:
        raise UserError("--coordinator, --processes and --process-id do not go with --ray")

    from convert import buckets, kind_of
    from keye_jax.engine.generation_config import GenerationDefaults
    from keye_jax.engine.options import EngineOptions
    from keye_jax.jobs.batch import Answerer, Batch, open_engine, token_text
    from keye_jax.jobs.journal import JobStoppedError, Journal, checkpoint_hash
    from keye_jax.jobs.lines import Shard, count_lines, read_lines
    from keye_jax.jobs.report import Progress, Tally
    from keye_jax.processor.options import read_options

    directory = buckets.local(checkpoint)
    kind_of(directory)
    asked = options.given(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    sampling = dataclasses.replace(GenerationDefaults.from_checkpoint(directory).sampling, **asked)
    media = options.given(
        fps=fps,
        max_frames=max_frames,
        num_frames=num_frames,
        start=start,
        end=end,
        subtitles=subtitles,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        total_pixels=total_pixels,
    )
    for kind in ("image", "video"):
        read_options(kind, media, "", shared=True)
    part = Shard.from_environment(os.environ) if shard is None else Shard.parse(shard)
    output = part.output(output)
    # What answers depend on, by the names of options.
    settings = dataclasses.asdict(sampling) | media
    settings |= {"max_tokens": max_tokens, "shard": str(part), "rows": rows, "attention": attention}
    settings |= {"implementation": implementation, "dense_below": dense, "indexer_dtype": indexer_dtype}
    settings |= {"prefill_chunk": chunk, "dtype": dtype, "sharding": sharding}
    outstanding = concurrency or 2 * rows * (ray or 1)
    # No one waits for a first word, so free rows are filled before others go on.
    shared = {"rows": rows, "chunks_between": rows, "optimistic": optimistic, "media_workers": media_workers}
    shared |= {} if cache_tokens is None else {"cache_tokens": options.tokens("--cache-tokens", cache_tokens)}
    opener = functools.partial(
        open_engine,
        # A worker on another machine looks for a bucket's small files itself.
        str(directory if ray is None else checkpoint),
        warmup=warmup,
        options=EngineOptions(**shared, frame_cache=frame_cache),
        sharding=sharding,
        dtype=cast,
        attention=chosen,
        prefill_chunk=chunk,
        dense_below=dense,
        verify_checksums=verify_checksums,
        allow_remote=allow_remote,
        media=media,
    )
    if not distributed.is_main():
        return _follow(opener)
    try:
        source = _input(input, videos, prompt, output)
        digest, lines = count_lines(source)
        key = {"input": digest, "checkpoint": checkpoint_hash(directory), "options": settings}
        with Journal(output, key) as journal, source.open("rb") as file:
            tally, ended = Tally(part.size(lines), journal.succeeded, journal.failures), None
            if tally.done == tally.total:
                print(f"all {tally.total:,} requests have a result in {output}", file=sys.stderr)
            else:
                with _engine(opener, ray, ray_gpus, outstanding) as engine:
                    tally.begin()
                    name, text = checkpoint.resolve().name, token_text(directory)
                    answerer = Answerer(engine, name, text, sampling, max_tokens, retries)
                    job = Batch(
                        *(answerer, journal, read_lines(file, part), tally, Progress()),
                        concurrency=outstanding,
                        grace_s=grace,
                    )
                    ended = asyncio.run(job.run())
                _write_report(tally, output)
    except JobStoppedError as error:
        print(f"keye-jax: {error}", file=sys.stderr)
        return STOPPED
    if ended is not None:
        rest = f"{tally.total - tally.done:,} of {tally.total:,} requests have no result yet"
        print(f"keye-jax: stopped by {ended.name}; {rest}, and the same command goes on", file=sys.stderr)
        return SIGNALLED + ended
    if tally.failed:
        print(f"keye-jax: {tally.failed:,} of {tally.total:,} requests failed; see {output}", file=sys.stderr)
        return SOME_FAILED
    return 0


def _follow(opener: Callable[[], Any]) -> int:
    """Does what process 0 says until its job is done or stopped, which signals are left to."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if distributed.tell(""):
        with opener():
            pass
    return 0


def _at_least(least: int, **values: float | None) -> None:
    """Refuses values of options, by name, that are below `least`."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")


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


def _write_report(tally: Tally, output: Path) -> None:
    """Writes the report and its plot beside the output. What cannot be written is said, and does no harm."""
    from keye_jax.jobs.journal import write_whole

    try:
        write_whole(output.with_name(f"{output.name}.report.json"), [json.dumps(tally.report(), indent=2).encode()])
        tally.plot(output.with_name(f"{output.name}.report.svg"))
    except ModuleNotFoundError:
        print("keye-jax: no plot, which needs Matplotlib: pip install 'keye-jax[bench]'", file=sys.stderr)
    except OSError as error:
        print(f"keye-jax: the report cannot be written ({error.strerror or error})", file=sys.stderr)
