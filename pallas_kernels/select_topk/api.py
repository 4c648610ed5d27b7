"""Exact selection of the highest scores of a row."""

import jax

from pallas_kernels.dispatch import dispatch


def select_topk(scores: jax.Array, lengths: jax.Array, k: int, *, implementation: str | None = None) -> jax.Array:
    """Positions of the `k` highest of the first `lengths` scores of each row; all of them if `lengths` is below k.

    Exact and deterministic: of equal scores (0.0 equals -0.0) the lower position wins.

    Args:
      scores: float32 `[..., s]`.
      lengths: int32 `[...]`, from 0 to s.
      k: number of positions to select from each row.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      int32 `[..., k]`: positions in ascending order, then -1 where a row has fewer than k.

    Raises:
      UnsupportedError: the implementation does not exist, or none supports the arguments.
      ValueError: `implementation` is no implementation's name.
    """
    return dispatch("select_topk", implementation)(scores, lengths, k=k)
