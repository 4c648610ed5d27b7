"""Dense attention without the matrix of scores."""

import math

import jax
from jax.typing import ArrayLike

from pallas_kernels.checks import FLOAT32, INDEX_FLOATS, INTEGERS, Array, Result, Signature, number
from pallas_kernels.dispatch import dispatch

_DENSE = Signature(
    "flash_attention",
    {
        "q": Array("b t n d"),
        "k": Array("b s k d"),
        "v": Array("b s k d"),
        "lengths": Array("b", INTEGERS),
    },
    (Result("b t n d", "q"),),
    same_dtype=("q", "k", "v"),
    multiples=(("n", "k"),),
)

_PAGED = Signature(
    "paged_flash_attention",
    {
        "q": Array("b t n d"),
        "kv": Array("p page_size 2*k d", INDEX_FLOATS),
        "page_table": Array("b m", INTEGERS),
        "query_start": Array("b", INTEGERS),
        "kv_scales": Array("p page_size 2*k", FLOAT32, optional=True, gradient=False),
    },
    (Result("b t n d", "q"), Result("b t n", "float32", -math.inf)),
    multiples=(("n", "k"),),
)


def flash_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    lengths: ArrayLike,
    *,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """Bidirectional softmax attention, as in the vision encoder, with the online softmax of FlashAttention.

    Memory: the result, and a workspace that grows with t, not with t * s.

    Args:
      q: `[b, t, n, d]`, bfloat16, float16 or float32.
      k, v: `[b, s, k, d]`, in the dtype of q. n is a multiple of k.
      lengths: int32 `[b]`, the number of keys that exist, from 0 to s. A query attends to keys 0 to `lengths - 1`.
        Numbers out of that range count as the nearest in it, but not in "cudnn", where they are undefined.
      scale: factor on the dot products.
      implementation: None, "cudnn", "mosaic_tpu" or "xla".

    Returns:
      `[b, t, n, d]` in the dtype of q; zeros where there is no key.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    arrays = {"q": q, "k": k, "v": v, "lengths": lengths}
    return dispatch(_DENSE, implementation, arrays, scale=number("flash_attention", "scale", scale))


def paged_flash_attention(
    q: ArrayLike,
    kv: ArrayLike,
    page_table: ArrayLike,
    query_start: ArrayLike,
    *,
    scale: float,
    kv_scales: ArrayLike | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal softmax attention to paged keys and values: for short contexts, and to compare sparse attention with.

    Memory: the results and a workspace. Only the workspace of "cudnn" grows with the context: it copies the context's
    keys and values.

    Args:
      q: `[b, t, n, d]`, bfloat16, float16 or float32. n is a multiple of k.
      kv: `[p, page_size, 2 * k, d]` pages. A row holds the keys of all k heads, then their values. float8_e4m3fn
        in "xla" only.
      page_table: int32 `[b, m]`, from 0 to p - 1. In "xla" and "mosaic_tpu" other numbers count as the nearest of
        these; GPU kernels do not check them.
      query_start: int32 `[b]`, the position of each sequence's first query. Query t has position `query_start + t` and
        attends to positions up to its own. A query with a position below 0 attends to nothing. One with a position
        from `m * page_size` on attends to all that there is; GPU kernels do not take it.
      scale: factor on the dot products.
      kv_scales: float32 `[p, page_size, 2 * k]`, factors on each head's keys and values, which are rounded to the dtype
        of q; None for ones. With them all arguments count as constants for `jax.grad`.
      implementation: None, "mosaic_gpu" (t = 1 only), "cudnn" (t from 16), "mosaic_tpu" or "xla".

    Returns:
      `[b, t, n, d]` in the dtype of q, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`. A query
      that attends to nothing gets zeros and -inf.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    arrays = {"q": q, "kv": kv, "page_table": page_table, "query_start": query_start, "kv_scales": kv_scales}
    return dispatch(_PAGED, implementation, arrays, scale=number("paged_flash_attention", "scale", scale))
