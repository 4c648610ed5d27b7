"""Lists of the keys that 16 neighbouring queries select together, as the kernel that builds them must write them."""

import numpy as np

STEP = 128
UNWRITTEN = 0xABCDEF01
"""What words of a bitmap hold that no kernel writes."""

CASES = {
    "all shared": (0, 0, 700),
    "nothing shared": (300, 400, 0),
    "one key each": (1, 1, 0),
    "only the first half": (500, 0, 0),
    "only the other half": (0, 500, 0),
    "the first half adds": (513, 0, 300),
    "the other half adds": (0, 513, 300),
    "nothing": (0, 0, 0),
    "below a step": (127, 127, 127),
    "whole steps": (128, 256, 128),
    "above a step": (129, 257, 129),
    "unequal halves": (129, 1200, 40),
    "all three": (700, 450, 600),
}
"""Numbers of keys that only the first 8 queries of a group select, that only the other 8 select, and that both do."""


def selections(rng: np.random.Generator, sizes: tuple[int, int, int], size: int, top_k: int) -> np.ndarray:
    """Selections of a group with these numbers of keys, int32 `[16, top_k]`, in random order and with -1 between."""
    indices = np.full((16, top_k), -1, np.int32)
    first, other, both = np.split(rng.choice(size, sum(sizes), replace=False), np.cumsum(sizes)[:2])
    for keys, halves in ((first, [0]), (other, [8]), (both, [0, 8])):
        for begin in halves:
            for i, key in enumerate(keys):
                for query in {i % 8, *rng.integers(0, 8, 2)}:
                    row = indices[begin + query]
                    if (free := np.flatnonzero(row < 0)).size and key not in row:
                        row[rng.choice(free)] = key
    return indices


def bitmaps(selected: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Of bool `[t, s]`, uint32 `[t, w]` as the selection writes them: up to how far a row's group sees, int `[t]`."""
    padded = np.pad(selected, ((0, 0), (0, -selected.shape[1] % STEP)))
    bits = np.packbits(padded, axis=1, bitorder="little").view(np.uint32)
    written = np.arange(bits.shape[1]) < -(-reach // STEP)[:, None] * (STEP // 32)
    return np.where(written, bits, np.uint32(UNWRITTEN))


def in_parts(indices: np.ndarray, size: int, *, split: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions and membership words of the selections of a group, `[16, top_k]`, and the lengths of three parts."""
    selected = np.zeros((16, size + 1), bool)
    np.put_along_axis(selected, indices, True, axis=1)
    selected = selected[:, :-1]
    first, other = selected[:8].any(0), selected[8:].any(0)
    shared = first & other if split else first | other
    alone = [np.flatnonzero(half & ~shared) for half in (first, other)]
    steps = [len(keys) // STEP * STEP for keys in alone]
    pieces = [keys[:end] for keys, end in zip(alone, steps, strict=True)]
    pieces += [keys[end:] for keys, end in zip(alone, steps, strict=True)]
    positions = np.concatenate([*pieces, np.flatnonzero(shared)])
    members = (selected[:, positions] << np.arange(16)[:, None]).sum(0)
    return positions, members, np.array([*steps, len(positions) - sum(steps)])
