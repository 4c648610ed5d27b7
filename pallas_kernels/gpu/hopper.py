"""Sizes of Hopper GPUs (H100, H200)."""

MULTIPROCESSORS = 132
SHARED_BYTES = 227 * 1024
"""Bytes of shared memory that one block can have."""
