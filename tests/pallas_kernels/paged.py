"""Contiguous arrays, which the oracles take, as pages, which the operations take."""

import numpy as np


def to_pages(rng, contiguous, page_size):
    """Pages `[p, page_size, ...]` and a page table `[b, m]` of `contiguous [b, s, ...]`, pages in random order.

    Positions from s on in the last page of a sequence are NaN: they must never be read.
    """
    batch, length = contiguous.shape[:2]
    per_sequence = -(-length // page_size)
    padding = [(0, 0), (0, per_sequence * page_size - length)] + [(0, 0)] * (contiguous.ndim - 2)
    padded = np.pad(contiguous, padding, constant_values=np.nan)
    blocks = padded.reshape(batch * per_sequence, page_size, *contiguous.shape[2:])
    order = rng.permutation(batch * per_sequence)
    pages = np.empty_like(blocks)
    pages[order] = blocks
    return pages, order.reshape(batch, per_sequence).astype(np.int32)
