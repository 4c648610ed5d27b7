"""The output projection of attention and the residual, in one launch: 16 outputs a block."""

import dataclasses
import functools

import jax

from pallas_kernels.decode_layer.mosaic_gpu import products
from pallas_kernels.decode_layer.mosaic_gpu.products import TileProduct
from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.tensor_machine import TensorMachine

OUTPUTS = 16


@dataclasses.dataclass(frozen=True)
class OutputShape(products.GroupedShape):
    """The sizes of a launch: tokens, and the matrix `[outputs, size]`."""

    outputs: int

    @property
    def ahead(self) -> int:
        """Steps whose weights and tokens are on their way: as many as registers hold."""
        return 64 // (8 + self.tokens // 2)


def project_output(attended: jax.Array, weight: jax.Array, residual: jax.Array, shape: OutputShape) -> jax.Array:
    """Launches `api.output_projection`."""
    return launch(
        functools.partial(output_body, shape=shape),
        jax.ShapeDtypeStruct(residual.shape, residual.dtype),
        shape.outputs // OUTPUTS * shape.groups,
        1,
        products.THREADS,
        products.sums_words(1, shape.tokens),
        machine_type=TensorMachine,
    )(attended, weight, residual)


def output_body(machine, attended, weight, residual, out, block, rank, *, shape):
    """Runs in each thread of a block, whose number is `block`."""
    del rank
    block = machine.word(block)
    tile = block // shape.groups
    first, start = (block - tile * shape.groups) * shape.tokens, tile * OUTPUTS
    words = shape.size // 2
    lane_row = machine.lane >> 2
    tokens = [lane_row + group for group in range(0, shape.tokens, 8)]
    exist = [first + token < shape.rows for token in tokens]
    sources = [
        machine.row(attended, machine.select(exists, first + token, 0), words)
        for token, exists in zip(tokens, exist, strict=True)
    ]

    def load_tokens(word):
        return [machine.load_global4_where(row, word, exists) for row, exists in zip(sources, exist, strict=True)]

    matrix = machine.row(weight, 0, shape.outputs * words)
    rows = [[start + lane_row, start + lane_row + 8]]
    product = TileProduct(machine, matrix, rows, shape.size, shape.tokens, shape.ahead, load_tokens)
    product.share(product.sums(), 0)
    machine.barrier()

    pairs = OUTPUTS // 2
    for begin in range(0, shape.tokens * pairs, products.THREADS):
        index = machine.thread + begin
        token = index // pairs
        pair = index - token * pairs
        exists = (token < shape.tokens) & (first + token < shape.rows)
        row, token = machine.select(exists, first + token, 0), token.min(shape.tokens - 1)
        with machine.when(exists):
            sums = products.rounded(machine, *(product.total(0, token, pair * 2 + i) for i in range(2)))
            at = (start >> 1) + pair
            before = machine.load_global(machine.row(residual, row, shape.outputs // 2), at)
            after = [
                machine.float_op("add", x, y) for x, y in zip(products.unpack(machine, [before]), sums, strict=True)
            ]
            machine.store_global(machine.row(out, row, shape.outputs // 2), at, machine.pack_bfloat16(*after))
