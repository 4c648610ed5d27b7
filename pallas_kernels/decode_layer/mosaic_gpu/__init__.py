"""What a decoder layer computes of few tokens on Hopper GPUs (Pallas Mosaic GPU, sm_90a), each in one launch or two.

`products` multiplies, as code for single threads that a test runs in NumPy. `finishing`, `routing`, `ordering` and
`combining` are the kernels.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_layer.mosaic_gpu import products
from pallas_kernels.decode_layer.mosaic_gpu.combining import MOST_EXPERTS, CombineShape, combine
from pallas_kernels.decode_layer.mosaic_gpu.finishing import DIM, INDEX_DIM, FinishShape, finish
from pallas_kernels.decode_layer.mosaic_gpu.routing import EXPERTS, MOST_CHOSEN, RouteShape, choose

MOST_TOKENS = 64
_MOST_INDEX_HEADS = 32
_MOST_INPUTS = 2048
"""Of matrices whose tokens are normed in shared memory."""


def finish_projections(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index: jax.Array,
    index_k: jax.Array,
    q_norm: jax.Array,
    k_norm: jax.Array,
    index_q_norm: jax.Array,
    index_k_norm: jax.Array,
    index_k_bias: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    index_cos: jax.Array,
    index_sin: jax.Array,
    kv_pages: jax.Array | None,
    index_pages: jax.Array | None,
    slots: jax.Array | None,
    *,
    eps: float,
    index_eps: float,
) -> tuple[jax.Array, ...]:
    """See `api.finish_projections`.

    Args:
      q, k, v: bfloat16, at most 64 tokens; heads of 128 dimensions.
      index, index_k: an even number of heads, at most 32, of 64 dimensions.
      kv_pages, index_pages: bfloat16.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take. The device is not checked.
    """
    (tokens, heads, dim), index_dim = q.shape, index_k.shape[1]
    index_heads = index.shape[1] // (index_dim + 1)
    if q.dtype != jnp.bfloat16:
        raise NotImplementedError(f"only bfloat16, not {q.dtype}")
    if tokens > MOST_TOKENS:
        raise NotImplementedError(f"takes up to {MOST_TOKENS} tokens, not {tokens}")
    if (dim, index_dim) != (DIM, INDEX_DIM) or index_heads > _MOST_INDEX_HEADS or index_heads % 2:
        raise NotImplementedError(
            f"takes heads of {DIM}, and in the indexer an even number up to {_MOST_INDEX_HEADS} of {INDEX_DIM}, "
            f"not {dim}, and {index_heads} of {index_dim}"
        )
    pages, rows = (), None
    if kv_pages is not None and index_pages is not None and slots is not None:
        if kv_pages.dtype != q.dtype or index_pages.dtype != q.dtype:
            raise NotImplementedError(f"takes bf16 pages, not {kv_pages.dtype} and {index_pages.dtype}")
        pages, rows = (slots, kv_pages, index_pages), kv_pages.shape[0] * kv_pages.shape[1]
    shape = FinishShape(tokens, heads, k.shape[1], index_heads, rows, float(eps), float(index_eps))
    norms = q_norm, k_norm, index_q_norm, index_k_norm, index_k_bias
    return finish((q, k, v, index, index_k, *norms, cos, sin, index_cos, index_sin), pages, shape)


def route(
    x: jax.Array,
    update: jax.Array,
    norm: jax.Array,
    router: jax.Array,
    valid: jax.Array,
    first_own: jax.Array | None,
    *,
    top_k: int,
    eps: float,
    normalise: bool,
    own: int | None,
) -> tuple[jax.Array, ...]:
    """See `api.route`.

    Args:
      x: bfloat16 `[tokens, in]`, at most 64 tokens; `in` a multiple of 256 up to 2,048.
      update, norm, router: bfloat16; 16, 32, 64 or 128 experts.
      top_k: at most 32.
      own: an even number.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take. The device is not checked.
    """
    _check(x)
    if len(router) not in (EXPERTS, 2 * EXPERTS, 4 * EXPERTS, 8 * EXPERTS) or top_k > MOST_CHOSEN:
        raise NotImplementedError(
            f"takes 16, 32, 64 or 128 experts, and chooses up to {MOST_CHOSEN}, not {top_k} of {len(router)}"
        )
    if own is not None and own % 2:
        raise NotImplementedError(f"takes an even number of experts that are here, not {own}")
    flags = valid.astype(jnp.int32)
    if first_own is not None:
        flags *= first_own + 1
    shape = RouteShape(len(x), x.shape[1], len(router), top_k, float(eps), normalise, own)
    return choose(x, update, norm, router, flags, shape)


def combine_experts(
    rows: jax.Array, row_of: jax.Array, weights: jax.Array, x: jax.Array, norm: jax.Array, *, eps: float
) -> tuple[jax.Array, ...]:
    """See `api.combine_experts`.

    Args:
      rows: bfloat16 `[tokens * k, in]`; k at most 32.
      x: bfloat16 `[tokens, in]`, at most 64 tokens; `in` a multiple of 256 up to 2,048.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take. The device is not checked.
    """
    _check(x)
    experts = row_of.shape[1]
    if experts > MOST_EXPERTS:
        raise NotImplementedError(f"takes up to {MOST_EXPERTS} rows of a token, not {experts}")
    return tuple(combine(rows, row_of, weights, x, norm, CombineShape(len(x), x.shape[1], experts, float(eps))))


def _check(x: jax.Array) -> None:
    tokens, size = x.shape
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"only bfloat16, not {x.dtype}")
    if tokens > MOST_TOKENS or size % products.STEP or size > _MOST_INPUTS:
        raise NotImplementedError(
            f"takes up to {MOST_TOKENS} tokens of a multiple of {products.STEP} inputs up to {_MOST_INPUTS}, "
            f"not {list(x.shape)}"
        )
