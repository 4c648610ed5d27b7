"""Where a GPU's time goes, by the parts of the model, from the profiler."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from keye_jax.bench.inputs import Prompt
from keye_jax.bench.timing import DECODE_STEPS, decode_steps, random_batch, read_prompt, warm_up
from keye_jax.runtime.runtime import Runtime

PARTS = ("indexer", "selection", "attention", "experts", "collectives")
"""Named scopes of the model that device time is told apart by; what is in none of them is the rest."""

_COLLECTIVES = ("nccl", "all_gather", "allgather", "all_reduce", "allreduce", "reduce_scatter", "all_to_all")
"""What the names of kernels that move data between devices hold, whatever scope they are in."""


def prefill_parts(runtime: Runtime, prompt: Prompt) -> dict[str, float]:
    """Device seconds of each part of the model while it reads `prompt`; see `device_seconds`."""
    warm_up(runtime, prompt)
    return device_seconds(lambda: read_prompt(runtime, prompt))


def decode_parts(runtime: Runtime, batch: int, context: int) -> dict[str, float]:
    """Device seconds of each part of the model in one step of decode; see `device_seconds`."""
    state, pool = decode_steps(runtime, *random_batch(runtime, batch, context, context - 2 * DECODE_STEPS))
    parts = device_seconds(lambda: decode_steps(runtime, state, pool))
    return {part: seconds / DECODE_STEPS for part, seconds in parts.items()}


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
