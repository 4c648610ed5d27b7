"""Timing on an accelerator: medians over programs of several calls, and the rates that results are compared with."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST_CALLS = 16
"""Most calls of one program."""

COPIES_BYTES = 32 * 10**9
"""Most bytes of the copies of one program's arguments."""

_FEWEST_CALLS = 4
_PROGRAM_SECONDS = 4e-3
_SAMPLES = 7
_SAMPLE_SECONDS = 0.02
_SLOW_SECONDS, _VERY_SLOW_SECONDS = 0.1, 1.0

Arguments = tuple[Any, ...]


def number_of_calls(floor_seconds: float, specs: Sequence[Any]) -> int:
    """The number of calls to put into one program: about 4 ms of calls, and no more than memory holds arguments for.

    Args:
      floor_seconds: least seconds of one call.
      specs: the arguments of one call, as arrays or as shapes and dtypes.
    """
    calls = min(MOST_CALLS, max(1, round(_PROGRAM_SECONDS / floor_seconds)))
    while calls > _FEWEST_CALLS and calls * sum(_nbytes(spec) for spec in specs) > COPIES_BYTES:
        calls //= 2
    return calls


@functools.cache
def program(function: Callable[..., Any], calls: int) -> Any:
    """A jitted program of several calls of `function`. It takes a tuple of arguments for each, and returns all results.

    Every argument of every call is a parameter of its own, so no two calls are equal. The compiler would compute equal
    calls once, even across `jax.lax.optimization_barrier`.
    """
    call = jax.jit(function)

    def several(calls_arguments: tuple[Arguments, ...]) -> list[Any]:
        return [call(*arguments) for arguments in calls_arguments]

    assert calls > 0
    return jax.jit(several)


def copies(arguments: Arguments, calls: int) -> tuple[Arguments, ...]:
    """Arguments for each of several calls, each with its own memory, so that no call finds another's data in a cache.

    The largest arrays are shared if copies of all arrays would take more than `COPIES_BYTES`.
    """
    room = COPIES_BYTES
    shared = set()
    for at in sorted(range(len(arguments)), key=lambda at: _nbytes(arguments[at])):
        room -= (calls - 1) * _nbytes(arguments[at])
        if room < 0:
            shared.add(at)

    def one_more() -> Arguments:
        return tuple(x if at in shared else jnp.copy(x) for at, x in enumerate(arguments))

    return (arguments, *(one_more() for _ in range(calls - 1)))


def median_seconds(run: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Median wall-clock seconds of one `run()` among several in a row, after a warm-up. `wait` waits for a result."""

    def sample(runs: int) -> float:
        start = time.perf_counter()
        for _ in range(runs - 1):
            run()
        wait(run())
        return (time.perf_counter() - start) / runs

    sample(1)
    once = sample(1)
    if once > _VERY_SLOW_SECONDS:
        return once
    runs = max(1, round(_SAMPLE_SECONDS / once))
    return statistics.median(sample(runs) for _ in range(3 if once > _SLOW_SECONDS else _SAMPLES))


def seconds_per_call(function: Callable[..., Any], *arguments: Any, floor_seconds: float = 1e-3) -> float:
    """Median seconds of one call of `function` on the default device, with launches and without compilation."""
    calls = number_of_calls(floor_seconds, arguments)
    inputs = copies(arguments, calls)
    run = program(function, calls)
    return median_seconds(lambda: run(inputs)) / calls


def torch_seconds_per_call(function: Callable[..., Any], *arguments: Any, calls: int) -> float:
    """As `seconds_per_call`, for a function of PyTorch tensors. The tensors share the arguments' memory."""
    import torch  # pyright: ignore[reportMissingImports]

    inputs = jax.block_until_ready(copies(arguments, calls))
    tensors = [tuple(torch.from_dlpack(x) for x in one) for one in inputs]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        torch.cuda.synchronize()
        start.record()
        for one in tensors:
            function(*one)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    sample()
    return statistics.median(sample() for _ in range(_SAMPLES))


def device_seconds(run: Callable[[], Any]) -> tuple[float, int] | None:
    """Seconds that a GPU was busy in one `run()`, without gaps between kernels, and the number of kernels and copies.

    Both are from the profiler's record of the run; None if the record has no GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        nanoseconds = [
            event.duration_ns
            for file in Path(folder).rglob("*.xplane.pb")
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return (sum(nanoseconds) / 1e9, len(nanoseconds)) if nanoseconds else None


def matmul_rate() -> float:
    """FLOP/s of a bf16 matrix product of 8192 x 8192 x 8192 on random numbers, in the faster of two layouts."""
    size = 8192
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    return 2 * size**3 / min(seconds_per_call(function, a, b) for function in (jnp.dot, _dot_transposed))


def _dot_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b.T)


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy of 1 GiB. Bytes read and bytes written both count."""
    array = jax.random.bits(jax.random.key(0), (2**28,), jnp.uint32)
    return 2 * array.nbytes / seconds_per_call(_add_one, array)


def _add_one(x: jax.Array) -> jax.Array:
    """A copy that the compiler cannot remove."""
    return x + 1


def _nbytes(spec: Any) -> int:
    return int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
