"""Measuring the whole model at its real size, with random weights made on the device: `keye-jax bench`."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from keye_jax.cache import Cache
from keye_jax.config import KeyeConfig
from keye_jax.model.keye import Keye
from keye_jax.processor.positions import mrope_positions
from keye_jax.runner import Runner
from keye_jax.sampling import Sampling
from keye_jax.sharding import Layout

WEIGHT_SCALE = 0.02
"""Standard deviation of random matrices, as such models are initialised with."""

FRAME = 16
"""Side of a frame of the made-up video, in tokens."""

NOISE = 0.4
"""Share of each token's embedding that is its own; with 1 tokens are unrelated. With 0.4, sixteen neighbouring queries
of a model of the released size selected 7,830 of 131,072 keys together (mean of the layers; docs/performance.md)."""

PARTS = ("indexer", "selection", "attention", "experts", "collectives")
"""Named scopes of the model that device time is told apart by; what is in none of them is the rest."""

_COLLECTIVES = ("nccl", "all_gather", "allgather", "all_reduce", "allreduce", "reduce_scatter", "all_to_all")
"""What the names of kernels that move data between devices hold, whatever scope they are in."""

GREEDY = Sampling(temperature=0.0)

TAIL = 64
"""Last tokens of a prompt, whose selections are looked at."""

_GROUP = 16
_DECODE_STEPS = 16
_DECODE_SAMPLES = 5

SHORTEST_CONTEXT = (_DECODE_SAMPLES + 1) * _DECODE_STEPS
"""Tokens that are written to each sequence while a step is timed."""


def random_model(config: KeyeConfig, seed: int = 0, layout: Layout | None = None) -> Keye:
    """A model of random weights, the same on any layout, made where they are kept, one array at a time."""
    graph, state = nnx.split(Keye.abstract(config))
    flat = []
    for index, (path, variable) in enumerate(nnx.to_flat_state(state)):
        shape, dtype = variable.shape, variable.dtype
        sharding = layout.sharding(*variable.get_metadata("axes")) if layout else None
        if len(shape) == 1:
            array = _full(shape, 0 if path[-1] == "bias" else 1, dtype, sharding)
        else:
            array = _normal(np.uint32(seed), np.uint32(index), shape, dtype, sharding)
        flat.append((path, variable.replace(array)))
    return nnx.merge(graph, nnx.from_flat_state(flat))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _full(shape: tuple[int, ...], value: float, dtype: jnp.dtype, sharding: Sharding | None) -> jax.Array:
    return _on(jnp.full(shape, value, dtype), sharding)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _normal(
    seed: jax.Array, index: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding | None
) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), index)
    return _on((jax.random.normal(key, shape) * WEIGHT_SCALE).astype(dtype), sharding)


def _on(x: jax.Array, sharding: Sharding | None) -> jax.Array:
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A made-up video of frames of 16 x 16 tokens.

    Attributes:
      input_ids: int32 `[t]`, the token that frames stand for.
      positions: int32 `[3, t]`.
      embeds: `[t, embed]`, in the place of what the vision encoder would give.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    embeds: jax.Array

    @classmethod
    def video(
        cls, config: KeyeConfig, tokens: int, *, noise: float = NOISE, seed: int = 0, layout: Layout | None = None
    ) -> Prompt:
        """`tokens` tokens whose embeddings drift from one random vector to the next within a frame.

        Args:
          noise: from 0 to 1, the part of each embedding that is its own.
          layout: of the runner that reads it.
        """
        ids = np.full(tokens, config.video_token_id, np.int32)
        side = FRAME * config.vision_config.spatial_merge_size
        frames = np.tile([[1, side, side]], (-(-tokens // FRAME**2), 1))
        whole = np.full(len(frames) * FRAME**2, config.video_token_id, np.int32)
        positions, _ = mrope_positions(
            whole,
            np.zeros((0, 3), np.int32),
            frames,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            merge_size=config.vision_config.spatial_merge_size,
        )
        everywhere = layout.sharding() if layout else None
        embeds = _drift(np.uint32(seed), tokens, config.hidden_size, noise, config.jax_dtype, everywhere)
        return cls(ids, positions[:, :tokens], embeds)

    def upto(self, tokens: int) -> Prompt:
        """Its first tokens."""
        return Prompt(self.input_ids[:tokens], self.positions[:, :tokens], self.embeds[:tokens])


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _drift(
    seed: jax.Array, tokens: int, width: int, noise: float, dtype: jnp.dtype, sharding: Sharding | None
) -> jax.Array:
    anchors_key, noise_key = jax.random.split(jax.random.key(seed))
    anchors = jax.random.normal(anchors_key, (tokens // FRAME**2 + 2, width))
    frame, phase = jnp.divmod(jnp.arange(tokens), FRAME**2)
    angle = (phase / FRAME**2 * jnp.pi / 2)[:, None]
    smooth = jnp.cos(angle) * anchors[frame] + jnp.sin(angle) * anchors[frame + 1]
    own = jax.random.normal(noise_key, smooth.shape)
    return _on(((1 - noise**2) ** 0.5 * smooth + noise * own).astype(dtype), sharding)


@dataclasses.dataclass(frozen=True)
class Timing:
    """A measurement.

    Attributes:
      seconds: of a prompt, or of a step of decoding: the median.
      tokens_per_second: prompt tokens read, or tokens written by all sequences together.
      workspace_bytes: what a step needs beyond its arguments and results, from the compiler.
    """

    seconds: float
    tokens_per_second: float
    workspace_bytes: int


def compile_steps(
    runners: Iterable[Runner], prompts: Iterable[int], batches: Iterable[tuple[int, int]], *, traced: Runner | None
) -> None:
    """Compiles side by side all that `time_prefill`, `union_sizes` (of `traced`) and `time_decode` will need."""
    compiling = [
        *(functools.partial(traced.compile_trace, TAIL, tokens) for tokens in prompts if traced),
        *(functools.partial(runner.compile_prefill, tokens) for runner in runners for tokens in prompts),
        *(functools.partial(runner.compile_write, *sizes, GREEDY) for runner in runners for sizes in batches),
    ]
    # Processes of one job must compile in the same order.
    with ThreadPoolExecutor(1 if jax.process_count() > 1 else None) as pool:
        for done in [pool.submit(compile_one) for compile_one in compiling]:
            done.result()


def time_prefill(runner: Runner, prompt: Prompt, repeats: int) -> tuple[Timing, Cache]:
    """Reads `prompt` into an empty cache `repeats` times, compiled and warmed up before; also gives the last cache."""
    tokens = len(prompt.input_ids)
    workspace = runner.compile_prefill(tokens)
    _warm_up(runner, prompt)
    times, cache = [], None
    for _ in range(repeats):
        del cache
        cache = jax.block_until_ready(runner.new_cache(tokens))
        start = time.perf_counter()
        _, cache = jax.block_until_ready(runner.prefill(prompt.input_ids, prompt.positions, prompt.embeds, cache))
        times.append(time.perf_counter() - start)
    assert cache is not None, "repeats is 0"
    seconds = statistics.median(times)
    return Timing(seconds, tokens / seconds, workspace), cache


def _warm_up(runner: Runner, prompt: Prompt) -> None:
    """Reads as much of a prompt as runs every program that the whole of it needs."""
    tokens = len(prompt.input_ids)
    chunk = runner.chunk(tokens)
    last = runner.prefill_options(chunk, tokens)
    end = next(end for end in (*range(chunk, tokens, chunk), tokens) if runner.prefill_options(chunk, end) == last)
    read_prompt(runner, prompt.upto(end), capacity=tokens)


def read_prompt(runner: Runner, prompt: Prompt, *, capacity: int | None = None) -> Cache:
    """The cache after `prompt`, with room for `capacity` tokens."""
    cache = runner.new_cache(capacity or len(prompt.input_ids))
    return jax.block_until_ready(runner.prefill(prompt.input_ids, prompt.positions, prompt.embeds, cache)[1])


def union_sizes(runner: Runner, prompt: Prompt, cache: Cache) -> np.ndarray:
    """Distinct keys that 16 neighbouring queries select together, float `[layers]`: means over the last 64 queries.

    Args:
      cache: holds `prompt`, whose last tokens are read into it once more; donated.
    """
    before = len(prompt.input_ids) - TAIL
    cache = dataclasses.replace(cache, lengths=runner.put(np.full(len(cache.lengths), before, np.int32)))
    tail = prompt.input_ids[before:], prompt.positions[:, before:], prompt.embeds[before:]
    chunks = [found for _, _, found, _ in runner.trace(*tail, cache)]
    sizes = []
    for layer in zip(*chunks, strict=True):
        selected = np.concatenate([np.asarray(chunk.attention.selected)[0] for chunk in layer])
        groups = selected[:TAIL].reshape(TAIL // _GROUP, -1)
        sizes.append(np.mean([len(np.unique(group[group >= 0])) for group in groups]))
    return np.asarray(sizes)


def random_cache(runner: Runner, batch: int, context: int, length: int, seed: int = 0) -> Cache:
    """A cache of random keys and values with room for `context` tokens a sequence, `length` of them there."""
    cache = runner.new_cache(context, batch)
    leaves, tree = jax.tree.flatten(cache.layers)
    leaves = [_fill(np.uint32(seed), np.uint32(i), x, x.sharding) for i, x in enumerate(leaves)]
    lengths = runner.put(np.full(batch, length, np.int32))
    return dataclasses.replace(cache, layers=jax.tree.unflatten(tree, leaves), lengths=lengths)


@functools.partial(jax.jit, donate_argnums=2, static_argnums=3)
def _fill(seed: jax.Array, index: jax.Array, x: jax.Array, sharding: Sharding) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), index)
    # An argument that is not read would not be donated.
    return _on((jax.random.normal(key, x.shape) + x.astype(jnp.float32)).astype(x.dtype), sharding)


def time_decode(runner: Runner, batch: int, context: int) -> Timing:
    """Writes a few dozen tokens to each of `batch` sequences, the last of them with `context` tokens before it."""
    workspace = runner.compile_write(batch, context, GREEDY)
    cache = random_cache(runner, batch, context, context - SHORTEST_CONTEXT)
    tokens = runner.put(np.zeros(batch, np.int32))
    times = []
    for _ in range(_DECODE_SAMPLES + 1):
        start = time.perf_counter()
        tokens, cache = _write(runner, tokens, cache)
        times.append((time.perf_counter() - start) / _DECODE_STEPS)
    seconds = statistics.median(times[1:])
    return Timing(seconds, batch / seconds, workspace)


def _write(runner: Runner, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    delta, seeds = (runner.put(np.zeros(len(tokens), dtype)) for dtype in (np.int32, np.uint32))
    for _ in range(_DECODE_STEPS):
        tokens, cache = runner.write(tokens, delta, cache, seeds, GREEDY)
    return jax.block_until_ready(tokens), cache


def prefill_parts(runner: Runner, prompt: Prompt) -> dict[str, float]:
    """Device seconds of each part of the model while it reads `prompt`; see `device_seconds`."""
    _warm_up(runner, prompt)
    return device_seconds(lambda: read_prompt(runner, prompt))


def decode_parts(runner: Runner, batch: int, context: int) -> dict[str, float]:
    """Device seconds of each part of the model in one step of decoding; see `device_seconds`."""
    cache = random_cache(runner, batch, context, context - 2 * _DECODE_STEPS)
    tokens, cache = _write(runner, runner.put(np.zeros(batch, np.int32)), cache)
    parts = device_seconds(lambda: _write(runner, tokens, cache))
    return {part: seconds / _DECODE_STEPS for part, seconds in parts.items()}


def device_seconds(run: Callable[[], object]) -> dict[str, float]:
    """Seconds that each GPU's kernels take while `run` runs, by `PARTS` and "rest", from the profiler.

    On several GPUs the mean. A collective counts from when a GPU is ready for it, so it holds the wait for the others.
    Kernels in CUDA graphs do not tell which part they belong to: XLA must run without them.
    """
    totals: dict[str, float] = dict.fromkeys((*PARTS, "rest"), 0.0)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        (file,) = Path(directory).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    devices = set()
    with warnings.catch_warnings():
        # The types that jaxlib gives the profile's events belong to no module.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in profile.planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                for event in line.events:
                    devices.add(plane.name)
                    totals[_part(event)] += event.duration_ns * 1e-9
    return {part: seconds / max(1, len(devices)) for part, seconds in totals.items()}


def _part(event: Any) -> str:
    if any(name in event.name.lower() for name in _COLLECTIVES):
        return "collectives"
    scopes = str(dict(event.stats).get("name", "")).split("/")
    return next((scope for scope in reversed(scopes) if scope in PARTS), "rest")
