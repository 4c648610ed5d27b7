"""Portable grouped matmul: a loop over blocks of rows of one group. A few rows are one product each.

`lax.ragged_dot` multiplies every row by every group's matrix on CPU and GPU, which this avoids. Matrices of fewer bits
become numbers where `take_matrices` takes those of a block.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.groups import group_ends
from pallas_kernels.meshes import vary_like
from pallas_kernels.quantized import QuantizedMatrices, take_matrices

_BLOCK_ROWS = 128
_FEW_ROWS = 16


class _Blocks(NamedTuple):
    """Rows of every group, cut into blocks of a few rows."""

    size: int
    number: jax.Array
    locate: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
    """Group, first row, and the end of the group's rows, of a block."""


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`. It has a gradient, for which only matrices of groups that have rows are read, too."""
    return _grouped_matmul(lhs, rhs, group_ends(lhs.shape[0], group_sizes))


def expert_mlp(lhs: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.expert_mlp`."""
    gate, up = jnp.split(grouped_matmul(lhs, gate_up, group_sizes).astype(jnp.float32), 2, axis=-1)
    return grouped_matmul((jax.nn.silu(gate) * up).astype(lhs.dtype), down, group_sizes)


def quantized_grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    group_sizes: jax.Array,
    *,
    block: tuple[int, int],
) -> jax.Array:
    """See `quantized.quantized_grouped_matmul`."""
    matrices = QuantizedMatrices(rhs, scales, zeros, block)
    return _multiply(lhs, matrices, group_ends(lhs.shape[0], group_sizes))


def quantized_expert_mlp(
    lhs: jax.Array,
    gate_up: jax.Array,
    gate_up_scales: jax.Array,
    gate_up_zeros: jax.Array | None,
    down: jax.Array,
    down_scales: jax.Array,
    down_zeros: jax.Array | None,
    group_sizes: jax.Array,
    *,
    gate_up_block: tuple[int, int],
    down_block: tuple[int, int],
) -> jax.Array:
    """See `quantized.quantized_expert_mlp`."""
    ends = group_ends(lhs.shape[0], group_sizes)
    both = _multiply(lhs, QuantizedMatrices(gate_up, gate_up_scales, gate_up_zeros, gate_up_block), ends)
    gate, up = jnp.split(both.astype(jnp.float32), 2, axis=-1)
    inner = (jax.nn.silu(gate) * up).astype(lhs.dtype)
    return _multiply(inner, QuantizedMatrices(down, down_scales, down_zeros, down_block), ends)


@jax.custom_vjp
def _grouped_matmul(lhs: jax.Array, rhs: jax.Array, ends: jax.Array) -> jax.Array:
    return _multiply(lhs, rhs, ends)


def _multiply(lhs: jax.Array, rhs: jax.Array | QuantizedMatrices, ends: jax.Array) -> jax.Array:
    rows = lhs.shape[0]
    if rows <= _FEW_ROWS:
        # Each row by its own matrix, without a loop: on an accelerator every turn costs a round trip to the host.
        matrices = take_matrices(rhs, _group_of_row(rows, ends), lhs.dtype)
        out = jnp.einsum("mk,mkn->mn", lhs, matrices, preferred_element_type=jnp.float32).astype(lhs.dtype)
    else:
        blocks = _cut(rows, ends)
        padded = jnp.pad(lhs, ((0, blocks.size), (0, 0)))

        def multiply(index: jax.Array, out: jax.Array) -> jax.Array:
            group, start, _ = blocks.locate(index)
            rows_in = jax.lax.dynamic_slice_in_dim(padded, start, blocks.size)
            matrix = take_matrices(rhs, group, lhs.dtype)
            rows_out = jnp.dot(rows_in, matrix, preferred_element_type=jnp.float32).astype(out.dtype)
            # The last block of a group also writes rows of the next group. That group's blocks overwrite them later.
            return jax.lax.dynamic_update_slice_in_dim(out, rows_out, start, axis=0)

        out = vary_like(jnp.zeros((rows + blocks.size, rhs.shape[2]), lhs.dtype), lhs)
        out = jax.lax.fori_loop(0, blocks.number, multiply, out)[:rows]
    return jnp.where(jnp.arange(rows)[:, None] < ends[-1], out, 0)


def _forward(lhs: jax.Array, rhs: jax.Array, ends: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _grouped_matmul(lhs, rhs, ends), (lhs, rhs, ends)


def _backward(saved: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    lhs, rhs, ends = saved
    d_lhs = _grouped_matmul(d_out, rhs.swapaxes(1, 2), ends).astype(lhs.dtype)
    rows = lhs.shape[0]
    blocks = _cut(rows, ends)
    padding = ((0, blocks.size), (0, 0))
    padded, d_padded = jnp.pad(lhs, padding), jnp.pad(d_out, padding)

    def add(index: jax.Array, d_rhs: jax.Array) -> jax.Array:
        group, start, end = blocks.locate(index)
        rows_in, d_rows = (jax.lax.dynamic_slice_in_dim(x, start, blocks.size) for x in (padded, d_padded))
        own = (start + jnp.arange(blocks.size) < end)[:, None]
        product = jnp.dot(jnp.where(own, rows_in, 0).T, jnp.where(own, d_rows, 0), preferred_element_type=jnp.float32)
        return d_rhs.at[group].add(product)

    d_rhs = vary_like(jnp.zeros(rhs.shape, jnp.float32), lhs)
    return d_lhs, jax.lax.fori_loop(0, blocks.number, add, d_rhs).astype(rhs.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def _group_of_row(rows: int, ends: jax.Array) -> jax.Array:
    return jnp.searchsorted(ends, jnp.arange(rows), side="right")


def _cut(rows: int, ends: jax.Array) -> _Blocks:
    size = min(_BLOCK_ROWS, max(8, 1 << (rows // len(ends)).bit_length()))
    group_sizes = jnp.diff(ends, prepend=0)
    group_blocks = (group_sizes + size - 1) // size
    block_ends = jnp.cumsum(group_blocks)

    def locate(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        group = jnp.searchsorted(block_ends, index, side="right")
        first = index - (block_ends[group] - group_blocks[group])
        return group, ends[group] - group_sizes[group] + first * size, ends[group]

    return _Blocks(size, block_ends[-1], locate)
