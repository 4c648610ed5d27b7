"""Scattering contiguous arrays over pages, as the oracles want them contiguous and the operations paged."""

import numpy as np


def to_pages(rng, contiguous, page_size):
    """Pages `[p, page_size, ...]` and a page table `[b, m]` of `contiguous [b, s, ...]`, pages in random order.

    What lies behind s in the last page of a sequence is NaN: it must never be seen.
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
