"""Experts whose matrices have fewer bits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.checks import FLOAT32, INTEGERS, Array, Result, Signature
from pallas_kernels.dispatch import dispatch
from pallas_kernels.errors import ArgumentError
from pallas_kernels.grouped_matmul.activations import BLOCK, QuantizedRows
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
        "lhs_scales": Array("rows in_blocks", FLOAT32, optional=True, gradient=False),
        **_arrays("rhs", "", "in", "out"),
        "group_sizes": Array("e", INTEGERS),
    },
    (Result("rows out", "lhs"),),
)

_EXPERTS = Signature(
    "quantized_expert_mlp",
    {
        "lhs": Array("rows in", gradient=False),
        "lhs_scales": Array("rows in_blocks", FLOAT32, optional=True, gradient=False),
        **_arrays("gate_up", "gate_up_", "in", "both"),
        **_arrays("down", "down_", "f", "in"),
        "group_sizes": Array("e", INTEGERS),
    },
    (Result("rows in", "lhs"),),
)


def quantized_grouped_matmul(
    lhs: ArrayLike | QuantizedRows,
    rhs: QuantizedMatrices,
    group_sizes: ArrayLike,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """`grouped_matmul` with matrices of fewer bits: a few at a time become numbers of the dtype of lhs. No gradient.

    Args:
      lhs: `[rows, in]`, bfloat16, float16 or float32, sorted by group. Of `QuantizedRows`, "xla" multiplies the numbers
        in float32, and "mosaic_gpu" the values in float8.
      rhs: `[e, in, out]`.
      group_sizes: int32 `[e]`, as for `grouped_matmul`.
      implementation: None for the best one that this machine has, "mosaic_gpu" or "xla". In "mosaic_gpu" scales are
        factors on float32 sums, so the matrices' numbers are not rounded.

    Returns:
      `[rows, out]` in the dtype of lhs. Rows behind the last group are zeros.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    signature, rows = _with_rows(_PRODUCT, lhs)
    flat = _flat(_PRODUCT, "rhs", rhs, _inputs(lhs), None)
    arrays = dict(zip(signature.arrays, [*rows, *flat, group_sizes], strict=True))
    return dispatch(signature, implementation, arrays, block=rhs.block, dtype=_dtype(lhs))


def quantized_expert_mlp(
    lhs: ArrayLike | QuantizedRows,
    gate_up: QuantizedMatrices,
    down: QuantizedMatrices,
    group_sizes: ArrayLike,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """`expert_mlp` with matrices of fewer bits: a few at a time become numbers of the dtype of lhs. No gradient.

    Args:
      lhs: `[rows, in]`, as for `quantized_grouped_matmul`. Of `QuantizedRows`, what down multiplies is rounded too: to
        the dtype of lhs, and then to float8.
      gate_up: `[e, in, 2 * f]`. The first f columns are gate, the last f are up.
      down: `[e, f, in]`.
      group_sizes: int32 `[e]`, as for `expert_mlp`.
      implementation: None for the best one that this machine has, "mosaic_gpu" or "xla". In "mosaic_gpu" scales are
        factors on float32 sums, so the matrices' numbers are not rounded.

    Returns:
      `[rows, in]` in the dtype of lhs. Rows behind the last group are zeros.

    Raises:
      ArgumentError: a shape, dtype or number does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    inputs, (signature, rows) = _inputs(lhs), _with_rows(_EXPERTS, lhs)
    flat = _flat(_EXPERTS, "gate_up", gate_up, inputs, 2 * down.shape[1])
    flat += _flat(_EXPERTS, "down", down, down.shape[1], inputs)
    arrays = dict(zip(signature.arrays, [*rows, *flat, group_sizes], strict=True))
    static = {"gate_up_block": gate_up.block, "down_block": down.block, "dtype": _dtype(lhs)}
    return dispatch(signature, implementation, arrays, **static)


def _with_rows(signature: Signature, lhs: ArrayLike | QuantizedRows) -> tuple[Signature, list[Any]]:
    """The signature of a call with such rows, and their arrays: values, and scales or None."""
    if not isinstance(lhs, QuantizedRows):
        return signature, [lhs, None]
    inputs = _inputs(lhs)
    if inputs is not None and (wanted := [lhs.shape[0], -(-inputs // BLOCK)]) != list(lhs.scales.shape):
        raise ArgumentError(f"{signature.operation}: lhs has scales {list(lhs.scales.shape)}; they must be {wanted}")
    arrays = {**signature.arrays, "lhs": Array("rows in", ("float8_e4m3fn",), gradient=False)}
    results = tuple(dataclasses.replace(each, dtype=jnp.dtype(lhs.dtype).name) for each in signature.results)
    return dataclasses.replace(signature, arrays=arrays, results=results), [lhs.values, lhs.scales]


def _dtype(lhs: ArrayLike | QuantizedRows) -> Any:
    """Of the results of `QuantizedRows`; None of an array, whose dtype they have."""
    return jnp.dtype(lhs.dtype) if isinstance(lhs, QuantizedRows) else None


def _inputs(lhs: ArrayLike | QuantizedRows) -> int | None:
    """The columns of lhs; None of what is no matrix, which is refused later."""
    shape = lhs.shape if isinstance(lhs, QuantizedRows) else jnp.shape(lhs)
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
