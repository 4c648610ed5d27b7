"""What follows a layer's projections of few tokens: norms, rotation and the rows of the cache, in one launch.

Each warp has one piece of one token: a head of q, k or v, two heads of the indexer's queries, its key, or its gates.
Warps share nothing, so a token's results have the same bits alone and with others. A lane has two neighbouring numbers
of either half of a head: those that are rotated with each other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.decode_layer.mosaic_gpu.products import lane_sum, mean_scale, pack, unpack
from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.simt import float_bits
from pallas_kernels.gpu.tensor_machine import TensorMachine

DIM, INDEX_DIM = 128, 64
_WARPS = 4
"""Of a block: the fewest that Mosaic launches."""


@dataclasses.dataclass(frozen=True)
class FinishShape:
    """The sizes of a launch.

    Attributes:
      rows: tokens.
      heads, kv_heads, index_heads: of the model.
      slots: rows of the cache; None if it is written elsewhere, and a token's row has its number.
      eps, index_eps: of norms.
    """

    rows: int
    heads: int
    kv_heads: int
    index_heads: int
    slots: int | None
    eps: float
    index_eps: float

    @property
    def pieces(self) -> int:
        """Warps of a token."""
        return self.heads + 2 * self.kv_heads + self.index_heads // 2 + 2

    @property
    def blocks(self) -> int:
        return -(-self.rows * self.pieces // _WARPS)


def finish(arrays: tuple[jax.Array, ...], pages: tuple[jax.Array, ...], shape: FinishShape) -> tuple[jax.Array, ...]:
    """Launches; `arrays` are all of `api.finish_projections` but the cache, whose slots and pages follow."""
    dtype, kv_row = arrays[0].dtype, (2 * shape.kv_heads, DIM)
    out_type = [
        jax.ShapeDtypeStruct((shape.rows, shape.heads, DIM), dtype),
        jax.ShapeDtypeStruct((shape.rows, shape.index_heads, INDEX_DIM), dtype),
        jax.ShapeDtypeStruct((shape.rows, shape.index_heads), jnp.float32),
    ]
    if not pages:
        out_type.append(jax.ShapeDtypeStruct((shape.rows, *kv_row), dtype))
        out_type.append(jax.ShapeDtypeStruct((shape.rows, INDEX_DIM), dtype))
    return launch(
        functools.partial(finish_body, shape=shape),
        tuple(out_type),
        shape.blocks,
        1,
        32 * _WARPS,
        0,
        machine_type=TensorMachine,
        in_place=2 if pages else 0,
    )(*arrays, *pages)


def finish_body(machine, *refs, shape):
    """Runs in each thread of block number `block`, behind which `refs` have only the block's number in its cluster."""
    *refs, block, _ = refs
    names = ["q", "k", "v", "index", "index_k", "q_norm", "k_norm", "index_q_norm", "index_k_norm", "index_k_bias"]
    names += ["cos", "sin", "index_cos", "index_sin"]
    out, cache = ["q_out", "index_q_out", "gates_out"], ["kv", "index_keys"]
    names += out + cache if shape.slots is None else ["slots", *cache, *out]
    number = machine.word(block) * _WARPS + machine.warp
    token = number // shape.pieces
    piece, exists = number - token * shape.pieces, token < shape.rows
    work = Token(machine, shape, dict(zip(names, refs, strict=True)), token.min(shape.rows - 1))
    first = 0
    for count, run in (
        (shape.heads, work.finish_query),
        (shape.kv_heads, work.finish_key),
        (shape.kv_heads, work.copy_value),
        (shape.index_heads // 2, work.finish_index_queries),
        (1, work.finish_index_key),
        (1, work.widen_gates),
    ):
        with machine.when(exists & (piece >= first) & (piece < first + count)):
            run(piece - first)
        first += count


class Token:
    """A token's pieces, as each thread of a warp that has one of them sees them."""

    def __init__(self, machine, shape, refs, token):
        self.machine, self.shape, self.refs, self.token = machine, shape, refs, token

    # The pieces. Each loads all that it needs before it computes.

    def finish_query(self, head):
        words = self.shape.heads * DIM // 2
        numbers = self.finish_head("q", head, words)
        self.store(self.machine.row(self.refs["q_out"], self.token, words), head, DIM, numbers)

    def finish_key(self, head):
        place = self.place("kv", self.shape.kv_heads * DIM)
        numbers = self.finish_head("k", head, self.shape.kv_heads * DIM // 2)
        self.store_cache(place, lambda row: self.store(row, head, DIM, numbers))

    def copy_value(self, head):
        machine, shape = self.machine, self.shape
        place, at = self.place("kv", shape.kv_heads * DIM), head * (DIM // 2) + machine.lane * 2
        pair = machine.load_global_pair(machine.row(self.refs["v"], self.token, shape.kv_heads * DIM // 2), at)
        self.store_cache(place, lambda row: machine.store_global_pair(row, at + shape.kv_heads * DIM // 2, *pair))

    def finish_index_queries(self, pair):
        machine, shape = self.machine, self.shape
        head = pair * 2 + (machine.lane >> 4)
        numbers = self.load("index", self.token, shape.index_heads * (INDEX_DIM + 1) // 2, head, INDEX_DIM)
        factors = self.load("index_q_norm", 0, INDEX_DIM // 2, 0, INDEX_DIM)
        angles = self.angles("index_", INDEX_DIM)
        numbers = self.rotate(self.rounded(self.scale(numbers, factors, INDEX_DIM, shape.index_eps)), *angles)
        out = machine.row(self.refs["index_q_out"], self.token, shape.index_heads * INDEX_DIM // 2)
        self.store(out, head, INDEX_DIM, numbers)

    def finish_index_key(self, _):
        """Both halves of the warp compute it."""
        machine, op = self.machine, self.machine.float_op
        place = self.place("index_keys", INDEX_DIM // 2)
        numbers = self.load("index_k", self.token, INDEX_DIM // 2, 0, INDEX_DIM)
        factors, biases = (self.load(f"index_k_{name}", 0, INDEX_DIM // 2, 0, INDEX_DIM) for name in ("norm", "bias"))
        angles = self.angles("index_", INDEX_DIM)
        total = lane_sum(machine, op("add", op("add", *numbers[:2]), op("add", *numbers[2:])), INDEX_DIM // 4)
        mean = op("mul", total, float_bits(1 / INDEX_DIM))
        numbers = [op("add", x, mean ^ 0x80000000) for x in numbers]
        numbers = self.scale(numbers, factors, INDEX_DIM, self.shape.index_eps)
        numbers = self.rounded([op("add", x, bias) for x, bias in zip(numbers, biases, strict=True)])
        numbers = self.rotate(numbers, *angles)
        self.store_cache(place, lambda row: self.store(row, 0, INDEX_DIM, numbers), machine.lane < INDEX_DIM // 4)

    def widen_gates(self, _):
        machine, heads = self.machine, self.shape.index_heads
        with machine.when(machine.lane < heads // 2):
            row = machine.row(self.refs["index"], self.token, heads * (INDEX_DIM + 1) // 2)
            pair = unpack(machine, [machine.load_global(row, machine.lane + heads * INDEX_DIM // 2)])
            out = machine.row(self.refs["gates_out"], self.token, heads)
            machine.store_global_pair(out, machine.lane * 2, *pair)

    # Parts of them.

    def finish_head(self, name, head, words):
        """A head of q or k, from rows of `words` words, with its norm and rotated."""
        numbers = self.load(name, self.token, words, head, DIM)
        factors, angles = self.load(f"{name}_norm", 0, DIM // 2, 0, DIM), self.angles("", DIM)
        return self.rotate(self.rounded(self.scale(numbers, factors, DIM, self.shape.eps)), *angles)

    def words(self, head, dim):
        """Where a row has the lane's two words of a head of `dim` numbers, which takes `dim / 4` lanes."""
        first = (self.machine.lane & (dim // 4 - 1)) + head * (dim // 2)
        return first, first + dim // 4

    def load(self, name, row, words, head, dim):
        """The lane's four numbers of a head in a row of `words` words."""
        machine = self.machine
        row = machine.row(self.refs[name], row, words)
        return unpack(machine, [machine.load_global(row, at) for at in self.words(head, dim)])

    def angles(self, kind, dim):
        """Cosines and sines of the lane's two angles."""
        machine, (place, _) = self.machine, self.words(0, dim)
        rows = [machine.row(self.refs[f"{kind}{name}"], self.token, dim // 2) for name in ("cos", "sin")]
        return [machine.load_global_pair(row, place * 2) for row in rows]

    def scale(self, numbers, factors, dim, eps):
        """The RMS norm of a head, not rounded."""
        machine, op = self.machine, self.machine.float_op
        squares = functools.reduce(lambda total, x: op("fma", x, x, total), numbers[1:], op("mul", *numbers[:1] * 2))
        scale = mean_scale(machine, lane_sum(machine, squares, dim // 4), dim, float_bits(eps))
        return [op("mul", op("mul", x, scale), factor) for x, factor in zip(numbers, factors, strict=True)]

    def rounded(self, numbers):
        """Float32 numbers rounded to bfloat16, still as float32."""
        return unpack(self.machine, pack(self.machine, numbers))

    def rotate(self, numbers, cosines, sines):
        op, first, second = self.machine.float_op, [], []
        for a, b, cos, sin in zip(numbers[:2], numbers[2:], cosines, sines, strict=True):
            first.append(op("fma", a, cos, op("mul", b, sin) ^ 0x80000000))
            second.append(op("fma", b, cos, op("mul", a, sin)))
        return first + second

    def store(self, row, head, dim, numbers):
        """Stores the lane's numbers of a head, rounded to bfloat16."""
        for i, at in enumerate(self.words(head, dim)):
            self.machine.store_global(row, at, *pack(self.machine, numbers[2 * i : 2 * i + 2]))

    def place(self, name, words):
        """The token's row of an array of the cache, of `words` words, and its number."""
        machine, shape, row = self.machine, self.shape, self.token
        if shape.slots is not None:
            row = machine.load_global(machine.row(self.refs["slots"], 0, shape.rows), row)
        return machine.row(self.refs[name], row, words), row

    def store_cache(self, place, store, lanes=None):
        """Calls `store(row)` in `lanes`, None for all, if the token has a row of the cache."""
        row, number = place
        there = number < (self.shape.rows if self.shape.slots is None else self.shape.slots)
        # As an unsigned number, -1 is larger.
        with self.machine.when(there if lanes is None else there & lanes):
            store(row)
