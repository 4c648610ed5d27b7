"""Experts on TPUs, through JAX's Megablox.

Megablox walks the tiles of rows that have a group, so only matrices of groups with rows are read. `lax.ragged_dot` is
the compiler's own form of the same, but it asks for memory for other tilings than it takes.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

_LANES = 128
_ROWS = 512
"""Most rows of a tile; each group has at most one tile that other groups share."""


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`.

    Raises:
      NotImplementedError: dtypes or sizes that Megablox does not take.
    """
    rows, (inner, outer) = lhs.shape[0], rhs.shape[1:]
    if lhs.dtype != jnp.bfloat16 or rhs.dtype != lhs.dtype:
        raise NotImplementedError(f"takes bfloat16, not {lhs.dtype} and {rhs.dtype}")
    if jax.default_backend() == "tpu" and (inner % _LANES or outer % _LANES):
        raise NotImplementedError(f"takes matrices of multiples of {_LANES}, not of {inner} x {outer}")
    # As many as a group has on average, so that few rows are multiplied for nothing.
    tile = min(_ROWS, max(16, 1 << max(0, rows // rhs.shape[0] - 1).bit_length()))
    padded = jnp.pad(lhs, ((0, -rows % tile), (0, 0)))
    sizes = group_sizes.astype(jnp.int32)
    out = gmm(padded, rhs, sizes, lhs.dtype, (tile, _part(inner), _part(outer)))[:rows]
    # What no tile is for is never written.
    return jnp.where(jnp.arange(rows)[:, None] < jnp.sum(sizes), out, 0)


def expert_mlp(lhs: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.expert_mlp`."""
    gate, up = jnp.split(grouped_matmul(lhs, gate_up, group_sizes).astype(jnp.float32), 2, axis=-1)
    return grouped_matmul((jax.nn.silu(gate) * up).astype(lhs.dtype), down, group_sizes)


def _part(size: int) -> int:
    """Columns or rows of a matrix that are multiplied at once: a divisor, at most 1,024."""
    return next((part for part in range(1024, 0, -_LANES) if size % part == 0), size)
