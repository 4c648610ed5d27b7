"""What a decoder layer computes of single tokens beside its attention and its experts."""

import functools
from typing import NamedTuple

import jax
from jax.typing import ArrayLike

from pallas_kernels.checks import FLOAT32, INTEGERS, Array, Result, Signature, Sizes, count, flag, number
from pallas_kernels.dispatch import dispatch
from pallas_kernels.errors import ArgumentError

type Axes = tuple[str, ...]
"""Mesh axes, outermost first."""


class Routed(NamedTuple):
    """What `route` gives. A row is a pair of a token and one of its experts.

    Attributes:
      y: `[tokens, in]`, the tokens with what was added.
      normed: `[tokens, in]`, their RMS norms.
      experts: int32 `[tokens, top_k]`, best first, of tokens that are not valid too.
      weights: float32 `[tokens, top_k]`; 0 for tokens that are not valid, and for experts that are not here.
      rows: `[tokens * top_k, in]`, the normed token of each row. Rows are sorted by expert, those of one expert by
        token. Rows of tokens that are not valid, or of experts that are not here, are behind the last expert's.
      row_of: int32 `[tokens, top_k]`, the place of each row.
      group_sizes: int32 `[e]`, rows of each expert, or `[own]` of those that are here.
    """

    y: jax.Array
    normed: jax.Array
    experts: jax.Array
    weights: jax.Array
    rows: jax.Array
    row_of: jax.Array
    group_sizes: jax.Array


def finish_projections(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    index: ArrayLike,
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
    eps: float,
    index_eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """What attention and its indexer need of one new token of each sequence, and the token's rows of the cache.

    It takes the products of the normed tokens with a layer's projections. Heads of q and k get their RMS norm and their
    rotation. So do the indexer's queries; its key gets a layer norm and the rotation. What norms give is rounded to the
    dtype of q, as in a layer of single operations.

    Where pages are given, the new rows are written to them, and a caller that donates the pages gets them without a
    copy. Otherwise the rows are returned, for a cache that stores them in another form.

    Args:
      q: `[tokens, n, d]`, bfloat16, float16 or float32; at least one token.
      k, v: `[tokens, kv_heads, d]`. They, all arrays of the indexer but angles and pages, and all norms have the dtype
        of q.
      index: `[tokens, index_heads * c + index_heads]`: the indexer's queries, and then its gates.
      index_k: `[tokens, c]`.
      q_norm, k_norm: `[d]`.
      index_q_norm, index_k_norm, index_k_bias: `[c]`.
      cos, sin: float32 `[tokens, d / 2]`, of each token's rotary angles.
      index_cos, index_sin: float32 `[tokens, c / 2]`.
      kv_pages: `[pages, page_size, 2 * kv_heads, d]`; a row holds the keys and then the values of all heads. Or None.
      index_pages: `[pages, page_size, c]`, with `kv_pages`.
      slots: int32 `[tokens]`, `page * page_size + offset`, with `kv_pages`. A slot that is not in the pages is dropped.
        No two tokens have one slot.
      eps: of the RMS norms of q and k.
      index_eps: of the indexer's norms.
      implementation: None, "mosaic_gpu" or "xla".

    Returns:
      queries `[tokens, n, d]`, the indexer's queries `[tokens, index_heads, c]` and its gates float32 `[tokens,
      index_heads]`. Then the pages with the new rows, or the rows: `[tokens, 2 * kv_heads, d]` and `[tokens, c]`.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    name = "finish_projections"
    arrays = {"q": q, "k": k, "v": v, "index": index, "index_k": index_k, "q_norm": q_norm, "k_norm": k_norm}
    arrays |= {"index_q_norm": index_q_norm, "index_k_norm": index_k_norm, "index_k_bias": index_k_bias}
    arrays |= {"cos": cos, "sin": sin, "index_cos": index_cos, "index_sin": index_sin}
    cache = {"kv_pages": kv_pages, "index_pages": index_pages, "slots": slots}
    given = [key for key, value in cache.items() if value is not None]
    if given and len(given) < len(cache):
        raise ArgumentError(f"{name}: {', '.join(given)} given alone; {', '.join(cache)} go together")
    # How many heads the indexer has follows from sizes that fit.
    _, sizes = _finish(1, bool(given)).check(**arrays, **cache)
    columns, of_head = sizes["index_columns"], 2 * sizes["c"] + 1
    if not columns or columns % of_head:
        raise ArgumentError(
            f"{name}: index has {columns} columns; it must have {of_head} for each head of the indexer, "
            f"{of_head - 1} of its query and one of its gate"
        )
    how = {"eps": number(name, "eps", eps), "index_eps": number(name, "index_eps", index_eps)}
    return dispatch(_finish(columns // of_head, bool(given)), implementation, arrays | cache, **how)


@functools.cache
def _finish(index_heads: int, paged: bool) -> Signature:
    arrays = {
        "q": Array("tokens n 2*d"),
        "k": Array("tokens k 2*d"),
        "v": Array("tokens k 2*d"),
        "index": Array("tokens index_columns"),
        "index_k": Array("tokens 2*c"),
        "q_norm": Array("2*d"),
        "k_norm": Array("2*d"),
        "index_q_norm": Array("2*c"),
        "index_k_norm": Array("2*c"),
        "index_k_bias": Array("2*c"),
    }
    of_one_dtype = tuple(arrays)
    arrays |= dict.fromkeys(("cos", "sin"), Array("tokens d", FLOAT32))
    arrays |= dict.fromkeys(("index_cos", "index_sin"), Array("tokens c", FLOAT32))
    arrays |= {
        "kv_pages": Array("pages page_size 2*k 2*d", optional=True),
        "index_pages": Array("pages page_size 2*c", optional=True),
        "slots": Array("tokens", INTEGERS, optional=True),
    }
    rows = ("pages page_size", "kv_pages", "index_pages") if paged else ("tokens", "q", "q")
    return Signature(
        "finish_projections",
        arrays,
        (
            Result("tokens n 2*d", "q"),
            Result(f"tokens {index_heads} 2*c", "q"),
            Result(f"tokens {index_heads}", "float32"),
            Result(f"{rows[0]} 2*k 2*d", rows[1]),
            Result(f"{rows[0]} 2*c", rows[2]),
        ),
        same_dtype=of_one_dtype,
    )


def route(
    x: ArrayLike,
    update: ArrayLike,
    norm: ArrayLike,
    router: ArrayLike,
    valid: ArrayLike,
    first_own: ArrayLike | None = None,
    *,
    top_k: int,
    eps: float,
    normalise: bool = True,
    own: int | None = None,
    implementation: str | None = None,
) -> Routed:
    """Adds to each token, and gives its RMS norm, the experts with the highest probabilities, and rows for these.

    Of `y = x + update`, rounded, probabilities are the softmax of `rms_norm(y) @ router^T`, in float32. Of equal ones
    the lower expert comes first.

    Args:
      x: `[tokens, in]`, bfloat16, float16 or float32; at least one token.
      update: `[tokens, in]`, what attention adds.
      norm: `[in]`.
      router: `[e, in]`.
      valid: bool `[tokens]`. The others go to no expert.
      first_own: int32 `[]`, the first of the experts that are here, or None if all are. The choice is among all.
      top_k: experts of a token, at most e.
      eps: of the norm.
      normalise: whether the weights of a token are divided by their sum.
      own: how many experts are here, at most e; with `first_own`.
      implementation: None, "mosaic_gpu" or "xla".

    Returns:
      As `Routed` describes.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    top_k = count("route", "top_k", top_k)
    how = {"eps": number("route", "eps", eps), "normalise": flag("route", "normalise", normalise)}
    arrays = {"x": x, "update": update, "norm": norm, "router": router, "valid": valid, "first_own": first_own}
    if (first_own is None) != (own is None):
        raise ArgumentError("route: first_own and own go together; one of them is None")
    own = None if own is None else count("route", "own", own)
    signature = _route(top_k, own)
    _, sizes = signature.check(**arrays)
    for name, number_of in (("top_k", top_k), ("own", own or 0)):
        if number_of > sizes["e"]:
            raise ArgumentError(f"route: {name} is {number_of}; it must be at most e = {sizes['e']} of router")
    return Routed(*dispatch(signature, implementation, arrays, top_k=top_k, own=own, **how))


@functools.cache
def _route(top_k: int, own: int | None) -> Signature:
    return Signature(
        "route",
        {
            "x": Array("tokens in"),
            "update": Array("tokens in"),
            "norm": Array("in"),
            "router": Array("e in"),
            "valid": Array("tokens", ("bool",)),
            "first_own": Array("", INTEGERS, optional=True),
        },
        (
            Result("tokens in", "x"),
            Result("tokens in", "x"),
            Result(f"tokens {top_k}", "int32"),
            Result(f"tokens {top_k}", "float32"),
            Result(f"tokens*{top_k} in", "x"),
            Result(f"tokens {top_k}", "int32"),
            Result("e" if own is None else f"{own}", "int32"),
        ),
        same_dtype=("x", "update", "norm", "router"),
    )


def gather_tokens(
    x: ArrayLike,
    update: ArrayLike,
    addresses: ArrayLike | None = None,
    *,
    axes: Axes = (),
    implementation: str | None = None,
) -> jax.Array:
    """Adds to the tokens of each device, and gives every device those of all. Called inside `jax.shard_map`.

    Args:
      x: `[tokens, in]`, bfloat16, float16 or float32; at least one token, and as many on each device.
      update: `[tokens, in]`, what attention adds, in the dtype of x.
      addresses: int32 `[2 * devices + 1]`, this device's row of `peers.peer_addresses` for `axes`, through which a
        kernel exchanges. None leaves the exchange to XLA.
      axes: mesh axes along which devices have different tokens.
      implementation: None, "mosaic_gpu" or "xla".

    Returns:
      `x + update`, rounded, of all devices along `axes` in the order of their ranks: `[devices * tokens, in]`.

    Raises:
      ArgumentError: a shape or dtype does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    arrays = {"x": x, "update": update, "addresses": addresses}
    signature = _gather(devices := _devices(axes))
    _, sizes = signature.check(**arrays)
    _check_addresses("gather_tokens", sizes, devices)
    return dispatch(signature, implementation, arrays, axes=axes)


_ADDRESSES = Array("halves", INTEGERS, optional=True)


@functools.cache
def _gather(devices: int) -> Signature:
    arrays = {"x": Array("tokens in"), "update": Array("tokens in"), "addresses": _ADDRESSES}
    return Signature("gather_tokens", arrays, (Result(f"{devices}*tokens in", "x"),), same_dtype=("x", "update"))


def _devices(axes: Axes) -> int:
    return jax.lax.axis_size(axes) if axes else 1


def _check_addresses(name: str, sizes: Sizes, devices: int) -> None:
    wanted = 2 * devices + 1
    if sizes.get("halves", wanted) != wanted or ("halves" in sizes and devices == 1):
        raise ArgumentError(
            f"{name}: addresses has {sizes['halves']} numbers; it must have 2 * devices + 1 of the devices along axes, "
            f"which are {devices}, and be None if that is 1"
        )


def combine_experts(
    rows: ArrayLike,
    row_of: ArrayLike,
    weights: ArrayLike,
    x: ArrayLike,
    norm: ArrayLike,
    addresses: ArrayLike | None = None,
    *,
    eps: float,
    axes: Axes = (),
    summed: Axes = (),
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of what a token's experts gave, the residual, and the RMS norm of the next layer.

    `y = x + sum(weights[:, i] * rows[row_of[:, i]])`. The sum is in float32, in the order of i, and rounded to the
    dtype of x before the addition, as y is behind it.

    Inside `jax.shard_map` devices may have different experts of the same tokens. Then their rounded sums are added up
    before the residual, and rounded. Along `axes` each device keeps its own tokens.

    Args:
      rows: `[tokens * k, in]`, bfloat16, float16 or float32, in any order; at least one token. They must be finite:
        one with the weight 0 is multiplied too.
      row_of: int32 `[tokens, k]`, the place in `rows` of each of a token's rows, from 0 to `tokens * k - 1`. A place
        out of range is the nearest in range. Places may be the same.
      weights: float32 `[tokens, k]`; 0 for an expert that is not there.
      x: `[tokens, in]`, the residual, in the dtype of rows.
      norm: `[in]`, in the same dtype.
      addresses: as for `gather_tokens`; only without `summed`.
      eps: of the norm.
      axes: mesh axes along which devices have different experts, and of the results different tokens.
      summed: mesh axes along which devices have different experts, and of the results the same tokens.
      implementation: None, "mosaic_gpu" or "xla".

    Returns:
      y and `rms_norm(y)`, both `[tokens / devices along axes, in]` in the dtype of x.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    arrays = {"rows": rows, "row_of": row_of, "weights": weights, "x": x, "norm": norm, "addresses": addresses}
    how = {"eps": number("combine_experts", "eps", eps)}
    signature = _combine(devices := _devices(axes))
    _, sizes = signature.check(**arrays)
    _check_addresses("combine_experts", sizes, devices)
    if addresses is not None and summed:
        raise ArgumentError(f"combine_experts: addresses and summed = {summed} are given; only one of them may be")
    tokens = devices * sizes["tokens"]
    if sizes["r"] != tokens * sizes["k"]:
        raise ArgumentError(
            f"combine_experts: rows has {sizes['r']} rows; it must have tokens * k = {tokens} * {sizes['k']}, "
            "as many as row_of has places"
        )
    return dispatch(signature, implementation, arrays, axes=axes, summed=summed, **how)


@functools.cache
def _combine(devices: int) -> Signature:
    tokens = "tokens" if devices == 1 else f"{devices}*tokens"
    return Signature(
        "combine_experts",
        {
            "rows": Array("r in"),
            "row_of": Array(f"{tokens} k", INTEGERS),
            "weights": Array(f"{tokens} k", FLOAT32),
            "x": Array(f"{tokens} in"),
            "norm": Array("in"),
            "addresses": _ADDRESSES,
        },
        (Result("tokens in", "x"), Result("tokens in", "x")),
        same_dtype=("x", "rows", "norm"),
    )
