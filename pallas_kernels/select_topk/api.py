"""Exact selection of the highest scores of a row."""

import jax

from pallas_kernels.dispatch import dispatch

# The kernels run by their names alone: that for Hopper until the whole model has been run with it, that for TPUs until a
# TPU has run it.
_IMPLEMENTATIONS = ("xla", "mosaic_gpu", "mosaic_tpu")


def select_topk(scores: jax.Array, lengths: jax.Array, k: int, *, implementation: str | None = None) -> jax.Array:
    """Positions of the `k` highest scores among the first `lengths` of each row; all of them when there are fewer.

    Exact and deterministic: of equal scores (0.0 equals -0.0) the lower position wins.

    Args:
      scores: float32 `[..., s]`.
      lengths: int32 `[...]`, from 0 to s.
      k: how many to select.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      int32 `[..., k]` positions in ascending order, then -1 where a row has fewer than k.
    """
    return dispatch("select_topk.select_topk", _IMPLEMENTATIONS, implementation)(scores, lengths, k=k)
