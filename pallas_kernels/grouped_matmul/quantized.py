"""Experts whose matrices have fewer bits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.checks import INTEGERS, Array, Result, Signature
from pallas_kernels.dispatch import dispatch
from pallas_kernels.errors import ArgumentError
from pallas_kernels.quantized import QuantizedMatrices

_VALUES = ("float8_e4m3fn", "int8", "uint8")


def _arrays(values: str, prefix: str, rows: str, columns: str) -> dict[str, Array]:
    """The arrays of `QuantizedMatrices`; how their sizes follow from each other is checked by `_flat`."""
    grid = f"e {values}_row_blocks {values}_column_blocks"
    return {
        values: Array(f"e {rows}_stored {columns}", _VALUES, gradient=False),
        f"{prefix}scales": Array(grid, gradient=False),
        f"{prefix}zeros": Array(grid, ("int8",), optional=True, gradient=False),
    }


_PRODUCT = Signature(
    "quantized_grouped_matmul",
    {
        "lhs": Array("rows in", gradient=False),
        **_arrays("rhs", "", "in", "out"),
        "group_sizes": Array("e", INTEGERS),
    },
    (Result("rows out", "lhs"),),
)

_EXPERTS = Signature(
    "quantized_expert_mlp",
    {
        "lhs": Array("rows in", gradient=False),
        **_arrays("gate_up", "gate_up_", "in", "both"),
        **_arrays("down", "down_", "f", "in"),
        "group_sizes": Array("e", INTEGERS),
    },
    (Result("rows in", "lhs"),),
)


def quantized_grouped_matmul(
    lhs: ArrayLike, rhs: QuantizedMatrices, group_sizes: ArrayLike, *, implementation: str | None = None
) -> jax.Array:
    """`grouped_matmul` with matrices of fewer bits: a few at a time become numbers of the dtype of lhs. No gradient.

    Args:
      lhs: `[rows, in]`, bfloat16, float16 or float32, sorted by group.
      rhs: `[e, in, out]`.
      group_sizes: int32 `[e]`, as for `grouped_matmul`.
      implementation: None, "mosaic_gpu" or "xla". None is "xla". In "mosaic_gpu" scales are factors on float32 sums,
        so the matrices' numbers are not rounded.

    Returns:
      `[rows, out]` in the dtype of lhs. Rows behind the last group are zeros.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    implementation = implementation or "xla"  # No GPU has measured the other.
    flat = _flat(_PRODUCT, "rhs", rhs, _inputs(lhs), None)
    arrays = dict(zip(_PRODUCT.arrays, [lhs, *flat, group_sizes], strict=True))
    return dispatch(_PRODUCT, implementation, arrays, block=rhs.block)


def quantized_expert_mlp(
    lhs: ArrayLike,
    gate_up: QuantizedMatrices,
    down: QuantizedMatrices,
    group_sizes: ArrayLike,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """`expert_mlp` with matrices of fewer bits: a few at a time become numbers of the dtype of lhs. No gradient.

    Args:
      lhs: `[rows, in]`, bfloat16, float16 or float32, sorted by group.
      gate_up: `[e, in, 2 * f]`. The first f columns are gate, the last f are up.
      down: `[e, f, in]`.
      group_sizes: int32 `[e]`, as for `expert_mlp`.
      implementation: None, "mosaic_gpu" or "xla". None is "xla". In "mosaic_gpu" scales are factors on float32 sums,
        so the matrices' numbers are not rounded.

    Returns:
      `[rows, in]` in the dtype of lhs. Rows behind the last group are zeros.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    implementation = implementation or "xla"  # No GPU has measured the other.
    inputs = _inputs(lhs)
    flat = _flat(_EXPERTS, "gate_up", gate_up, inputs, 2 * down.shape[1])
    flat += _flat(_EXPERTS, "down", down, down.shape[1], inputs)
    arrays = dict(zip(_EXPERTS.arrays, [lhs, *flat, group_sizes], strict=True))
    return dispatch(_EXPERTS, implementation, arrays, gate_up_block=gate_up.block, down_block=down.block)


def _inputs(lhs: ArrayLike) -> int | None:
    """The columns of lhs; None of what is no matrix, which is refused later."""
    shape = jnp.shape(lhs)
    return shape[1] if len(shape) == 2 else None


def _flat(
    signature: Signature, name: str, matrices: QuantizedMatrices, rows: int | None, columns: int | None
) -> list[Any]:
    """The arrays of matrices that take `rows` inputs and give `columns` outputs, where these are known."""
    shape = matrices.shape
    wanted = [shape[0], shape[1] if rows is None else rows, shape[2] if columns is None else columns]
    if list(shape) != wanted:
        raise ArgumentError(f"{signature.operation}: {name} has shape {list(shape)}; it must be {wanted}")
    grid = [shape[0], *(-(-size // block) for size, block in zip(shape[1:], matrices.block, strict=True))]
    if list(matrices.scales.shape) != grid:
        raise ArgumentError(
            f"{signature.operation}: {name} has scales {list(matrices.scales.shape)}; with blocks of "
            f"{matrices.block[0]} x {matrices.block[1]} they must be {grid}"
        )
    return [matrices.values, matrices.scales, matrices.zeros]
