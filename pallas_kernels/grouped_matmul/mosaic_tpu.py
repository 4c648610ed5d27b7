"""Experts on TPUs, through `lax.ragged_dot`.

For a TPU the compiler makes a Mosaic kernel of it, of the same design as JAX's Megablox: from the sizes of the groups
follow the tiles of rows that have one, and only those are multiplied, and their groups' matrices read. It also chooses
the tiling, which Megablox leaves to its caller.
"""

import jax
import jax.numpy as jnp


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`.

    Raises:
      NotImplementedError: neither bfloat16 nor float32.
    """
    if lhs.dtype not in (jnp.bfloat16, jnp.float32) or rhs.dtype != lhs.dtype:
        raise NotImplementedError(f"rows {lhs.dtype} and matrices {rhs.dtype}: both must be bfloat16 or both float32")
    sizes = group_sizes.astype(jnp.int32)
    out = jax.lax.ragged_dot(lhs, rhs, sizes, preferred_element_type=lhs.dtype)
    # Nothing is said about rows of no group.
    return jnp.where(jnp.arange(lhs.shape[0])[:, None] < jnp.sum(sizes), out, 0)


def expert_mlp(lhs: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.expert_mlp`."""
    gate, up = jnp.split(grouped_matmul(lhs, gate_up, group_sizes).astype(jnp.float32), 2, axis=-1)
    return grouped_matmul((jax.nn.silu(gate) * up).astype(lhs.dtype), down, group_sizes)
