"""Exact selection of the highest scores of a row."""

import jax
from jax.typing import ArrayLike

from pallas_kernels.checks import FLOAT32, INTEGERS, Array, Result, Signature, count
from pallas_kernels.dispatch import dispatch


def select_topk(scores: ArrayLike, lengths: ArrayLike, k: int, *, implementation: str | None = None) -> jax.Array:
    """Positions of the `k` highest of the first `lengths` scores of each row; all of them if `lengths` is below k.

    Exact and deterministic: of equal scores (0.0 equals -0.0) the lower position wins. NaN counts as infinity, except
    in "mosaic_gpu", where its place is undefined. A selection is a constant for `jax.grad`.

    Args:
      scores: float32 `[..., s]`.
      lengths: int32 `[...]`, from 0 to s. Numbers out of that range count as the nearest in it.
      k: number of positions to select from each row, at least 1.
      implementation: None, "mosaic_gpu", "mosaic_tpu", "xla" or "sparse_core", which only its name chooses.

    Returns:
      int32 `[..., k]`: positions in ascending order, then -1 where a row has fewer than k.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    k = count("select_topk", "k", k)
    signature = Signature(
        "select_topk",
        {"scores": Array("... s", FLOAT32, gradient=False), "lengths": Array("...", INTEGERS)},
        (Result(f"... {k}", "int32", -1),),
    )
    arrays = {"scores": scores, "lengths": lengths}
    return dispatch(signature, implementation, arrays, k=k)
