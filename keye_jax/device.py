"""What the device has and what was used of it."""

from __future__ import annotations

import os
import resource
import sys

import jax


def memory_limit_bytes() -> int:
    """Memory of the first device: what its allocator may use, or on a CPU the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes() -> int:
    """The most memory used at once so far: of the first device, or on a CPU of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
