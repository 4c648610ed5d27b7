"""What a decoder layer computes of single tokens beside its attention and its experts."""

import functools

import jax
from jax.typing import ArrayLike

from pallas_kernels.checks import FLOAT32, INTEGERS, Array, Result, Signature, count, flag, number
from pallas_kernels.dispatch import dispatch
from pallas_kernels.errors import ArgumentError

_OUTPUT = Signature(
    "output_projection",
    {"attended": Array("tokens n d"), "weight": Array("in n d"), "residual": Array("tokens in")},
    (Result("tokens in", "residual"),),
    same_dtype=("residual", "attended", "weight"),
)


def decode_projections(
    x: ArrayLike,
    norm: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    index_q: ArrayLike,
    index_k: ArrayLike,
    q_norm: ArrayLike,
    k_norm: ArrayLike,
    index_q_norm: ArrayLike,
    index_k_norm: ArrayLike,
    index_k_bias: ArrayLike,
    cos: ArrayLike,
    sin: ArrayLike,
    index_cos: ArrayLike,
    index_sin: ArrayLike,
    kv_pages: ArrayLike | None = None,
    index_pages: ArrayLike | None = None,
    slots: ArrayLike | None = None,
    *,
    index_heads: int,
    eps: float,
    index_eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """What attention and its indexer need of one new token of each sequence, and the token's rows of the cache.

    `h = rms_norm(x)` is multiplied by all projections. Heads of q and k get their RMS norm and their rotation. So do
    the indexer's queries; its key gets a layer norm and the rotation. Products are summed in float32. They, and what
    norms give, are rounded to the dtype of x, as in a layer of single operations.

    Where pages are given, the new rows are written to them, and a caller that donates the pages gets them without a
    copy. Otherwise the rows are returned, for a cache that stores them in another form.

    Args:
      x: `[tokens, in]`, bfloat16, float16 or float32; at least one token. All weights have its dtype.
      norm: `[in]`.
      q, k, v: weights `[n, d, in]`, `[kv_heads, d, in]` and the same.
      index_q: weights `[index_heads * c + index_heads, in]`: of the indexer's queries, and then of its gates.
      index_k: weights `[c, in]`.
      q_norm, k_norm: `[d]`.
      index_q_norm, index_k_norm, index_k_bias: `[c]`.
      cos, sin: float32 `[tokens, d / 2]`, of each token's rotary angles.
      index_cos, index_sin: float32 `[tokens, c / 2]`.
      kv_pages: `[pages, page_size, 2 * kv_heads, d]`; a row holds the keys and then the values of all heads. Or None.
      index_pages: `[pages, page_size, c]`, with `kv_pages`.
      slots: int32 `[tokens]`, `page * page_size + offset`, with `kv_pages`. A slot that is not in the pages is dropped.
        No two tokens have one slot.
      index_heads: how many queries the indexer has.
      eps: of the RMS norms of x, q and k.
      index_eps: of the indexer's norms.
      implementation: None, "xla" or "mosaic_gpu". None runs "xla".

    Returns:
      queries `[tokens, n, d]`, the indexer's queries `[tokens, index_heads, c]` and its gates float32 `[tokens,
      index_heads]`. Then the pages with the new rows, or the rows: `[tokens, 2 * kv_heads, d]` and `[tokens, c]`.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    name = "decode_projections"
    index_heads = count(name, "index_heads", index_heads)
    arrays = {"x": x, "norm": norm, "q": q, "k": k, "v": v, "index_q": index_q, "index_k": index_k}
    arrays |= {"q_norm": q_norm, "k_norm": k_norm, "index_q_norm": index_q_norm, "index_k_norm": index_k_norm}
    arrays |= {"index_k_bias": index_k_bias, "cos": cos, "sin": sin, "index_cos": index_cos, "index_sin": index_sin}
    cache = {"kv_pages": kv_pages, "index_pages": index_pages, "slots": slots}
    given = [key for key, value in cache.items() if value is not None]
    if given and len(given) < len(cache):
        raise ArgumentError(f"{name}: {', '.join(given)} given alone; {', '.join(cache)} go together")
    signature = _projections(index_heads, bool(given))
    _, sizes = signature.check(**arrays, **cache)
    if sizes["index_rows"] != index_heads * (2 * sizes["c"] + 1):
        raise ArgumentError(
            f"{name}: index_q has {sizes['index_rows']} rows; it must have {index_heads} * {2 * sizes['c']} of queries "
            f"and {index_heads} of gates"
        )
    how = {"eps": number(name, "eps", eps), "index_eps": number(name, "index_eps", index_eps)}
    return dispatch(signature, implementation, arrays | cache, index_heads=index_heads, **how)


@functools.cache
def _projections(index_heads: int, paged: bool) -> Signature:
    arrays = {
        "x": Array("tokens in"),
        "norm": Array("in"),
        "q": Array("n 2*d in"),
        "k": Array("k 2*d in"),
        "v": Array("k 2*d in"),
        "index_q": Array("index_rows in"),
        "index_k": Array("2*c in"),
        "q_norm": Array("2*d"),
        "k_norm": Array("2*d"),
        "index_q_norm": Array("2*c"),
        "index_k_norm": Array("2*c"),
        "index_k_bias": Array("2*c"),
    }
    weights = tuple(arrays)
    arrays |= dict.fromkeys(("cos", "sin"), Array("tokens d", FLOAT32))
    arrays |= dict.fromkeys(("index_cos", "index_sin"), Array("tokens c", FLOAT32))
    arrays |= {
        "kv_pages": Array("pages page_size 2*k 2*d", optional=True),
        "index_pages": Array("pages page_size 2*c", optional=True),
        "slots": Array("tokens", INTEGERS, optional=True),
    }
    rows = ("pages page_size", "kv_pages", "index_pages") if paged else ("tokens", "x", "x")
    return Signature(
        "decode_projections",
        arrays,
        (
            Result("tokens n 2*d", "x"),
            Result(f"tokens {index_heads} 2*c", "x"),
            Result(f"tokens {index_heads}", "float32"),
            Result(f"{rows[0]} 2*k 2*d", rows[1]),
            Result(f"{rows[0]} 2*c", rows[2]),
        ),
        same_dtype=weights,
    )


def output_projection(
    attended: ArrayLike, weight: ArrayLike, residual: ArrayLike, *, implementation: str | None = None
) -> jax.Array:
    """`residual + attended @ weight^T`, with float32 sums, rounded before and after the addition.

    Args:
      attended: `[tokens, n, d]`, bfloat16, float16 or float32; at least one token.
      weight: `[in, n, d]`.
      residual: `[tokens, in]`.
      implementation: None, "xla" or "mosaic_gpu". None runs "xla".

    Returns:
      `[tokens, in]` in the dtype of residual.

    Raises:
      ArgumentError: a shape or dtype does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    return dispatch(_OUTPUT, implementation, {"attended": attended, "weight": weight, "residual": residual})


def route(
    x: ArrayLike,
    norm: ArrayLike,
    router: ArrayLike,
    *,
    top_k: int,
    eps: float,
    normalise: bool = True,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The RMS norm of each token, and the experts with the highest probabilities for it.

    Probabilities are the softmax of `rms_norm(x) @ router^T`, in float32. Of equal ones the lower expert comes first.

    Args:
      x: `[tokens, in]`, bfloat16, float16 or float32; at least one token.
      norm: `[in]`.
      router: `[e, in]`.
      top_k: experts of a token, at most e.
      eps: of the norm.
      normalise: whether the weights of a token are divided by their sum.
      implementation: None, "mosaic_gpu" or "xla".

    Returns:
      the normed tokens `[tokens, in]`, experts int32 `[tokens, top_k]`, best first, and weights float32 `[tokens,
      top_k]`.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    top_k = count("route", "top_k", top_k)
    how = {"eps": number("route", "eps", eps), "normalise": flag("route", "normalise", normalise)}
    signature, arrays = _route(top_k), {"x": x, "norm": norm, "router": router}
    _, sizes = signature.check(**arrays)
    if top_k > sizes["e"]:
        raise ArgumentError(f"route: top_k is {top_k}; it must be at most e = {sizes['e']} of router")
    return dispatch(signature, implementation, arrays, top_k=top_k, **how)


@functools.cache
def _route(top_k: int) -> Signature:
    return Signature(
        "route",
        {"x": Array("tokens in"), "norm": Array("in"), "router": Array("e in")},
        (Result("tokens in", "x"), Result(f"tokens {top_k}", "int32"), Result(f"tokens {top_k}", "float32")),
        same_dtype=("x", "norm", "router"),
    )
