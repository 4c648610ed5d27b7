"""What a decoder layer computes of few tokens on Hopper GPUs (Pallas Mosaic GPU, sm_90a), each in one launch or two.

`products` multiplies, as code for single threads that a test runs in NumPy. `finishing`, `routing`, `ordering`,
`combining` and `exchange` are the kernels.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_layer import xla
from pallas_kernels.decode_layer.mosaic_gpu import products
from pallas_kernels.decode_layer.mosaic_gpu.combining import MOST_EXPERTS, CombineShape, combine
from pallas_kernels.decode_layer.mosaic_gpu.exchange import GatherShape, gather
from pallas_kernels.decode_layer.mosaic_gpu.finishing import DIM, INDEX_DIM, FinishShape, finish
from pallas_kernels.decode_layer.mosaic_gpu.routing import EXPERTS, MOST_CHOSEN, RouteShape, choose
from pallas_kernels.gpu.peers import MOST_DEVICES, MOST_ROWS, ROW_WORDS

MOST_TOKENS = MOST_ROWS
_MOST_INDEX_HEADS = 32
_MOST_INPUTS = 2 * ROW_WORDS
"""Of matrices whose tokens are normed in shared memory, and of tokens that are exchanged."""


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


def gather_tokens(x: jax.Array, update: jax.Array, addresses: jax.Array | None, *, axes: tuple[str, ...]) -> jax.Array:
    """See `api.gather_tokens`.

    Args:
      x, update: bfloat16 `[tokens, in]`, at most 64 tokens of all devices; `in` a multiple of 256 up to 2,048.
      addresses: of 2 to 8 devices; without, XLA gathers.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take. The device is not checked.
    """
    if addresses is None:
        return xla.gather_tokens(x, update, None, axes=axes)
    devices = _devices_of(addresses)
    _check(x, devices)
    return gather(x, update, addresses, GatherShape(len(x), x.shape[1], devices))


def combine_experts(
    rows: jax.Array,
    row_of: jax.Array,
    weights: jax.Array,
    x: jax.Array,
    norm: jax.Array,
    addresses: jax.Array | None,
    *,
    eps: float,
    axes: tuple[str, ...],
    summed: tuple[str, ...],
) -> tuple[jax.Array, ...]:
    """See `api.combine_experts`.

    Args:
      rows: bfloat16 `[tokens * k, in]`; k at most 32.
      x: bfloat16 `[tokens, in]`, at most 64 tokens; `in` a multiple of 256 up to 2,048.
      addresses: of 2 to 8 devices; without, XLA adds up what several give.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take. The device is not checked.
    """
    _check(x)
    experts = row_of.shape[1]
    if experts > MOST_EXPERTS:
        raise NotImplementedError(f"takes up to {MOST_EXPERTS} rows of a token, not {experts}")
    shape = CombineShape(len(x), x.shape[1], experts, float(eps), 1 if addresses is None else _devices_of(addresses))
    if addresses is not None or not (axes or summed):
        return tuple(combine(rows, row_of, weights, x, norm, addresses, shape))
    mixed, _ = combine(rows, row_of, weights, jnp.zeros_like(x), norm, None, shape)
    return xla.add_over_devices(mixed, x, norm, eps, axes, summed)


def _devices_of(addresses: jax.Array) -> int:
    """How many devices exchange."""
    devices = len(addresses) // 2
    if not 1 < devices <= MOST_DEVICES:
        raise NotImplementedError(f"exchanges between 2 to {MOST_DEVICES} devices, not {devices}")
    return devices


def _check(x: jax.Array, devices: int = 1) -> None:
    tokens, size = devices * len(x), x.shape[1]
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"only bfloat16, not {x.dtype}")
    if tokens > MOST_TOKENS or size % products.STEP or size > _MOST_INPUTS:
        raise NotImplementedError(
            f"takes up to {MOST_TOKENS} tokens of a multiple of {products.STEP} inputs up to {_MOST_INPUTS}, "
            f"not {[tokens, size]}"
        )
