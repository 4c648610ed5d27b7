"""One matrix product per group of rows: the experts of a mixture-of-experts layer."""

import jax

from pallas_kernels.dispatch import dispatch


def grouped_matmul(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Multiplies consecutive groups of rows of `lhs` by the matrix of their group.

    Work is proportional to the rows, and only matrices of groups that have rows are read.

    Args:
      lhs: `[rows, in]`, sorted by group.
      rhs: `[e, in, out]`.
      group_sizes: int32 `[e]`, rows of each group, in order; they sum to at most `rows`.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      `[rows, out]` in the dtype of lhs; rows behind the last group are finite but mean nothing.
    """
    return dispatch("grouped_matmul.grouped_matmul", ("mosaic_gpu", "mosaic_tpu", "xla"), implementation)(
        lhs, rhs, group_sizes
    )


def expert_mlp(
    lhs: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """SwiGLU experts: `silu(lhs @ gate) * (lhs @ up) @ down` with the matrices of each row's group.

    The nonlinearity is computed in float32.

    Args:
      lhs: `[rows, in]`, sorted by group.
      gate_up: `[e, in, 2 * f]`; gate is the first f columns, up the last.
      down: `[e, f, in]`.
      group_sizes: int32 `[e]`, rows of each group, in order; they sum to at most `rows`.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      `[rows, in]` in the dtype of lhs; rows behind the last group are finite but mean nothing.
    """
    return dispatch("grouped_matmul.expert_mlp", ("mosaic_gpu", "mosaic_tpu", "xla"), implementation)(
        lhs, gate_up, down, group_sizes
    )
