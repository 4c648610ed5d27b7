"""The clock and the power of a GPU while it runs one program again and again, as `nvidia-smi` reports them.

A GPU lowers its clock where it would draw more than its limit. Then it is energy that bounds a kernel, not its number
of instructions.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax

_SECONDS = 2.0
"""How long a program is run."""

_WARM_UP_SECONDS = 0.5
"""What is left out at the beginning, until the clock has settled."""

_INTERVAL_MS = 100
"""Milliseconds between two samples."""

_FIELDS = "clocks.sm,power.draw.instant,enforced.power.limit,clocks_event_reasons.sw_power_cap"


def available() -> bool:
    """Whether `nvidia-smi` is there."""
    return shutil.which("nvidia-smi") is not None


def record(run: Callable[[], Any]) -> dict[str, float]:
    """Calls `run` for two seconds.

    Returns:
      Medians of the samples: "clock_hertz" of the multiprocessors, "watts" and "limit_watts"; and "capped", the share
      of the samples in which the GPU said that its power limit holds its clock down. Empty without a sample.
    """
    command = ["nvidia-smi", f"--id={_device()}", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    with subprocess.Popen([*command, f"--loop-ms={_INTERVAL_MS}"], stdout=subprocess.PIPE, text=True) as process:
        begin = time.monotonic()
        while (past := time.monotonic() - begin) < _SECONDS:
            jax.block_until_ready(run())
        process.terminate()
        assert process.stdout
        lines = process.stdout.read().splitlines()
    return read(lines[round(len(lines) * _WARM_UP_SECONDS / past) :])


def read(lines: list[str]) -> dict[str, float]:
    """What `record` returns, from lines such as "1575, 718.58, 700.00, Active". Lines without numbers are left out."""
    samples = []
    for line in lines:
        *numbers, cap = (cell.strip() for cell in line.split(","))
        try:
            samples.append((*map(float, numbers), cap == "Active"))
        except ValueError:
            continue
    if not samples:
        return {}
    clocks, watts, limits, capped = zip(*samples, strict=True)
    return {
        "clock_hertz": statistics.median(clocks) * 1e6,
        "watts": statistics.median(watts),
        "limit_watts": statistics.median(limits),
        "capped": sum(capped) / len(capped),
    }


def _device() -> str:
    """The first device, as `nvidia-smi` numbers it."""
    number = jax.devices()[0].local_hardware_id or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[number] if visible else str(number)
