"""Selection and attention in one operation, so that an accelerator need not write out the selections."""

import math

import jax
from jax.typing import ArrayLike

from pallas_kernels.checks import FLOAT32, INTEGERS, Array, Result, Signature, count, number
from pallas_kernels.dispatch import dispatch

_SIGNATURE = Signature(
    "topk_attention",
    {
        "q": Array("b t n d"),
        "scores": Array("b t s", FLOAT32, gradient=False),
        "lengths": Array("b t", INTEGERS),
        "kv": Array("p page_size 2*k d"),
        "page_table": Array("b m", INTEGERS),
    },
    (Result("b t n d", "q"), Result("b t n", "float32", -math.inf)),
    multiples=(("n", "k"),),
    bounds=(("s", "m*page_size"),),
)


def topk_attention(
    q: ArrayLike,
    scores: ArrayLike,
    lengths: ArrayLike,
    kv: ArrayLike,
    page_table: ArrayLike,
    *,
    top_k: int,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`sparse_attention` to the result of `select_topk`: each query attends to its `top_k` highest scores.

    Memory: the results, and a workspace: at most the selected positions, int32 `[b, t, top_k]`, or in "mosaic_gpu" a
    bit for each score, and what `sparse_attention` takes.

    Args:
      q: `[b, t, n, d]`, bfloat16, float16 or float32. n is a multiple of k.
      scores: float32 `[b, t, s]`, s at most `m * page_size`; NaN as for `select_topk`. Constants for `jax.grad`.
      lengths: int32 `[b, t]`, the number of positions that a query sees, from 0 to s. Numbers out of that range count
        as the nearest in it.
      kv: `[p, page_size, 2 * k, d]` pages. A row holds the keys of all k heads, then their values.
      page_table: int32 `[b, m]`, from 0 to p - 1. In "xla" and "mosaic_tpu" other numbers count as the nearest of
        these; GPU kernels do not check them.
      top_k: number of positions that a query attends to, at least 1; all that it sees if they are fewer.
      scale: factor on the dot products.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      `[b, t, n, d]` in the dtype of q, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`. A query
      that sees nothing gets zeros and -inf.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    arrays = {
        "q": q,
        "scores": scores,
        "lengths": lengths,
        "kv": kv,
        "page_table": page_table,
    }
    top_k, scale = count("topk_attention", "top_k", top_k), number("topk_attention", "scale", scale)
    return dispatch(_SIGNATURE, implementation, arrays, top_k=top_k, scale=scale)
