"""Scores of the DeepSeek Sparse Attention indexer."""

import math

import jax
from jax.typing import ArrayLike

from pallas_kernels.checks import INDEX_FLOATS, INTEGERS, Array, Result, Signature, count, flag, number
from pallas_kernels.dispatch import dispatch

_SIGNATURE = Signature(
    "indexer_scores",
    {
        "q": Array("b t n d", INDEX_FLOATS),
        "weights": Array("b t n"),
        "keys": Array("p page_size d", INDEX_FLOATS),
        "page_table": Array("b m", INTEGERS),
        "query_start": Array("b", INTEGERS),
        "key_scales": Array("p page_size", optional=True),
    },
    (Result("b t m*page_size", "float32", -math.inf),),
    same_dtype=("q", "keys"),
)


def indexer_scores(
    q: ArrayLike,
    weights: ArrayLike,
    keys: ArrayLike,
    page_table: ArrayLike,
    query_start: ArrayLike,
    *,
    scale: float,
    key_scales: ArrayLike | None = None,
    fill: bool = True,
    skip_below: int = 0,
    implementation: str | None = None,
) -> jax.Array:
    """`I[b,t,s] = scale * sum_n weights[b,t,n] * relu(q[b,t,n] . keys[b,s])` (DeepSeek-V3.2, equation 1), causal.

    For float8_e4m3fn queries and keys (see `quantize`), the caller multiplies the queries' scales into `weights` and
    passes the keys' scales as `key_scales`.

    Memory: the result, and a workspace that does not grow with the context.

    Args:
      q: `[b, t, n, d]` index queries, float8_e4m3fn, bfloat16, float16 or float32.
      weights: `[b, t, n]` signed gates, bfloat16, float16 or float32.
      keys: `[p, page_size, d]` pages of index keys, one head, in the dtype of q.
      page_table: int32 `[b, m]`, from 0 to p - 1. In "xla" and "mosaic_tpu" other numbers count as the nearest of
        these; GPU kernels do not check them.
      query_start: int32 `[b]`, the position of each sequence's first query. Query t has position `query_start + t` and
        sees positions up to its own: none below 0, and all that there are from `m * page_size` on. GPU kernels take
        positions from 0, those of single queries from -1.
      scale: factor on the sum.
      key_scales: float32 `[p, page_size]`, a factor on each key's scores; None for ones.
      fill: False leaves the scores after a query's own position undefined. This saves time for a caller that does not
        read them: they are most of the result where a chunk begins a long prompt.
      skip_below: leaves the scores of queries at positions below it undefined, for a caller that does not read them:
        such as those of queries that select all that they see.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      float32 `[b, t, m * page_size]`; -inf after a query's own position.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    arrays = {
        "q": q,
        "weights": weights,
        "keys": keys,
        "page_table": page_table,
        "query_start": query_start,
        "key_scales": key_scales,
    }
    scale, fill = number("indexer_scores", "scale", scale), flag("indexer_scores", "fill", fill)
    skip_below = count("indexer_scores", "skip_below", skip_below, least=0)
    return dispatch(_SIGNATURE, implementation, arrays, scale=scale, fill=fill, skip_below=skip_below)
