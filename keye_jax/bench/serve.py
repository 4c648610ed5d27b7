"""`python -m keye_jax.bench.serve`: what HTTP, heat and grammars add to the engine, with random weights.

Requests are text completions of random token ids. They go to one engine, straight or over HTTP from another process, at
once. Figures are the time to the first token, and the time between two tokens while all answers are written. Of the
engine they are those of its own clock; of HTTP those at which pieces of text reach the client. Beside them stands the
step of the bare decode loop, with as many rows.

Then 16 requests, in turns with and without a grammar, say what grammars add to a step. An engine that counts heat does
so for all its rows, so heat is what a second engine takes more than one without it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from keye_jax import presets
from keye_jax.bench.engine import bare_rate
from keye_jax.bench.inputs import random_model
from keye_jax.bench.masks import SCHEMA
from keye_jax.bench.timing import SHORTEST_CONTEXT
from keye_jax.config import KeyeConfig
from keye_jax.engine.engine import Engine
from keye_jax.engine.generation_config import GenerationDefaults
from keye_jax.engine.options import EngineOptions
from keye_jax.engine.request import Request
from keye_jax.processor import Processor
from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams
from keye_jax.serve.batches import Batches
from keye_jax.serve.files import FileStore
from keye_jax.serve.options import ServeOptions
from keye_jax.serve.server import Server, listen
from keye_jax.serve.service import Service
from keye_jax.testing import write_processor_files

type Times = list[tuple[float, np.ndarray]]
"""Of each answer when it was asked for, and when its tokens came, in seconds of one clock."""

SAMPLING = SamplingParams(temperature=0.6, top_p=0.95, top_k=20)
_LEVELS = (0.5, 0.95)
# An answer that does not end, of the parts that a usual one has.
_ENDLESS = {"type": "array", "items": SCHEMA, "minItems": 1000}


@dataclasses.dataclass(frozen=True)
class Latency:
    """Milliseconds of several streams at once.

    Attributes:
      streams: how many.
      over: "engine" or "http".
      first: time to the first token: median and 95th percentile.
      gap: time between two tokens while all are written: median and 95th percentile.
    """

    streams: int
    over: str
    first: tuple[float, float]
    gap: tuple[float, float]


class Load:
    """Requests of random prompts to an engine.

    Args:
      engine: answers them.
      prompt, tokens: of each prompt, and of each answer while all are written. Prompts are read one after the other,
        and the first answers are written meanwhile.
    """

    def __init__(self, engine: Engine, prompt: int, tokens: int):
        self._engine, self._prompt, self._tokens = engine, prompt, tokens
        self._rng = np.random.default_rng(0)
        processor = engine.processor
        self._no_end = dict.fromkeys(engine.defaults.end_tokens, -100.0)
        # All tokens but those of bytes, and those that stand for media.
        self._ids = np.setdiff1d(
            np.arange(300, engine.runtime.config.vocab_size), (processor.image_token_id, processor.video_token_id)
        )

    def _most(self, count: int) -> int:
        """Tokens of an answer, so that all `count` of them are written together for a while."""
        return self._tokens + count * self._engine.scheduler_config.chunks_left(self._prompt, 0)

    def prompts(self, count: int) -> list[list[int]]:
        """Prompts of random tokens, of which none is in the prefix cache."""
        return self._rng.choice(self._ids, (count, self._prompt)).tolist()

    def straight(self, count: int, **fields: Any) -> Times:
        """Asks `count` requests at once, with further fields of `Request`."""
        asked = []
        for prompt in self.prompts(count):
            most = self._most(count)
            request = Request(prompt=prompt, sampling=SAMPLING, max_tokens=most, logit_bias=self._no_end, **fields)
            asked.append((time.perf_counter(), self._engine.submit(request)))
        return [(begun, begun + np.asarray(handle.result().choices[0].token_seconds)) for begun, handle in asked]

    def over_http(self, port: int, count: int) -> Times:
        """The same over HTTP."""
        drawn: dict[str, Any] = {"temperature": SAMPLING.temperature, "top_p": SAMPLING.top_p, "top_k": SAMPLING.top_k}
        drawn |= {"max_tokens": self._most(count), "logit_bias": {str(token): -100 for token in self._no_end}}
        bodies = [{"prompt": prompt, **drawn} for prompt in self.prompts(count)]
        asked = json.dumps({"port": port, "path": "/v1/completions", "bodies": bodies})
        command = [sys.executable, "-m", "keye_jax.bench.streams"]
        done = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, check=True)
        return [(begun, np.asarray(times)) for begun, times in json.loads(done.stdout)]


def gaps_ms(times: Times) -> np.ndarray:
    """Milliseconds between two tokens of an answer, while all answers are written."""
    first, last = max(each[0] for _, each in times), min(each[-1] for _, each in times)
    return 1e3 * np.concatenate([np.diff(each[(each >= first) & (each <= last)]) for _, each in times])


def latency(streams: int, over: str, ask: Callable[[], Times], rounds: int) -> Latency:
    """The figures of several rounds."""
    first, gaps = [], []
    for _ in range(rounds):
        times = ask()
        first += [1e3 * (each[0] - begun) for begun, each in times]
        gaps.append(gaps_ms(times))
    quantiles = [tuple(np.quantile(values, _LEVELS).tolist()) for values in (first, np.concatenate(gaps))]
    return Latency(streams, over, *quantiles)


def median_gaps(asks: Sequence[Callable[[], Times]], rounds: int) -> list[float]:
    """The median time between two tokens of each way to ask, in milliseconds; they take turns."""
    gaps: list[list[np.ndarray]] = [[] for _ in asks]
    for _ in range(rounds):
        for ask, found in zip(asks, gaps, strict=True):
            found.append(gaps_ms(ask()))
    return [float(np.median(np.concatenate(found))) for found in gaps]


def added(without: float, having: float) -> dict[str, float]:
    """What something adds to a step: both times in milliseconds, and their ratio less 1."""
    return {"without_ms": without, "with_ms": having, "share": having / without - 1}


@contextlib.contextmanager
def serving(engine: Engine) -> Iterator[int]:
    """A server for an engine, in a thread; gives its port."""
    options = ServeOptions(port=0)
    service = Service(options, "random", FileStore(None, options.max_stored_bytes))
    batches = Batches(service, None, lambda: "random")
    server, listener = Server(service, batches), listen(options.host, 0)
    opened: Any = SimpleNamespace(engine=engine, error=None, done=True)
    thread = threading.Thread(target=lambda: asyncio.run(server.run(listener, opened)))
    thread.start()
    try:
        while service.engine is None:
            time.sleep(0.01)
        yield listener.getsockname()[1]
    finally:
        server.drain()
        thread.join()
        service.close()
        batches.close()


def measure(
    engine: Engine, runtime: Runtime, streams: Sequence[int], prompt: int, tokens: int, rounds: int
) -> list[Latency]:
    """Latencies of each number of streams, straight and over HTTP."""
    load, found = Load(engine, prompt, tokens), []
    with serving(engine) as port:
        load.straight(1)  # what is made at the first use
        load.over_http(port, 1)
        for count in streams:
            repeated = max(2, rounds // count)
            found.append(latency(count, "engine", lambda count=count: load.straight(count), repeated))
            found.append(latency(count, "http", lambda count=count: load.over_http(port, count), repeated))
    return found


def main() -> int:
    """Parses the command line, measures and prints."""
    from llguidance import LLMatcher

    parser = argparse.ArgumentParser(prog="python -m keye_jax.bench.serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=presets.RELEASED, help="a config.json")
    parser.add_argument("--layers", type=int, help="decoder layers to use, the first ones")
    parser.add_argument("--streams", default="1,32", help="requests at once, several numbers with commas")
    parser.add_argument("--rows", type=int, default=16, help="requests at once for heat and grammars")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=8, help="times that one stream is asked")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    arguments = parser.parse_args()
    config = KeyeConfig.from_file(arguments.config)
    if arguments.layers:
        config = dataclasses.replace(config, num_hidden_layers=arguments.layers)
    streams = [int(count) for count in arguments.streams.split(",")]
    # An answer also goes on while the prompts of others are read, of which each has fewer chunks than that.
    chunks = -(-arguments.prompt // EngineOptions.small_chunk)
    most = arguments.tokens + chunks * max(*streams, arguments.rows)
    context = max(arguments.prompt + most, 2 * SHORTEST_CONTEXT)
    runtime = Runtime(random_model(config), config)
    sizes = arguments.prompt, arguments.tokens
    print(
        f"{jax.devices()[0].device_kind}, {config.num_hidden_layers} layers, prompts of {sizes[0]} tokens", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="keye-jax-") as directory:
        write_processor_files(directory, config)
        # Nothing is asked about images, so warm-up compiles one small one.
        processor = Processor.from_checkpoint(directory, config, defaults={"max_pixels": 64 * 784})
        defaults = GenerationDefaults.from_checkpoint(directory)

        @contextlib.contextmanager
        def opened(rows: int, heat: bool) -> Iterator[Engine]:
            length = -(-context // 512) * 512 + 512
            options = EngineOptions(
                rows=rows, cache_tokens=rows * length, max_context=length, media_workers=0, selection_heat=heat
            )
            with Engine(runtime, processor, defaults, options) as engine:
                print(f"{rows} rows are warm after {engine.warmup():.0f} s", flush=True)
                yield engine

        with opened(max(streams), heat=False) as engine:
            found = measure(engine, runtime, streams, *sizes, arguments.rounds)
            shapes = engine.scheduler_config
        grammar = LLMatcher.grammar_from_json_schema(_ENDLESS, overrides={"whitespace_flexible": False})
        count, compiled = arguments.rows, 0
        with opened(count, heat=False) as engine:
            load = Load(engine, *sizes)
            load.straight(1, grammar=grammar)
            asks = (lambda: load.straight(count)), (lambda: load.straight(count, grammar=grammar))
            plain, masked = median_gaps(asks, 3)
            compiled += engine.stats().compilations
        with opened(count, heat=True) as engine:
            load = Load(engine, *sizes)
            load.straight(1, selection_heat=True)
            (heated,) = median_gaps((lambda: load.straight(count, selection_heat=True),), 3)
            compiled += engine.stats().compilations
        masks, heat = added(plain, masked), added(plain, heated)
    steps = {count: 1e3 * count / bare_rate(runtime, shapes, count, context) for count in streams}
    print("  ".join(f"{name:>12}" for name in ("streams", "over", "first", "first 95%", "gap", "gap 95%", "bare step")))
    for each in found:
        numbers = "  ".join(f"{value:>12.2f}" for value in (*each.first, *each.gap, steps[each.streams]))
        print(f"{each.streams:>12}  {each.over:>12}  {numbers}  ms")
    for name, values in (("selection heat", heat), ("masks", masks)):
        print(
            f"{name} of {arguments.rows} rows: {values['without_ms']:.2f} ms a step without, {values['with_ms']:.2f} "
            f"with; {values['share']:+.1%}"
        )
    print(f"compilations after warm-up: {compiled}")
    if arguments.json:
        latencies = [dataclasses.asdict(each) | {"bare_step": steps[each.streams]} for each in found]
        arguments.json.write_text(json.dumps({"latencies_ms": latencies, "heat": heat, "masks": masks}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
