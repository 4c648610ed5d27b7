"""Portable grouped matmul: a loop over blocks of rows of one group. A few rows are one product each.

`lax.ragged_dot` multiplies every row by every group's matrix on CPU and GPU, which this avoids.
"""

import jax
import jax.numpy as jnp

_BLOCK_ROWS = 128
_FEW_ROWS = 16


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    rows, groups = lhs.shape[0], rhs.shape[0]
    if rows <= _FEW_ROWS:
        # Each row by its own matrix, without a loop: on an accelerator every turn costs a round trip to the host.
        group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")
        matrices = jnp.take(rhs, group, axis=0, mode="clip")
        return jnp.einsum("mk,mkn->mn", lhs, matrices, preferred_element_type=jnp.float32).astype(lhs.dtype)
    block = min(_BLOCK_ROWS, max(8, 1 << (rows // groups).bit_length()))
    group_ends = jnp.cumsum(group_sizes)
    group_starts = group_ends - group_sizes
    group_blocks = (group_sizes + block - 1) // block
    block_ends = jnp.cumsum(group_blocks)

    lhs = jnp.pad(lhs, ((0, block), (0, 0)))

    def multiply(index: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(block_ends, index, side="right")
        start = group_starts[group] + (index - (block_ends[group] - group_blocks[group])) * block
        rows_in = jax.lax.dynamic_slice_in_dim(lhs, start, block)
        matrix = jax.lax.dynamic_index_in_dim(rhs, group, keepdims=False)
        rows_out = jnp.dot(rows_in, matrix, preferred_element_type=jnp.float32).astype(out.dtype)
        # The last block of a group also writes rows of the next group. That group's blocks overwrite them later.
        return jax.lax.dynamic_update_slice_in_dim(out, rows_out, start, axis=0)

    out = jnp.zeros((rows + block, rhs.shape[2]), lhs.dtype)
    return jax.lax.fori_loop(0, block_ends[-1], multiply, out)[:rows]


def expert_mlp(lhs: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array) -> jax.Array:
    gate, up = jnp.split(grouped_matmul(lhs, gate_up, group_sizes).astype(jnp.float32), 2, axis=-1)
    return grouped_matmul((jax.nn.silu(gate) * up).astype(lhs.dtype), down, group_sizes)
