"""Timing on an accelerator: medians of many calls, and the ceilings that results are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_CALLS = 8
_SAMPLES = 7
_SAMPLE_SECONDS = 0.02


def seconds_per_call(function: Callable[..., Any], *arguments: Any) -> float:
    """Median seconds of one call of `function` on the default device.

    One program makes several calls, each waiting for the one before, so that launching programs does not count; a
    sample runs it often enough to take 20 ms, after a warm-up.
    """

    def several(*arguments: Any) -> Any:
        result = None
        for _ in range(_CALLS):
            result = function(*arguments)
            # The next call's arguments depend on this one's result: neither reordered nor computed once for all.
            arguments, result = jax.lax.optimization_barrier((arguments, result))
        return result

    program = jax.jit(several)

    def sample(runs: int) -> float:
        start = time.perf_counter()
        for _ in range(runs - 1):
            program(*arguments)
        jax.block_until_ready(program(*arguments))
        return (time.perf_counter() - start) / (runs * _CALLS)

    sample(1)
    runs = max(1, round(_SAMPLE_SECONDS / (_CALLS * sample(1))))
    return statistics.median(sample(runs) for _ in range(_SAMPLES))


def matmul_rate() -> float:
    """FLOP/s of a bf16 matrix product of 8192 x 8192 x 8192 on random numbers."""
    size = 8192
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    return 2 * size**3 / seconds_per_call(jnp.dot, a, b)


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy of 1 GiB, read and written bytes both counted."""
    array = jax.random.bits(jax.random.key(0), (2**28,), jnp.uint32)
    # Adding one is a copy that cannot be left out.
    return 2 * array.nbytes / seconds_per_call(lambda x: x + 1, array)
