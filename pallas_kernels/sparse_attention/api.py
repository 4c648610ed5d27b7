"""Attention of each query to its own set of keys."""

import math

import jax
from jax.typing import ArrayLike

from pallas_kernels.checks import FLOAT32, INDEX_FLOATS, INTEGERS, Array, Result, Signature, number
from pallas_kernels.dispatch import dispatch

_SIGNATURE = Signature(
    "sparse_attention",
    {
        "q": Array("b t n d"),
        "kv": Array("p page_size 2*k d", INDEX_FLOATS),
        "indices": Array("b t top_k", INTEGERS),
        "page_table": Array("b m", INTEGERS),
        "kv_scales": Array("p page_size 2*k", FLOAT32, optional=True, gradient=False),
    },
    (Result("b t n d", "q"), Result("b t n", "float32", -math.inf)),
    multiples=(("n", "k"),),
)


def sparse_attention(
    q: ArrayLike,
    kv: ArrayLike,
    indices: ArrayLike,
    page_table: ArrayLike,
    *,
    scale: float,
    kv_scales: ArrayLike | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query softmax attention to selected positions only, for prefill and decode.

    Memory: the results, and a workspace that does not grow with the context. With scales and 16 queries or more
    "mosaic_gpu" also copies contexts to bfloat16: those that fit 1 GiB together, at least one.

    Args:
      q: `[b, t, n, d]`, bfloat16, float16 or float32. n is a multiple of k.
      kv: `[p, page_size, 2 * k, d]` pages. A row holds the keys of all k heads, then their values. float8_e4m3fn
        in "xla", and with scales in "mosaic_gpu".
      indices: int32 `[b, t, top_k]`, the positions that a query attends to, the same for all its heads. A position
        appears at most once. Numbers below 0 are ignored, and from `m * page_size` on, which GPU kernels do not check.
      page_table: int32 `[b, m]`, from 0 to p - 1. In "xla" and "mosaic_tpu" other numbers count as the nearest of
        these; GPU kernels do not check them.
      scale: factor on the dot products.
      kv_scales: float32 `[p, page_size, 2 * k]`, factors on each head's keys and values, which "xla" rounds to the
        dtype of q; None for ones. With them all arguments count as constants for `jax.grad`.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      `[b, t, n, d]` in the dtype of q, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`. A query
      with no selected position gets zeros and -inf.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    arrays = {"q": q, "kv": kv, "indices": indices, "page_table": page_table, "kv_scales": kv_scales}
    return dispatch(_SIGNATURE, implementation, arrays, scale=number("sparse_attention", "scale", scale))
