"""Positions (time, row, column) of the tokens of a prompt with images and video frames."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from keye_jax.errors import UserError


def mrope_positions(
    input_ids: ArrayLike,
    image_grids: ArrayLike,
    video_grids: ArrayLike,
    *,
    image_token_id: int,
    video_token_id: int,
    merge_size: int = 2,
) -> tuple[np.ndarray, int]:
    """The position of every token, and the offset from a generated token's index to its position.

    A text token at position n has (n, n, n), and the next token starts at n + 1. The pad tokens of an image, or of one
    video frame, form a block of h x w merged cells. If the block starts at position n, cell (row, col) has
    (n, n + row, n + col), and the next token starts at n + max(h, w). Each frame is a block of its own. This is the
    publisher's `get_rope_index_keye`.

    Args:
      input_ids: int [T], the prompt with its pad tokens.
      image_grids: int [I, 3], (1, h, w) in patches, in prompt order; empty for none.
      video_grids: int [F, 3], (1, h, w) in patches, one row a frame, in prompt order; empty for none.
      image_token_id, video_token_id: ids of the pad tokens.
      merge_size: side of one merged cell, which is one token, in patches.

    Returns:
      positions int32 [3, T], and delta: a token generated at index i >= T has position i + delta on all axes.

    Raises:
      UserError: the pad tokens do not match the grids.
    """
    ids = np.asarray(input_ids)
    if ids.ndim != 1:
        raise UserError(f"input_ids has shape {ids.shape}; it must be one row of token ids")
    first, rows, cols = (
        np.concatenate(parts)
        for parts in zip(
            _blocks(ids, image_grids, "image", image_token_id, merge_size),
            _blocks(ids, video_grids, "video", video_token_id, merge_size),
            strict=True,
        )
    )
    order = np.argsort(first)
    first, rows, cols = first[order], rows[order], cols[order]
    count = rows * cols
    local = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    where = np.repeat(first, count) + local

    advance = np.ones(len(ids), np.int64)
    advance[where] = 0
    advance[first] = np.maximum(rows, cols)
    start = np.cumsum(advance) - advance
    positions = np.broadcast_to(start, (3, len(ids))).astype(np.int32)
    width = np.repeat(cols, count)
    origin = np.repeat(start[first], count)
    positions[:, where] = origin, origin + local // width, origin + local % width
    return positions, int(advance.sum()) - len(ids)


def _blocks(
    ids: np.ndarray, grids: ArrayLike, kind: str, token_id: int, merge_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index of the first token, merged rows and merged columns of each block of one kind, int64 [n] each."""
    grids = np.asarray(grids, np.int64).reshape(-1, 3)
    bad = (grids[:, 0] != 1) | (grids[:, 1:] <= 0).any(1) | (grids[:, 1:] % merge_size != 0).any(1)
    if bad.any():
        at = int(np.argmax(bad))
        allowed = f"(1, h, w) with h and w positive multiples of {merge_size}"
        raise UserError(f"{kind}_grids[{at}] is {grids[at].tolist()}; it must be {allowed}")
    rows, cols = grids[:, 1] // merge_size, grids[:, 2] // merge_size
    count = rows * cols
    pads = np.flatnonzero(ids == token_id)
    if len(pads) != count.sum():
        need = f"{count.sum()}, which its {len(grids)} {kind} grids need"
        raise UserError(f"input_ids has {len(pads)} {kind} pad tokens ({token_id}); it must have {need}")
    end = np.cumsum(count)
    first, last = pads[end - count], pads[end - 1]
    broken = last - first + 1 != count
    if broken.any():
        at = int(np.argmax(broken))
        raise UserError(
            f"the {kind} pad tokens at index {first[at]} of input_ids are interrupted; "
            f"{kind}_grids[{at}] needs {count[at]} in a row"
        )
    return first, rows, cols
