"""What a nucleus has to be, from sorted logits in float64."""

import numpy as np

CASES = ("normal", "flat", "equal", "ties", "far", "masked", "one", "zeros")
_EXACT = 3e-5
"""Relative error that a sum of probabilities may have."""


def logits_of(kind: str, rows: int, vocab: int) -> np.ndarray:
    """float32 `[rows, vocab]` of one of `CASES`."""
    rng = np.random.default_rng(vocab)
    logits = 3 * rng.standard_normal((rows, vocab))
    match kind:
        case "flat":
            logits *= 1e-3
        case "equal":
            logits[:] = -7.25
        case "ties":
            logits = np.round(logits)
        case "far":
            logits *= 30
        case "masked":
            logits[:, rng.permutation(vocab)[5:]] = -np.inf
        case "one":
            logits[:, 17] = 1000
        case "zeros":
            logits = np.where(logits > 0, 0.0, -0.0)
    return logits.astype(np.float32)


def assert_nucleus(logits, top_k, top_p, highest, span):
    """Checks the results of `pallas_kernels.nucleus`; arguments as its own."""
    for row, limit, share, top, reach in zip(logits, top_k, top_p, highest, span, strict=True):
        assert top == row.max()
        with np.errstate(invalid="ignore"):
            distances = np.sort((top - row).astype(np.float64))
        likelihoods, size = np.exp(-distances), len(row)
        limit = min(limit, size) or size
        total = likelihoods[:limit].sum()
        kept = int((distances <= reach).sum())
        assert kept
        # Tokens as likely as the last one stay with it: those before them are too few.
        last = distances[kept - 1]
        before = int((distances < last * (1 - 1e-6)).sum())
        enough = share * total * (1 - _EXACT)
        assert kept >= limit or likelihoods[:kept].sum() >= enough, (kept, limit, share)
        assert before < limit, (before, limit)
        assert share >= 1 or likelihoods[:before].sum() < share * total * (1 + _EXACT), (before, kept, share)
        assert share < 1 or kept >= limit
