"""A decoder layer's products for few tokens on Hopper GPUs (Pallas Mosaic GPU, sm_90a), each in one launch.

`products` multiplies, as code for single threads that a test runs in NumPy. `projections`, `output` and `routing` are
the kernels.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_layer.mosaic_gpu import products
from pallas_kernels.decode_layer.mosaic_gpu.output import OUTPUTS, OutputShape, project_output
from pallas_kernels.decode_layer.mosaic_gpu.projections import DIM, INDEX_DIM, ProjectionShape, project
from pallas_kernels.decode_layer.mosaic_gpu.routing import EXPERTS, RouteShape, choose

MOST_TOKENS = 64
_MOST_INPUTS = 2048
"""Of matrices whose tokens are normed in shared memory."""


def decode_projections(
    x: jax.Array,
    norm: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index_q: jax.Array,
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
    index_heads: int,
    eps: float,
    index_eps: float,
) -> tuple[jax.Array, ...]:
    """See `api.decode_projections`.

    Args:
      x: bfloat16 `[tokens, in]`, at most 64 tokens; `in` a multiple of 256 up to 2,048.
      q, k, v: heads of 128 dimensions.
      index_q, index_k: at most 32 heads of 64 dimensions.
      kv_pages, index_pages: bfloat16.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take. The device is not checked.
    """
    _check(x, most_inputs=_MOST_INPUTS)
    heads, dim, _ = q.shape
    index_dim = index_k.shape[0]
    if (dim, index_dim) != (DIM, INDEX_DIM) or index_heads > 32:
        raise NotImplementedError(
            f"takes heads of {DIM}, and in the indexer at most 32 of {INDEX_DIM}, "
            f"not {dim}, and {index_heads} of {index_dim}"
        )
    pages, rows = (), None
    if kv_pages is not None and index_pages is not None and slots is not None:
        if kv_pages.dtype != x.dtype or index_pages.dtype != x.dtype:
            raise NotImplementedError(f"takes bf16 pages, not {kv_pages.dtype} and {index_pages.dtype}")
        pages, rows = (slots, kv_pages, index_pages), kv_pages.shape[0] * kv_pages.shape[1]
    shape = ProjectionShape(len(x), x.shape[1], heads, len(k), index_heads, rows, float(eps), float(index_eps))
    weights = norm, q, k, v, index_q, index_k, q_norm, k_norm, index_q_norm, index_k_norm, index_k_bias
    return tuple(project((x, *weights, cos, sin, index_cos, index_sin), pages, shape))


def output_projection(attended: jax.Array, weight: jax.Array, residual: jax.Array) -> jax.Array:
    """See `api.output_projection`.

    Args:
      attended: bfloat16 `[tokens, n, d]`, at most 64 tokens; `n * d` a multiple of 256.
      weight: bfloat16 `[in, n, d]`; `in` a multiple of 16.
      residual: bfloat16 `[tokens, in]`.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take. The device is not checked.
    """
    attended = attended.reshape(len(attended), -1)
    _check(attended)
    if residual.shape[1] % OUTPUTS:
        raise NotImplementedError(f"takes a multiple of {OUTPUTS} outputs, not {residual.shape[1]}")
    shape = OutputShape(len(attended), attended.shape[1], residual.shape[1])
    return project_output(attended, weight.reshape(shape.outputs, -1), residual, shape)


def route(
    x: jax.Array, norm: jax.Array, router: jax.Array, *, top_k: int, eps: float, normalise: bool
) -> tuple[jax.Array, ...]:
    """See `api.route`.

    Args:
      x: bfloat16 `[tokens, in]`, at most 64 tokens; `in` a multiple of 256 up to 2,048.
      norm, router: bfloat16; 16, 32, 64 or 128 experts.
      top_k: at most 32.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take. The device is not checked.
    """
    _check(x, most_inputs=_MOST_INPUTS)
    if len(router) not in (EXPERTS, 2 * EXPERTS, 4 * EXPERTS, 8 * EXPERTS) or top_k > 32:
        raise NotImplementedError(
            f"takes 16, 32, 64 or 128 experts, and chooses up to 32, not {top_k} of {len(router)}"
        )
    return tuple(choose(x, norm, router, RouteShape(len(x), x.shape[1], len(router), top_k, float(eps), normalise)))


def _check(x: jax.Array, most_inputs: int | None = None) -> None:
    tokens, size = x.shape
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"only bfloat16, not {x.dtype}")
    if tokens > MOST_TOKENS or size % products.STEP or size > (most_inputs or size):
        limit = f" up to {most_inputs}" if most_inputs else ""
        raise NotImplementedError(
            f"takes up to {MOST_TOKENS} tokens of a multiple of {products.STEP} inputs{limit}, not {list(x.shape)}"
        )
