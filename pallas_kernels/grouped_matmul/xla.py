"""Portable grouped matmul: blocks of rows of one group, one after the other, or on GPUs several at once.

`lax.ragged_dot` multiplies every row by every group's matrix on CPU and GPU, which this avoids. Matrices of fewer bits
become numbers where `take_matrices` takes those of a block.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import portable
from pallas_kernels.grouped_matmul.activations import QuantizedRows, quantize_rows
from pallas_kernels.grouped_matmul.blocks import Blocks, group_of_row, most_blocks
from pallas_kernels.grouped_matmul.groups import group_ends
from pallas_kernels.meshes import vary_like
from pallas_kernels.quantized import Matrices, QuantizedMatrices, take_matrices

_BLOCK_ROWS = 128
"""Most rows of a block, not on GPUs."""
_FEW_ROWS = 16
"""At most this number of rows are one product each."""
_SOME_ROWS = 512
"""On GPUs, at most this number of rows are multiplied by all matrices: cheaper than copies of those they need."""
_MATRIX_ROWS = 512
"""A GPU copies a matrix in the time in which it multiplies about this number of rows by it."""
_GPU_BLOCK_ROWS = 512
"""Most rows of a block on GPUs."""
_WORKSPACE_BYTES = 512 * 2**20
"""For the blocks of one turn on GPUs."""


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`. It has a gradient, which reads the same matrices.

    Memory on GPUs: `_WORKSPACE_BYTES`, and the result with up to one block of rows more for each group.
    """
    return _grouped_matmul(lhs, rhs, group_ends(lhs.shape[0], group_sizes))


def expert_mlp(lhs: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.expert_mlp`."""
    gate, up = jnp.split(grouped_matmul(lhs, gate_up, group_sizes).astype(jnp.float32), 2, axis=-1)
    return grouped_matmul((jax.nn.silu(gate) * up).astype(lhs.dtype), down, group_sizes)


def quantized_grouped_matmul(
    lhs: jax.Array,
    lhs_scales: jax.Array | None,
    rhs: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    group_sizes: jax.Array,
    *,
    block: tuple[int, int],
    dtype: Any = None,
) -> jax.Array:
    """See `quantized.quantized_grouped_matmul`."""
    ends, rows = group_ends(lhs.shape[0], group_sizes), _numbers(lhs, lhs_scales, dtype)
    out = _multiply(rows, QuantizedMatrices(rhs, scales, zeros, block), ends, transposed=False)
    return out.astype(dtype or lhs.dtype)


def quantized_expert_mlp(
    lhs: jax.Array,
    lhs_scales: jax.Array | None,
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
    dtype: Any = None,
) -> jax.Array:
    """See `quantized.quantized_expert_mlp`."""
    ends, rows = group_ends(lhs.shape[0], group_sizes), _numbers(lhs, lhs_scales, dtype)
    both = _multiply(
        rows, QuantizedMatrices(gate_up, gate_up_scales, gate_up_zeros, gate_up_block), ends, transposed=False
    )
    gate, up = jnp.split(both.astype(jnp.float32), 2, axis=-1)
    inner = (jax.nn.silu(gate) * up).astype(dtype or lhs.dtype)
    inner = inner if lhs_scales is None else quantize_rows(inner).numbers()
    matrices = QuantizedMatrices(down, down_scales, down_zeros, down_block)
    return _multiply(inner, matrices, ends, transposed=False).astype(dtype or lhs.dtype)


def _numbers(values: jax.Array, scales: jax.Array | None, dtype: Any) -> jax.Array:
    """The rows; of those in float8 the numbers, in float32, so that neither they nor the matrices are rounded."""
    return values if scales is None else QuantizedRows(values, scales, dtype).numbers()


@jax.custom_vjp
def _grouped_matmul(lhs: jax.Array, rhs: jax.Array, ends: jax.Array) -> jax.Array:
    return _multiply(lhs, rhs, ends, transposed=False)


def _forward(lhs: jax.Array, rhs: jax.Array, ends: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _grouped_matmul(lhs, rhs, ends), (lhs, rhs, ends)


def _backward(saved: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    lhs, rhs, ends = saved
    d_lhs = _multiply(d_out, rhs, ends, transposed=True).astype(lhs.dtype)
    return d_lhs, portable.on_gpus(_d_rhs_on_gpus, _d_rhs, lhs, rhs, ends, d_out), None


_grouped_matmul.defvjp(_forward, _backward)


def _multiply(lhs: jax.Array, rhs: Matrices, ends: jax.Array, *, transposed: bool) -> jax.Array:
    """Each row by its group's matrix of rhs `[e, in, out]`; by the transposed matrix if `transposed`."""
    rows = lhs.shape[0]
    if rows <= _FEW_ROWS:
        # Each row by its own matrix, without a loop: on an accelerator every turn costs a round trip to the host.
        matrices = take_matrices(rhs, group_of_row(jnp.arange(rows), ends), lhs.dtype)
        form = "mn,mkn->mk" if transposed else "mk,mkn->mn"
        out = jnp.einsum(form, lhs, matrices, preferred_element_type=jnp.float32).astype(lhs.dtype)
    else:
        gpu, elsewhere = (functools.partial(f, transposed=transposed) for f in (_multiply_on_gpus, _multiply_blocks))
        out = portable.on_gpus(gpu, elsewhere, lhs, rhs, ends)
    return jnp.where(jnp.arange(rows)[:, None] < ends[-1], out, 0)


def _multiply_blocks(lhs: jax.Array, rhs: Matrices, ends: jax.Array, *, transposed: bool) -> jax.Array:
    rows = lhs.shape[0]
    blocks = _small_blocks(rows, ends)
    padded = jnp.pad(lhs, ((0, blocks.size), (0, 0)))

    def multiply(index: jax.Array, out: jax.Array) -> jax.Array:
        group, start, _ = blocks.locate(index)
        rows_in = jax.lax.dynamic_slice_in_dim(padded, start, blocks.size)
        matrix = take_matrices(rhs, group, lhs.dtype)
        rows_out = _products(rows_in, matrix, transposed)
        # The last block of a group also writes rows of the next group. That group's blocks overwrite them later.
        return jax.lax.dynamic_update_slice_in_dim(out, rows_out, start, axis=0)

    out = vary_like(jnp.zeros((rows + blocks.size, rhs.shape[1 if transposed else 2]), lhs.dtype), lhs)
    return jax.lax.fori_loop(0, blocks.number, multiply, out)[:rows]


def _multiply_on_gpus(lhs: jax.Array, rhs: Matrices, ends: jax.Array, *, transposed: bool) -> jax.Array:
    (rows, wide), groups = lhs.shape, len(ends)
    per_row = (wide + rhs.shape[1 if transposed else 2]) * lhs.dtype.itemsize
    # Of matrices of fewer bits there is never a copy of all numbers.
    if isinstance(rhs, jax.Array) and rows <= _SOME_ROWS and groups * rows * per_row <= _WORKSPACE_BYTES:
        every = _products(jnp.broadcast_to(lhs, (groups, rows, wide)), rhs, transposed)
        at = jnp.arange(rows)
        return every[group_of_row(at, ends), at]
    blocks = _large_blocks(rows, ends)
    itemsize = rhs.dtype.itemsize if isinstance(rhs, jax.Array) else lhs.dtype.itemsize
    turns, at_once = _turns(blocks.most, blocks.size * per_row + math.prod(rhs.shape[1:]) * itemsize)

    def turn(first: jax.Array) -> jax.Array:
        group, start, _ = blocks.locate(first + jnp.arange(at_once))
        # Rows behind a block's end are any rows: nobody reads their products.
        rows_in = lhs.at[start[:, None] + jnp.arange(blocks.size)].get(mode="clip")
        return _products(rows_in, take_matrices(rhs, group, lhs.dtype), transposed)

    out = portable.map_blocks(turn, jnp.arange(turns) * at_once, lhs)
    return out.reshape(turns * at_once * blocks.size, -1).at[blocks.place(jnp.arange(rows))].get(mode="clip")


def gpu_bytes(rows: int, inputs: int, outputs: int, groups: int, itemsize: int) -> int:
    """Bytes of a product on GPUs, of its rows and its result with its padding too, but not of the matrices.

    That is of a product in turns, as of more than `_SOME_ROWS` rows.

    Args:
      rows, groups: how many.
      inputs, outputs: numbers of a row, and of its product.
      itemsize: bytes of a number.
    """
    size = _large_block_rows(rows, groups)
    most = most_blocks(rows, groups, size)
    per_block = (size * (inputs + outputs) + inputs * outputs) * itemsize
    turns, at_once = _turns(most, per_block)
    return (rows * inputs + turns * at_once * size * outputs) * itemsize + at_once * per_block


def _turns(most_blocks: int, per_block: int) -> tuple[int, int]:
    """In how many turns blocks are multiplied, and how many at once, if each takes `per_block` bytes."""
    turns = math.ceil(most_blocks / max(1, _WORKSPACE_BYTES // per_block))
    return turns, math.ceil(most_blocks / turns)


def _d_rhs(lhs: jax.Array, rhs: jax.Array, ends: jax.Array, d_out: jax.Array) -> jax.Array:
    blocks = _small_blocks(lhs.shape[0], ends)
    return _add_blocks(blocks, blocks.number, lhs, rhs, d_out)


def _d_rhs_on_gpus(lhs: jax.Array, rhs: jax.Array, ends: jax.Array, d_out: jax.Array) -> jax.Array:
    blocks = _large_blocks(lhs.shape[0], ends)
    return _add_blocks(blocks, blocks.most, lhs, rhs, d_out)


def _add_blocks(blocks: Blocks, number: Any, lhs: jax.Array, rhs: jax.Array, d_out: jax.Array) -> jax.Array:
    """The gradient of rhs: the sum of what the first `number` blocks contribute."""
    padding = ((0, blocks.size), (0, 0))
    padded, d_padded = jnp.pad(lhs, padding), jnp.pad(d_out, padding)

    def add(index: jax.Array, d_rhs: jax.Array) -> jax.Array:
        group, start, end = blocks.locate(index)
        rows_in, d_rows = (jax.lax.dynamic_slice_in_dim(x, start, blocks.size) for x in (padded, d_padded))
        own = (start + jnp.arange(blocks.size) < end)[:, None]
        product = jnp.dot(jnp.where(own, rows_in, 0).T, jnp.where(own, d_rows, 0), preferred_element_type=jnp.float32)
        return d_rhs.at[group].add(product)

    d_rhs = vary_like(jnp.zeros(rhs.shape, jnp.float32), lhs)
    return jax.lax.fori_loop(0, number, add, d_rhs).astype(rhs.dtype)


def _products(rows: jax.Array, matrices: jax.Array, transposed: bool) -> jax.Array:
    """`[..., m, in]` by `[..., in, out]`, or `[..., m, out]` by the transposed matrices, in the dtype of the rows."""
    form = "...mn,...kn->...mk" if transposed else "...mk,...kn->...mn"
    return jnp.einsum(form, rows, matrices, preferred_element_type=jnp.float32).astype(rows.dtype)


def _small_blocks(rows: int, ends: jax.Array) -> Blocks:
    return Blocks.of(rows, ends, min(_BLOCK_ROWS, max(8, 1 << (rows // len(ends)).bit_length())))


def _large_blocks(rows: int, ends: jax.Array) -> Blocks:
    return Blocks.of(rows, ends, _large_block_rows(rows, len(ends)))


def _large_block_rows(rows: int, groups: int) -> int:
    """A power of two at which copies of matrices take about as long as products with padding."""
    best = math.log2(max(1.0, _MATRIX_ROWS * rows / groups)) / 2
    return min(_GPU_BLOCK_ROWS, max(16, 1 << round(best)))
