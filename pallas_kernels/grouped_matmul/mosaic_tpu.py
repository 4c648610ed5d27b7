"""Experts on TPUs, with `lax.ragged_dot`.

The TPU compiler replaces it by a Mosaic kernel with the design of JAX's Megablox: it multiplies only tiles of rows that
belong to a group, and reads only these groups' matrices. It also chooses the tiling, which Megablox leaves to its
caller.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.groups import group_ends


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`.

    Raises:
      NotImplementedError: dtypes other than bfloat16 and float32.
    """
    if lhs.dtype not in (jnp.bfloat16, jnp.float32) or rhs.dtype != lhs.dtype:
        raise NotImplementedError(f"rows {lhs.dtype} and matrices {rhs.dtype}: both must be bfloat16 or both float32")
    ends = group_ends(lhs.shape[0], group_sizes)
    out = jax.lax.ragged_dot(lhs, rhs, jnp.diff(ends, prepend=0), preferred_element_type=lhs.dtype)
    # ragged_dot does not define the rows of no group.
    return jnp.where(jnp.arange(lhs.shape[0])[:, None] < ends[-1], out, 0)


def expert_mlp(lhs: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.expert_mlp`.

    Raises:
      NotImplementedError: dtypes other than bfloat16 and float32.
    """
    gate, up = jnp.split(grouped_matmul(lhs, gate_up, group_sizes).astype(jnp.float32), 2, axis=-1)
    return grouped_matmul((jax.nn.silu(gate) * up).astype(lhs.dtype), down, group_sizes)
