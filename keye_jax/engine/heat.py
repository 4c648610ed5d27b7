"""From counts of selected positions to what an answer looked at."""

from __future__ import annotations

import numpy as np

from keye_jax.engine.media.work import Prompt
from keye_jax.engine.request import SelectionHeat


def selection_heat(counts: np.ndarray, prompt: Prompt, pads: np.ndarray) -> SelectionHeat:
    """Counts by frame, image and text.

    Args:
      counts: int `[h]`, how often each position of the sequence was selected; h is at least the prompt's length.
      pads: bool `[t]`, which tokens of the prompt are pads.
    """
    own = counts[: len(pads)].astype(np.int64)
    total, whole = int(own.sum()), int(counts.sum(dtype=np.int64))
    of_pads = own[pads]

    def shares(first_pad: int, frames: int, tokens: int) -> tuple[float, ...]:
        sums = of_pads[first_pad : first_pad + frames * tokens].reshape(frames, tokens).sum(axis=1)
        return tuple((sums / max(1, total)).tolist())

    by_medium = [
        (medium.kind, shares(medium.first_pad, medium.frames, medium.tokens_per_frame)) for medium in prompt.media
    ]
    return SelectionHeat(
        tuple(found for kind, found in by_medium if kind == "video"),
        tuple(found[0] for kind, found in by_medium if kind == "image"),
        (total - int(of_pads.sum())) / max(1, total),
        (whole - total) / max(1, whole),
    )
