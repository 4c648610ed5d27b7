"""`python -m keye_jax.bench.jobs`: an offline job with random weights, and the share of time that the GPU works.

The lines ask about texts of random length. They go through all that `keye-jax batch` does. The profiler watches a
second, shorter job: it cannot begin while the GPU works. The share is that of the second job's whole time in which a
kernel runs. The profiler makes gaps between kernels longer, so an estimate for the first job stands beside it; the
last rows of a job are not all busy, so traced lines had better be a multiple of the rows.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from keye_jax import presets
from keye_jax.bench.inputs import random_model
from keye_jax.config import KeyeConfig
from keye_jax.engine.engine import Engine
from keye_jax.engine.generation_config import GenerationDefaults
from keye_jax.engine.options import EngineOptions
from keye_jax.jobs.batch import Answerer, Batch, token_text
from keye_jax.jobs.journal import Journal
from keye_jax.jobs.lines import Shard, count_lines, read_lines
from keye_jax.jobs.report import Progress, Tally
from keye_jax.processor import Processor
from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams
from keye_jax.testing import write_processor_files

_WORDS = (
    "a",
    "red",
    "ball",
    "rolls",
    "over",
    "the",
    "table",
    "while",
    "blue",
    "square",
    "turns",
    "and",
    "clock",
    "runs",
)


def write_lines(path: Path, count: int, words: tuple[int, int], seed: int = 0) -> None:
    """Writes requests about texts.

    Args:
      words: fewest and most words of a text.
    """
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for number in range(count):
            text = " ".join(rng.choice(_WORDS, rng.integers(*words, endpoint=True)))
            body = {"messages": [{"role": "user", "content": text}]}
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def timed_job(
    engine: Engine, directory: Path, name: str, count: int, words: tuple[int, int], tokens: int
) -> tuple[float, dict[str, Any]]:
    """Answers `count` lines, each with at most `tokens` tokens; returns the seconds and the job's report."""
    lines, output = directory / f"{name}.requests.jsonl", directory / f"{name}.results.jsonl"
    write_lines(lines, count, words)
    sampling = SamplingParams(temperature=0.6, top_p=0.95, top_k=20)
    digest, total = count_lines(lines)
    tally = Tally(total, 0, {})
    with Journal(output, {"input": digest, "checkpoint": "", "options": {}}) as journal, lines.open("rb") as file:
        begun = time.perf_counter()
        tally.begin()
        answerer = Answerer(engine, "random", token_text(directory), sampling, tokens)
        job = Batch(
            *(answerer, journal, read_lines(file, Shard.parse("0/1")), tally, Progress()),
            concurrency=2 * engine.options.rows,
            grace_s=60.0,
        )
        asyncio.run(job.run())
        return time.perf_counter() - begun, tally.report()


_COPIES = ("MemcpyH2D", "MemcpyD2H")
_SHORT_GAP_S, _LONG_GAP_S = 20e-6, 1e-3


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """What GPUs did under the profiler, the mean of all of them.

    Attributes:
      busy_s: seconds in which at least one kernel ran. Copies from and to the host are no kernels.
      gaps_s: seconds between kernels: in gaps of less than 20 us, of less than 1 ms, and of more. The first are mostly
        within a program, the last while a GPU waits for the host.
    """

    busy_s: float
    gaps_s: tuple[float, float, float]


def kernel_time(spans: Iterable[tuple[float, float]]) -> KernelTime:
    """That of one GPU from the beginning and the end of each of its kernels, in seconds and any order."""
    ordered = sorted(spans)
    busy, until, gaps = 0.0, ordered[0][0], [0.0, 0.0, 0.0]
    for start, end in ordered:
        gap = max(0.0, start - until)
        gaps[(gap >= _SHORT_GAP_S) + (gap >= _LONG_GAP_S)] += gap
        busy += max(0.0, end - max(start, until))
        until = max(end, until)
    return KernelTime(busy, (gaps[0], gaps[1], gaps[2]))


def traced_kernel_time(directory: Path) -> KernelTime | None:
    """That of a profiler's directory; None if no GPU ran any kernel."""
    (file,) = directory.rglob("*.xplane.pb")
    found = []
    with warnings.catch_warnings():
        # The types that jaxlib gives the profile's events belong to no module.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            spans = [
                (event.start_ns * 1e-9, (event.start_ns + event.duration_ns) * 1e-9)
                for line in plane.lines
                if line.name.startswith("Stream")
                for event in line.events
                if not event.name.startswith(_COPIES)
            ]
            if spans:
                found.append(kernel_time(spans))
    if not found:
        return None
    gaps = np.mean([each.gaps_s for each in found], axis=0).tolist()
    return KernelTime(float(np.mean([each.busy_s for each in found])), (gaps[0], gaps[1], gaps[2]))


def main() -> int:
    """Parses the command line, runs the job and prints."""
    parser = argparse.ArgumentParser(prog="python -m keye_jax.bench.jobs", description=__doc__)
    parser.add_argument("--config", type=Path, default=presets.RELEASED, help="a config.json")
    parser.add_argument("--layers", type=int, help="decoder layers to use, the first ones")
    parser.add_argument("--lines", type=int, default=1000, help="lines of the job")
    parser.add_argument("--words", type=int, nargs=2, default=(200, 800), help="fewest and most words of a line")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rows", type=int, default=32, help="width of the engine's batch")
    parser.add_argument("--cache-tokens", type=int, default=65536, help="tokens that the page pool holds")
    parser.add_argument("--prefill-chunk", type=int, help="tokens of a large chunk")
    parser.add_argument("--prompts-together", type=int, default=1, help="small chunks that one step reads")
    parser.add_argument("--traced-lines", type=int, default=128, help="lines of a second job, under the profiler")
    arguments = parser.parse_args()
    config = KeyeConfig.from_file(arguments.config)
    if arguments.layers:
        config = dataclasses.replace(config, num_hidden_layers=arguments.layers)
    runtime = Runtime(random_model(config), config, prefill_chunk=arguments.prefill_chunk)
    options = EngineOptions(
        rows=arguments.rows,
        cache_tokens=arguments.cache_tokens,
        prompts_together=arguments.prompts_together,
        chunks_between=arguments.rows,
        prefix_cache=False,
    )
    asked = tuple(arguments.words), arguments.tokens
    with tempfile.TemporaryDirectory(prefix="keye-jax-") as folder:
        directory = Path(folder)
        tiny = KeyeConfig.from_file(presets.TINY)
        write_processor_files(directory, tiny)
        processor = Processor.from_checkpoint(directory, tiny, defaults={"max_pixels": 256 * 784})
        with Engine(runtime, processor, GenerationDefaults(SamplingParams(), frozenset()), options) as engine:
            warm = engine.warmup(lambda done, total: print(f"{done} of {total} programs", flush=True))
            print(
                f"{jax.devices()[0].device_kind}, {config.num_hidden_layers} layers, warm-up {warm:.0f} s", flush=True
            )
            seconds, report = timed_job(engine, directory, "first", arguments.lines, *asked)
            print(json.dumps(report))
            print(f"{arguments.lines} lines in {seconds:.1f} s", flush=True)
            settings = jax.profiler.ProfileOptions()
            settings.host_tracer_level = settings.python_tracer_level = 0
            with jax.profiler.trace(directory / "trace", profiler_options=settings):
                traced, _ = timed_job(engine, directory, "traced", arguments.traced_lines, *asked)
            print(f"compilations after warm-up: {engine.stats().compilations}", flush=True)
        if kernels := traced_kernel_time(directory / "trace"):
            print(f"{arguments.traced_lines} lines under the profiler in {traced:.1f} s")
            short, long, longest = kernels.gaps_s
            print(f"kernels run {100 * kernels.busy_s / traced:.1f}% of that time")
            print(f"gaps between them: below 20 us {short:.2f} s, below 1 ms {long:.2f} s, longer ones {longest:.2f} s")
            share = kernels.busy_s / arguments.traced_lines * arguments.lines / seconds
            print(f"with as much time in kernels for each line, they ran {100 * share:.1f}% of the first job's time")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
