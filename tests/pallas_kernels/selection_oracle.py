"""The selection of the highest scores, by sorting."""

import numpy as np


def selection(scores, lengths, k):
    """What `select_topk` returns, by a stable sort: of equal scores the lower position comes first."""
    out = np.full((*scores.shape[:-1], k), -1, np.int32)
    for row in np.ndindex(scores.shape[:-1]):
        order = np.argsort(-scores[row][: lengths[row]], kind="stable")[:k]
        out[row][: len(order)] = np.sort(order)
    return out
