"""`python -m keye_jax.bench.engine`: an engine under load, with random weights, beside the bare decode loop.

A cell has a number of requests at once, each with a prompt of random tokens. Figures are of the time in which all of
them write: output tokens a second, and the time between two tokens of an answer. The bare loop runs the engine's own
program of decode from the prompts' ends on, with as many rows active, and nothing else. For cells of one request there
is also the loop of a batch of one row, once with the engine's page table and once with one of that context alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from keye_jax import presets
from keye_jax.bench.inputs import random_model
from keye_jax.bench.timing import MIXED_SAMPLING, SHORTEST_CONTEXT, random_pool, time_decode, time_steps
from keye_jax.config import KeyeConfig
from keye_jax.engine.engine import Engine
from keye_jax.engine.generation_config import GenerationDefaults
from keye_jax.engine.options import EngineOptions
from keye_jax.engine.plan import SchedulerConfig
from keye_jax.engine.request import Request
from keye_jax.page_allocator import pages_for
from keye_jax.processor import Processor, PromptPlan
from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams
from keye_jax.testing import write_processor_files


@dataclasses.dataclass(frozen=True)
class Cell:
    """What was measured of a number of requests at once.

    Attributes:
      requests, context: how many, and tokens of each prompt.
      tokens_per_second: of all answers together.
      gaps_ms: milliseconds between two tokens of an answer: median, 95th and 99th percentile, and the largest.
    """

    requests: int
    context: int
    tokens_per_second: float
    gaps_ms: tuple[float, float, float, float]


_COLUMNS = ("requests", "context", "tokens/s", "bare", "ratio", "median", "95%", "99%", "largest ms")


def prompt_of(engine: Engine, rng: np.random.Generator, tokens: int) -> PromptPlan:
    """A prompt of random tokens, none of which stands for an image in the model or in the small stand-in tokenizer."""
    low, high = (300, 1000) if engine.runtime.config.vocab_size < 100_000 else (3000, 100_000)
    return PromptPlan(tuple(rng.integers(low, high, tokens).tolist()), (), (), False)


@dataclasses.dataclass(frozen=True)
class OneRow:
    """Tokens a second of the loop of a batch of one row.

    Attributes:
      engine_table: with a page table as wide as the engine's.
      own_table: with a page table for the context alone.
    """

    engine_table: float
    own_table: float


def bare_rate(
    runtime: Runtime, config: SchedulerConfig, requests: int, context: int, *, rows: int | None = None
) -> float:
    """Tokens a second of the bare loop, for `requests` sequences of random keys, which begin with `context` tokens.

    Args:
      rows: of the batch; as many as the engine's if left out.
    """
    pool = random_pool(runtime, config.pages_per_shard * config.homes * config.turns)
    state = runtime.new_state(rows or config.rows, config.table_width)
    each = pages_for(context + SHORTEST_CONTEXT)
    for row, sampling in zip(range(requests), itertools.cycle(MIXED_SAMPLING), strict=False):
        pages = np.arange(row * each, (row + 1) * each, dtype=np.int32)
        state = runtime.set_row(state, row, token=0, length=context, position_delta=0, pages=pages, sampling=sampling)
    return requests / time_steps(runtime, state, pool)


def one_row(runtime: Runtime, config: SchedulerConfig, context: int) -> OneRow:
    """Rates of a batch of one row, for a sequence of random keys that begins with `context` tokens."""
    return OneRow(
        bare_rate(runtime, config, 1, context, rows=1),
        time_decode(runtime, 1, context + SHORTEST_CONTEXT).tokens_per_second,
    )


def measure(engine: Engine, requests: int, context: int, tokens: int) -> Cell:
    """Asks an engine a number of requests at once, and for enough tokens that all write `tokens` of them together.

    Prompts are read one after the other, and the first answers are written meanwhile.
    """
    meanwhile = requests * engine.scheduler_config.chunks_left(context, 0)
    rng = np.random.default_rng(requests * context)
    sampling = SamplingParams(temperature=0.6, top_p=0.95, top_k=20)
    handles, begun = [], []
    for _ in range(requests):
        plan = prompt_of(engine, rng, context)
        begun.append(time.perf_counter())
        handles.append(engine.submit(Request(plan=plan, sampling=sampling, max_tokens=meanwhile + tokens)))
    times = [
        start + np.asarray(handle.result().choices[0].token_seconds)
        for start, handle in zip(begun, handles, strict=True)
    ]
    first, last = max(each[0] for each in times), min(each[-1] for each in times)
    inside = [each[(each >= first) & (each <= last)] for each in times]
    gaps = 1e3 * np.concatenate([np.diff(each) for each in inside])
    written = sum(len(each) - 1 for each in inside)
    quantiles = np.quantile(gaps, (0.5, 0.95, 0.99, 1.0)).tolist()
    return Cell(requests, context, float(written / (last - first)), tuple(quantiles))


def measure_gap(engine: Engine, running: int, context: int, prompt: int, tokens: int) -> dict[str, Any]:
    """Reads a long prompt while others write; says what that does to their gaps, and how long it takes."""
    rng = np.random.default_rng(0)
    sampling = SamplingParams(temperature=0.6)

    def ask(length: int, count: int) -> Any:
        return engine.submit(Request(plan=prompt_of(engine, rng, length), sampling=sampling, max_tokens=count))

    alone = ask(prompt, 1).result().timings.first_token
    begun = time.perf_counter()
    handles = [ask(context, tokens) for _ in range(running)]
    while engine.stats().scheduler.running < running:
        time.sleep(0.01)
    time.sleep(2)
    start = time.perf_counter()
    beside = ask(prompt, 1).result().timings.first_token
    end = time.perf_counter()
    for handle in handles:
        handle.cancel()
    quiet, loud = [], []
    for handle in handles:
        seconds = begun + np.asarray(handle.result().choices[0].token_seconds)
        gaps = 1e3 * np.diff(seconds)
        quiet.append(gaps[(seconds[1:] > start - 1.5) & (seconds[1:] < start)])
        loud.append(gaps[(seconds[1:] > start) & (seconds[1:] < end)])
    levels = (0.5, 0.95, 0.99, 1.0)
    return {
        "prompt": prompt,
        "running": running,
        "context": context,
        "alone_s": alone,
        "beside_s": beside,
        "quiet_ms": np.quantile(np.concatenate(quiet), levels).tolist(),
        "loud_ms": np.quantile(np.concatenate(loud), levels).tolist(),
    }


def same_tokens(engine: Engine, count: int, tokens: int) -> tuple[int, int]:
    """Asks prompts alone and beside others, greedy and sampled; counts those with the same tokens, and all.

    Half of them are asked alone first. The second time, most of a prompt comes from the prefix cache.
    """
    rng = np.random.default_rng(1)
    samplings = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_p=0.95, top_k=0, seed=7)
    requests = [
        Request(plan=prompt_of(engine, rng, 3000 + 37 * number), sampling=samplings[number % 2], max_tokens=tokens)
        for number in range(engine.options.rows)
    ]

    def ask(chosen: list[Request]) -> list[tuple[int, ...]]:
        return [handle.result().choices[0].token_ids for handle in [engine.submit(request) for request in chosen]]

    first, second = requests[: count // 2], requests[count // 2 : count]
    alone = [ask([request])[0] for request in first]
    together = ask(requests)[:count]
    alone += [ask([request])[0] for request in second]
    return sum(one == other for one, other in zip(alone, together, strict=True)), len(alone)


def main() -> int:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m keye_jax.bench.engine", description=__doc__)
    parser.add_argument("--config", type=Path, default=presets.RELEASED, help="a config.json")
    parser.add_argument("--layers", type=int, help="decoder layers to use, the first ones")
    parser.add_argument("--rows", type=int, default=32, help="width of the engine's batch")
    parser.add_argument("--cache-tokens", type=int, default=131072, help="tokens that the page pool holds")
    parser.add_argument("--cells", default="1x2048,8x2048,32x2048", help="requests x tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--prefill-chunk", type=int, help="tokens of a large chunk")
    parser.add_argument("--long-prompt", type=int, default=0, help="read a prompt of this length beside eight answers")
    parser.add_argument("--target-gap-ms", type=float, help="as of the engine")
    parser.add_argument("--promise", action="store_true", help="compare tokens of requests alone and beside others")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    arguments = parser.parse_args()
    config = KeyeConfig.from_file(arguments.config)
    if arguments.layers:
        config = dataclasses.replace(config, num_hidden_layers=arguments.layers)
    cells: list[tuple[int, int]] = []
    for cell in arguments.cells.split(","):
        requests, context = cell.split("x")
        cells.append((int(requests), int(context)))
    runtime = Runtime(random_model(config), config, prefill_chunk=arguments.prefill_chunk)
    options = EngineOptions(rows=arguments.rows, cache_tokens=arguments.cache_tokens)
    found, gap = [], None
    with tempfile.TemporaryDirectory(prefix="keye-jax-") as directory:
        tiny = KeyeConfig.from_file(presets.TINY)
        write_processor_files(directory, tiny)
        processor = Processor.from_checkpoint(directory, tiny, defaults={"max_pixels": 256 * 784})
        defaults = GenerationDefaults(SamplingParams(), frozenset())
        with Engine(runtime, processor, defaults, options) as engine:
            print(f"{jax.devices()[0].device_kind}, {config.num_hidden_layers} layers, {arguments.rows} rows")
            warm = engine.warmup(lambda done, total: print(f"{done} of {total} programs", flush=True))
            print(f"warm-up {warm:.0f} s", flush=True)
            for cell in cells:
                found.append(measure(engine, *cell, arguments.tokens))
                print(found[-1], flush=True)
            if arguments.promise:
                same, asked = same_tokens(engine, min(8, arguments.rows), 96)
                print(f"the same tokens alone and beside others: {same} of {asked} requests", flush=True)
            print(f"compilations after warm-up: {engine.stats().compilations}", flush=True)
            shapes = engine.scheduler_config
        if arguments.long_prompt:
            options = dataclasses.replace(options, target_gap_ms=arguments.target_gap_ms)
            with Engine(runtime, processor, defaults, options) as engine:
                engine.warmup()
                gap = measure_gap(engine, 8, 2048, arguments.long_prompt, 2048)
                print(json.dumps(gap), flush=True)
    rates = [bare_rate(runtime, shapes, *cell) for cell in cells]
    print("  ".join(f"{name:>10}" for name in _COLUMNS))
    for cell, rate in zip(found, rates, strict=True):
        numbers = (cell.tokens_per_second, rate, cell.tokens_per_second / rate, *cell.gaps_ms)
        print("  ".join([f"{cell.requests:>10}", f"{cell.context:>10}", *(f"{x:>10.2f}" for x in numbers)]), flush=True)
    cell_figures = []
    for cell, rate in zip(found, rates, strict=True):
        figures = dataclasses.asdict(cell) | {"bare_tokens_per_second": rate}
        if cell.requests == 1:
            alone = one_row(runtime, shapes, cell.context)
            figures["one_row_tokens_per_second"] = dataclasses.asdict(alone)
            wide, own = (cell.tokens_per_second / each for each in (alone.engine_table, alone.own_table))
            print(
                f"one request of {cell.context} tokens: {wide:.2f} of a batch of one row with the engine's page table, "
                f"{alone.engine_table:.1f} tokens/s; {own:.2f} with a table of {cell.context} tokens, "
                f"{alone.own_table:.1f} tokens/s",
                flush=True,
            )
        cell_figures.append(figures)
    if arguments.json:
        whole = {"warmup_s": warm, "cells": cell_figures, "gap": gap}
        arguments.json.write_text(json.dumps(whole, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
