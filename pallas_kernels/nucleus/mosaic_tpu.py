"""The portable search, whose candidates the TPU's selection finds."""

import jax

from pallas_kernels.nucleus import xla
from pallas_kernels.select_topk.mosaic_tpu import select_topk


def nucleus(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `api.nucleus`. Raises NotImplementedError where the selection does."""
    return xla.nucleus(logits, top_k, top_p, active, select=select_topk)
