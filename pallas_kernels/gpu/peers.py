"""Memory on each GPU of a process that kernels on the other GPUs write to.

Kernels get its addresses, and no array: XLA knows no array that others change, and may hand a kernel a copy.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MOST_DEVICES = 8
MOST_ROWS = 64
"""Rows of an exchange, those of all devices together."""

ROW_WORDS = 1024
"""Words of a row, at most."""

_PACKED_ROW = 2 * ROW_WORDS
_TURNS = 2
_KINDS = 2

_ALLOCATORS = ("", "default", "bfc", "platform")
"""Of XLA's allocators those whose memory is open to all GPUs that reach it."""


def places(devices: int) -> int:
    """How many packed rows of each number there is room for: what all gather, and what each device adds."""
    return 1 + devices


def place_of(place: int, turn: int, row: int = 0) -> int:
    """The word where a packed row begins; arguments may be values of a kernel."""
    return ((place * _TURNS + turn) * MOST_ROWS + row) * _PACKED_ROW


def counter_of(devices: int, kind: int, row: int = 0) -> int:
    """The word that counts how often a row was exchanged, by kind: gathered (0) or added up (1)."""
    return place_of(places(devices), 0) + kind * MOST_ROWS + row


def memory_words(devices: int) -> int:
    """The size of a device's memory."""
    return counter_of(devices, _KINDS)


def peer_addresses(mesh: Mesh, axes: tuple[str, ...]) -> jax.Array | None:
    """Where the GPUs of a mesh have their memory, for kernels inside `jax.shard_map`.

    Args:
      axes: those of the mesh with more than one device, outermost first.

    Returns:
      int32 `[devices, 2 * devices + 1]`, split over `axes`: each device's rank, then the low and the high half of each
      device's address. The memory stays for as long as the process. None where kernels cannot exchange: on other GPUs
      than Hopper's, more than 8, GPUs that do not reach each other or that several processes have, and with another
      allocator than XLA's default.
    """
    devices = list(mesh.devices.flat)
    if not 1 < len(devices) <= MOST_DEVICES or math.prod(mesh.shape[axis] for axis in axes) != len(devices):
        return None
    if any(getattr(device, "compute_capability", None) != "9.0" for device in devices):
        return None
    if jax.process_count() > 1 or not {*devices} <= {*jax.devices()}:
        return None
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() not in _ALLOCATORS or not _reach_each_other(devices):
        return None
    return _allocate(mesh, axes)[0]


@functools.cache
def _allocate(mesh: Mesh, axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """The addresses, and the memory that is there."""
    sharding, devices = NamedSharding(mesh, PartitionSpec(axes)), mesh.size
    memory = jax.device_put(np.zeros((devices, memory_words(devices)), np.int32), sharding)
    # No kernel may write before the zeros are there.
    jax.block_until_ready(memory)
    table = np.zeros((devices, 2 * devices + 1), np.uint32)
    table[:, 0] = np.arange(devices)
    for shard in memory.addressable_shards:
        rank, address = shard.index[0].start, shard.data.unsafe_buffer_pointer()
        table[:, 2 * rank + 1 : 2 * rank + 3] = address & 0xFFFFFFFF, address >> 32
    return jax.device_put(table.view(np.int32), sharding), memory


def _reach_each_other(devices: Sequence[Any]) -> bool:
    """Whether each GPU can read and write the memory of the others, which XLA then lets it do."""
    driver, answer, handles = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), []
    for device in devices:
        handle = ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(handle), device.local_hardware_id):
            return False
        handles.append(handle)
    for pair in itertools.permutations(handles, 2):
        if driver.cuDeviceCanAccessPeer(ctypes.byref(answer), *pair) or not answer.value:
            return False
    return True
