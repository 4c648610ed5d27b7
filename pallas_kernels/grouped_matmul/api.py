"""One matrix product per group of rows: the experts of a mixture-of-experts layer."""

import jax
from jax.typing import ArrayLike

from pallas_kernels.checks import INTEGERS, Array, Result, Signature
from pallas_kernels.dispatch import dispatch

_PRODUCT = Signature(
    "grouped_matmul",
    {"lhs": Array("rows in"), "rhs": Array("e in out"), "group_sizes": Array("e", INTEGERS)},
    (Result("rows out", "lhs"),),
)

_EXPERTS = Signature(
    "expert_mlp",
    {
        "lhs": Array("rows in"),
        "gate_up": Array("e in 2*f"),
        "down": Array("e f in"),
        "group_sizes": Array("e", INTEGERS),
    },
    (Result("rows in", "lhs"),),
)


def grouped_matmul(
    lhs: ArrayLike, rhs: ArrayLike, group_sizes: ArrayLike, *, implementation: str | None = None
) -> jax.Array:
    """Multiplies consecutive groups of rows of `lhs` by the matrix of their group, with float32 sums.

    Work is proportional to the rows, and only matrices of groups that have rows are read. "xla" on GPUs also multiplies
    padding, up to a block for each group, and reads all matrices for 17 to 512 rows.

    Args:
      lhs: `[rows, in]`, bfloat16, float16 or float32, sorted by group.
      rhs: `[e, in, out]`.
      group_sizes: int32 `[e]`, the number of rows of each group, in order. A size below 0 counts as 0. Groups for
        which too few rows are left get those, or none.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      `[rows, out]` in the dtype of lhs. Rows behind the last group are zeros.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    return dispatch(_PRODUCT, implementation, {"lhs": lhs, "rhs": rhs, "group_sizes": group_sizes})


def expert_mlp(
    lhs: ArrayLike, gate_up: ArrayLike, down: ArrayLike, group_sizes: ArrayLike, *, implementation: str | None = None
) -> jax.Array:
    """SwiGLU experts: `silu(lhs @ gate) * (lhs @ up) @ down` with the matrices of each row's group.

    The nonlinearity is computed in float32. Shazeer, "GLU Variants Improve Transformer", has the formula.

    Args:
      lhs: `[rows, in]`, bfloat16, float16 or float32, sorted by group.
      gate_up: `[e, in, 2 * f]`. The first f columns are gate, the last f are up.
      down: `[e, f, in]`.
      group_sizes: int32 `[e]`, the number of rows of each group, in order. A size below 0 counts as 0. Groups for
        which too few rows are left get those, or none.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      `[rows, in]` in the dtype of lhs. Rows behind the last group are zeros.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    arrays = {"lhs": lhs, "gate_up": gate_up, "down": down, "group_sizes": group_sizes}
    return dispatch(_EXPERTS, implementation, arrays)
