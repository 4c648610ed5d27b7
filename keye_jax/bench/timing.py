"""Timing prompts and steps of decode of the whole model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from keye_jax.bench.inputs import Prompt, on_devices
from keye_jax.kv_cache import PagePool
from keye_jax.runtime import lowering
from keye_jax.runtime.decode import DecodeState
from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams

MIXED_SAMPLING = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.6, top_p=0.95, top_k=20),
    SamplingParams(temperature=1.0, top_p=0.9, top_k=0),
    SamplingParams(temperature=0.8, top_k=0, top_p=1.0, min_p=0.05, repetition_penalty=1.1, presence_penalty=0.5),
)
"""How the rows of a timed batch draw, in turns."""

TAIL = 256
"""Last tokens of a prompt, whose selections are looked at."""

GROUPS = (16, 64, 256)
"""Numbers of neighbouring queries whose selections are united."""

DECODE_STEPS = 16
"""Steps of decode that are timed together."""

_DECODE_SAMPLES = 5

SHORTEST_CONTEXT = (_DECODE_SAMPLES + 1) * DECODE_STEPS
"""Tokens that are written to each sequence while a step is timed."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """A measurement.

    Attributes:
      seconds: of a prompt, of a prompt and its answer, or of a step of decode: the median.
      tokens_per_second: prompt tokens read, tokens of prompt and answer, or tokens written by all sequences together.
      workspace_bytes: what a step needs beyond its arguments and results, from the compiler.
    """

    seconds: float
    tokens_per_second: float
    workspace_bytes: int


def compile_steps(
    runtimes: Iterable[Runtime],
    prompts: Iterable[int],
    packs: Iterable[tuple[int, int]],
    batches: Iterable[tuple[int, int]],
    *,
    with_intermediates: Runtime | None,
) -> None:
    """Compiles side by side all that the functions below will need; `union_sizes` that of one runtime.

    Args:
      prompts: tokens of each.
      packs: prompts that are read together, `(prompts, tokens)`.
      batches: sequences that are decoded together, `(sequences, tokens)`.
    """
    programs = [
        *(
            lowering.intermediates_program(with_intermediates, min(TAIL, tokens), tokens)
            for tokens in prompts
            if with_intermediates
        ),
        *(
            program
            for runtime in runtimes
            for tokens in prompts
            for program in lowering.prefill_programs(runtime, tokens)
        ),
        *(lowering.packed_program(runtime, *pack) for runtime in runtimes for pack in packs),
        *(
            lowering.decode_program(runtime, _rows(runtime, batch), context)
            for runtime in runtimes
            for batch, context in batches
        ),
    ]
    lowering.compile_side_by_side(programs)


def time_prefill(runtime: Runtime, prompt: Prompt, repeats: int) -> tuple[Timing, PagePool, np.ndarray]:
    """Reads `prompt` into an empty pool `repeats` times, compiled and warmed up before.

    Returns:
      the timing, the last pool, and the pages that the prompt has in it.
    """
    tokens = len(prompt.input_ids)
    workspace = lowering.workspace_bytes(lowering.prefill_programs(runtime, tokens))
    warm_up(runtime, prompt)
    times, pool, tables = [], None, None
    for _ in range(repeats):
        del pool
        pool, tables = runtime.new_cache(1, tokens)
        jax.block_until_ready(pool)
        start = time.perf_counter()
        _, pool = jax.block_until_ready(runtime.prefill([prompt.segment(tables[0])], pool))
        times.append(time.perf_counter() - start)
    assert pool is not None and tables is not None, "repeats is 0"
    seconds = statistics.median(times)
    return Timing(seconds, tokens / seconds, workspace), pool, tables[0]


def time_packed_prefill(runtime: Runtime, prompt: Prompt, sequences: int, repeats: int) -> Timing:
    """Reads a number of sequences, each as long as `prompt` and all packed into shared chunks, `repeats` times."""
    tokens = len(prompt.input_ids)
    workspace = lowering.workspace_bytes([lowering.packed_program(runtime, sequences, tokens)])
    times = []
    for _ in range(repeats + 1):
        pool, tables = runtime.new_cache(sequences, tokens)
        segments = [prompt.segment(pages) for pages in tables]
        jax.block_until_ready(pool)
        start = time.perf_counter()
        jax.block_until_ready(runtime.prefill(segments, pool))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    return Timing(seconds, sequences * tokens / seconds, workspace)


def time_answer(runtime: Runtime, prompt: Prompt, answer: int, repeats: int) -> Timing:
    """Reads `prompt` into an empty pool and writes `answer` tokens to it, `repeats` times, warmed up before.

    The prompt's last logits give the first token. All are drawn greedily, one step after the other.
    """
    room = len(prompt.input_ids) + answer
    traced = [*lowering.prefill_programs(runtime, room), lowering.decode_program(runtime, _rows(runtime, 1), room)]
    workspace = lowering.workspace_bytes(traced)

    def run(prompt: Prompt, answer: int) -> float:
        pool, tables = runtime.new_cache(1, room)
        state = runtime.new_state(_rows(runtime, 1), tables.shape[1])
        tokens, pages = len(prompt.input_ids), tables[0]
        delta = int(prompt.positions.max()) + 1 - tokens
        # The draw counts the last token of the prompt as read.
        row = {"token": 0, "length": tokens - 1, "position_delta": delta, "pages": pages, "sampling": MIXED_SAMPLING[0]}
        jax.block_until_ready((pool, state))
        start = time.perf_counter()
        logits, pool = runtime.prefill([prompt.segment(pages)], pool)
        state, _ = runtime.begin_row(logits, 0, state, 0, **row)
        for _ in range(answer - 1):
            state, pool = runtime.decode_and_sample(state, pool)
        jax.block_until_ready(state.tokens)
        return time.perf_counter() - start

    run(_beginning(runtime, prompt), min(answer, 2))
    seconds = statistics.median(run(prompt, answer) for _ in range(repeats))
    return Timing(seconds, room / seconds, workspace)


def warm_up(runtime: Runtime, prompt: Prompt) -> None:
    """Reads as much of a prompt as runs every program that the whole of it needs."""
    read_prompt(runtime, _beginning(runtime, prompt), room=len(prompt.input_ids))


def _beginning(runtime: Runtime, prompt: Prompt) -> Prompt:
    tokens = len(prompt.input_ids)
    longest = runtime.prefill_chunk * runtime.rules.size("query_sequence")
    dense = min(runtime.dense_below, tokens)
    return prompt.upto(min(tokens, dense + longest))


def read_prompt(runtime: Runtime, prompt: Prompt, *, room: int | None = None) -> PagePool:
    """The pool after `prompt`, with room for `room` tokens."""
    pool, tables = runtime.new_cache(1, room or len(prompt.input_ids))
    return jax.block_until_ready(runtime.prefill([prompt.segment(tables[0])], pool)[1])


def union_sizes(runtime: Runtime, prompt: Prompt, pool: PagePool, pages: np.ndarray) -> dict[int, np.ndarray]:
    """Distinct keys that neighbouring queries select together: float `[layers]` for each of `GROUPS`.

    They are means over the groups among the last `TAIL` queries; a short prompt has no large groups.

    Args:
      pool, pages: as `time_prefill` gives them; the prompt's last tokens are read once more. The pool is donated.
    """
    tail = min(TAIL, len(prompt.input_ids))
    start = len(prompt.input_ids) - tail
    last = Prompt(prompt.input_ids[start:], prompt.positions[:, start:], prompt.embeds[start:])
    segment = dataclasses.replace(last.segment(pages), start=start)
    chunks = [found for _, _, found, _ in runtime.forward_with_intermediates(segment, pool)]
    sizes: dict[int, list[float]] = {group: [] for group in GROUPS if group <= tail}
    for layer in zip(*chunks, strict=True):
        selected = np.concatenate([np.asarray(chunk.attention.selected) for chunk in layer])
        for group, found in sizes.items():
            unions = selected[: tail // group * group].reshape(tail // group, -1)
            found.append(float(np.mean([len(np.unique(union[union >= 0])) for union in unions])))
    return {group: np.asarray(found) for group, found in sizes.items()}


def random_batch(
    runtime: Runtime, batch: int, context: int, length: int, seed: int = 0
) -> tuple[DecodeState, PagePool]:
    """A batch of sequences of random keys and values, which draw as `MIXED_SAMPLING` says.

    Args:
      batch: how many sequences.
      context: tokens that each has room for.
      length: tokens that each has.
    """
    pool, tables = runtime.new_cache(batch, context)
    pool = _filled(pool, seed)
    state = runtime.new_state(_rows(runtime, batch), tables.shape[1])
    for row, (pages, sampling) in enumerate(zip(tables, itertools.cycle(MIXED_SAMPLING), strict=False)):
        state = runtime.set_row(state, row, token=0, length=length, position_delta=0, pages=pages, sampling=sampling)
    return state, pool


def random_pool(runtime: Runtime, pages: int, seed: int = 0) -> PagePool:
    """A pool of random keys and values."""
    return _filled(runtime.new_pool(pages), seed)


def _filled(pool: PagePool, seed: int) -> PagePool:
    def fill(index: int, x: jax.Array) -> jax.Array:
        # A sharding commits what was not, and steps are compiled again for a committed pool.
        return _fill(np.uint32(seed), np.uint32(index), x, x.sharding if x.committed else None)

    leaves, tree = jax.tree.flatten(pool)
    return jax.tree.unflatten(tree, [fill(index, x) for index, x in enumerate(leaves)])


@functools.partial(jax.jit, donate_argnums=2, static_argnums=3)
def _fill(seed: jax.Array, index: jax.Array, x: jax.Array, sharding: Sharding | None) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), index)
    # An argument that is not read would not be donated.
    return on_devices((jax.random.normal(key, x.shape) + x.astype(jnp.float32)).astype(x.dtype), sharding)


def _rows(runtime: Runtime, batch: int) -> int:
    """Rows of a batch of this number of sequences: the same number on each home."""
    homes = runtime.rules.size("batch")
    return -(-batch // homes) * homes


def time_decode(runtime: Runtime, batch: int, context: int) -> Timing:
    """Writes a few dozen tokens to each of `batch` sequences, the last of them with `context` tokens before it."""
    workspace = lowering.workspace_bytes([lowering.decode_program(runtime, _rows(runtime, batch), context)])
    seconds = time_steps(runtime, *random_batch(runtime, batch, context, context - SHORTEST_CONTEXT))
    return Timing(seconds, batch / seconds, workspace)


def time_steps(runtime: Runtime, state: DecodeState, pool: PagePool) -> float:
    """Seconds of a step of decode, which writes `SHORTEST_CONTEXT` tokens to each active row: the median."""
    times = []
    for _ in range(_DECODE_SAMPLES + 1):
        start = time.perf_counter()
        state, pool = decode_steps(runtime, state, pool)
        times.append((time.perf_counter() - start) / DECODE_STEPS)
    return statistics.median(times[1:])


def decode_steps(runtime: Runtime, state: DecodeState, pool: PagePool) -> tuple[DecodeState, PagePool]:
    """`DECODE_STEPS` steps of decode, finished on the device."""
    for _ in range(DECODE_STEPS):
        state, pool = runtime.decode_and_sample(state, pool)
    jax.block_until_ready(state.tokens)
    return state, pool
