"""What the device has and what was used of it."""

from __future__ import annotations

import os
import resource
import sys

import jax


def memory_limit_bytes() -> int:
    """Memory of a device: what its allocator may use, or of CPU devices each one's share of the machine's."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)


def memory_in_use_bytes() -> int:
    """Memory in use now: of the device here that uses most; 0 on a CPU, whose allocator does not say."""
    return max((device.memory_stats() or {}).get("bytes_in_use", 0) for device in jax.local_devices())


def peak_memory_bytes() -> int:
    """The most memory used at once so far: of the device here that used most, or on a CPU of this process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
