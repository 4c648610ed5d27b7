"""Comparing what a random model chooses, on any machine.

A choice is safe where what is chosen is ahead of what is not by more than the rounding. Instruction sets, chunk sizes
and devices add in other orders, so a smaller lead may go either way. A test states the lead that it needs, and asserts
that its inputs have it.
"""

from __future__ import annotations

import numpy as np


def selection_leads(scores: np.ndarray, top_k: int) -> np.ndarray:
    """How far the lowest of each query's `top_k` best scores is ahead of the best of the others.

    Args:
      scores: float32 `[..., s]`, -inf where a query sees nothing.

    Returns:
      float32 `[...]`; inf where all that a query sees is selected, and where the two are equal to the bit: then
      positions decide, which are the same on every machine.
    """
    if scores.shape[-1] <= top_k:
        return np.full(scores.shape[:-1], np.inf, np.float32)
    best = -np.partition(-scores, (top_k - 1, top_k), axis=-1)[..., top_k - 1 : top_k + 1]
    first, second = best[..., 0], best[..., 1]
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(second) | (first == second), np.inf, first - second)


def token_leads(logits: np.ndarray) -> np.ndarray:
    """How far each row's largest logit is ahead of its second one, float32 `[...]` of `[..., vocab]`."""
    best = np.partition(logits, -2, axis=-1)
    return best[..., -1] - best[..., -2]


def assert_leads(leads: np.ndarray, lead: float) -> None:
    """Fails where a choice of the test's inputs is not safe."""
    assert leads.min() > lead, f"a choice is only {leads.min():.1e} ahead; this test needs inputs with {lead:.1e}"


def safe_tokens(logits: np.ndarray, lead: float) -> list[int]:
    """The most likely token of each row up to the first whose choice is not safe.

    Args:
      logits: `[t, vocab]`, of an answer's tokens one after the other.
    """
    unsafe = np.flatnonzero(token_leads(logits) <= lead)
    return logits.argmax(axis=-1)[: unsafe[0] if len(unsafe) else None].tolist()


def assert_tokens_follow(tokens: list[int], logits: np.ndarray, lead: float) -> None:
    """Greedy tokens are within `lead` of the most likely ones.

    Args:
      tokens: t token ids.
      logits: `[t, vocab]` that a reference computed for these very tokens.
    """
    chosen = np.take_along_axis(logits, np.asarray(tokens)[:, None], axis=-1)[:, 0]
    behind = logits.max(axis=-1) - chosen
    assert behind.max() <= lead, f"token {behind.argmax()} is {behind.max():.1e} behind the most likely one"
