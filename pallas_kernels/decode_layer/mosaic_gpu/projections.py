"""All projections of a decoder layer's attention and of its indexer, with norms, rotation and the cache, in one launch.

A cluster of two blocks takes one head of q, k or v, or two heads of the indexer's queries, or its gates, or its key. A
block has 64 outputs. Of a head of 128 it takes the two runs of 32 that are rotated with each other, so only the sums of
squares cross the cluster. Every block norms its tokens itself while its first weights arrive.

Then a warp finishes a token at a time: a lane has one output of either run. Heads of k and v and the indexer's key go
straight to the token's row of the cache.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.decode_layer.mosaic_gpu import products
from pallas_kernels.decode_layer.mosaic_gpu.products import WARPS, TileProduct, rounded
from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.simt import float_bits
from pallas_kernels.gpu.tensor_machine import TensorMachine

DIM, INDEX_DIM = 128, 64
_TILES, _AHEAD, _CLUSTER = 4, 3, 2


@dataclasses.dataclass(frozen=True)
class ProjectionShape(products.GroupedShape):
    """The sizes of a launch.

    Attributes:
      heads, kv_heads, index_heads: of the model.
      slots: rows of the cache; None if it is written elsewhere, and a token's row has its number.
      eps, index_eps: of norms.
    """

    heads: int
    kv_heads: int
    index_heads: int
    slots: int | None
    eps: float
    index_eps: float

    @property
    def first_index(self) -> int:
        """The first cluster of the indexer."""
        return self.heads + 2 * self.kv_heads

    @property
    def gates(self) -> int:
        """The cluster of the gates; the one behind it has the indexer's key."""
        return self.first_index + -(-self.index_heads // 2)

    @property
    def clusters(self) -> int:
        return (self.gates + 2) * self.groups

    @property
    def stats(self) -> int:
        """Where shared memory holds both blocks' sums of squares. Before it are tokens, and then the warps' sums."""
        return max(self.tokens * products.row_pitch(self.size), products.sums_words(_TILES, self.tokens))

    @property
    def words(self) -> int:
        """Words of shared memory."""
        return self.stats + _CLUSTER * self.tokens


def project(arrays: tuple[jax.Array, ...], pages: tuple[jax.Array, ...], shape: ProjectionShape):
    """Launches; `arrays` are all arguments of `api.decode_projections` but the cache, whose slots and pages follow."""
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
        functools.partial(projections_body, shape=shape),
        tuple(out_type),
        shape.clusters,
        _CLUSTER,
        products.THREADS,
        shape.words,
        machine_type=TensorMachine,
        in_place=2 if pages else 0,
    )(*arrays, *pages)


def projections_body(machine, *refs, shape):
    """Runs in each thread of cluster number `block`; the last of `refs` are it and the block's number in it."""
    *refs, block, rank = refs
    names = ["x", "norm", "q", "k", "v", "index_q", "index_k", "q_norm", "k_norm", "index_q_norm", "index_k_norm"]
    names += ["index_k_bias", "cos", "sin", "index_cos", "index_sin"]
    out, cache = ["q_out", "index_q_out", "gates_out"], ["kv", "index_keys"]
    names += out + cache if shape.slots is None else ["slots", *cache, *out]
    work = Projection(machine, shape, dict(zip(names, refs, strict=True)), machine.word(block), machine.word(rank))
    work.multiply()
    work.finish()


class Projection:
    """A block's 64 outputs for a group of tokens, as each thread sees them."""

    def __init__(self, machine, shape, refs, block, rank):
        self.machine, self.shape, self.refs, self.rank = machine, shape, refs, rank
        self.unit = unit = block // shape.groups
        self.first = (block - unit * shape.groups) * shape.tokens
        first_v, first_k = shape.heads + shape.kv_heads, shape.heads
        self.is_q, self.is_head = unit < first_k, unit < first_v
        self.is_v = (unit >= first_v) & (unit < shape.first_index)
        self.is_index = (unit >= shape.first_index) & (unit < shape.gates)
        self.is_gates, self.is_key = unit.eq(shape.gates), unit.eq(shape.gates + 1)
        select = machine.select
        # Of a head of q, k or v, and of the indexer's queries.
        self.kv_head = unit - select(self.is_v, first_v, first_k)
        self.head = select(self.is_q, unit, self.kv_head)
        self.index_head = (unit - shape.first_index) * 2 + rank

    def matrix(self):
        """The weights, and the rows of them at which this block's two runs of 32 outputs begin."""
        machine, shape, select = self.machine, self.shape, self.machine.select

        def whole(name, rows):
            return machine.row(self.refs[name], 0, rows * (shape.size // 2))

        kv_rows, index_rows = shape.kv_heads * DIM, shape.index_heads * INDEX_DIM
        weights = whole("index_k", INDEX_DIM)
        weights = machine.select_row(
            self.is_index | self.is_gates, whole("index_q", index_rows + shape.index_heads), weights
        )
        weights = machine.select_row(self.is_v, whole("v", kv_rows), weights)
        weights = machine.select_row(self.is_head, whole("k", kv_rows), weights)
        weights = machine.select_row(self.is_q, whole("q", shape.heads * DIM), weights)
        has_heads = self.is_head | self.is_v
        first = select(self.is_index, self.index_head * INDEX_DIM, select(self.is_gates, index_rows, 0))
        first = select(has_heads, self.head * DIM + self.rank * 32, first)
        second = first + select(has_heads, DIM // 2, 32)
        # Outputs behind the last one are computed like it, and not stored.
        last = select(self.is_key, INDEX_DIM - 1, index_rows + shape.index_heads - 1)
        last = select(self.is_q, shape.heads * DIM - 1, select(has_heads, kv_rows - 1, last))
        return weights, first, second, last

    def multiply(self):
        """Leaves the warps' sums in shared memory."""
        machine, shape = self.machine, self.shape
        weights, first, second, last = self.matrix()
        lane_row = machine.lane >> 2
        rows = [
            [((first if tile < 2 else second) + lane_row + (tile % 2 * 16 + half * 8)).min(last) for half in range(2)]
            for tile in range(_TILES)
        ]
        product = TileProduct(machine, weights, rows, shape.size, shape.tokens, _AHEAD)
        how = {"rows": shape.rows, "size": shape.size, "eps": float_bits(shape.eps), "start": 0}
        products.normalise(machine, self.refs["x"], self.refs["norm"], self.first, shape.tokens, **how)
        machine.barrier()
        sums = product.sums(product.shared_tokens(0, products.row_pitch(shape.size)))
        machine.barrier()
        product.share(sums, 0)
        machine.barrier()
        self.product = product

    def finish(self):
        """Norms, rotates and stores each token's outputs."""
        machine, shape = self.machine, self.shape
        tokens = [machine.warp + group for group in range(0, shape.tokens, WARPS)]
        outputs = [
            rounded(machine, *(self.product.total(0, token, machine.lane + run) for run in (0, 32))) for token in tokens
        ]
        with machine.when(self.is_head):
            self.finish_heads(tokens, outputs)
        for token, pair in zip(tokens, outputs, strict=True):
            row = self.first + token
            exists = row < shape.rows
            with machine.when(self.is_v):
                self.store_cache("kv", row, exists, (self.kv_head + shape.kv_heads) * DIM + self.rank * 32, *pair)
            with machine.when(self.is_index):
                self.finish_index_query(row, exists & (self.index_head < shape.index_heads), pair)
            with machine.when(self.is_gates):
                out = machine.row(self.refs["gates_out"], machine.select(exists, row, 0), shape.index_heads)
                there = exists & self.rank.eq(0) & (machine.lane < shape.index_heads)
                machine.store_global_where(out, machine.lane.min(shape.index_heads - 1), pair[0], there)
            with machine.when(self.is_key):
                self.finish_index_key(row, exists & self.rank.eq(0), pair)

    def finish_heads(self, tokens, outputs):
        """Heads of q and k, of which each block of the cluster has half."""
        machine, shape, place = self.machine, self.shape, self.rank * 32 + self.machine.lane
        for token, pair in zip(tokens, outputs, strict=True):
            squares = self.squares(pair)
            with machine.when(machine.lane < _CLUSTER):
                machine.store_peer(self.rank * shape.tokens + token + shape.stats, machine.lane, squares)
        machine.cluster_barrier()
        norm = machine.select_row(
            self.is_q, *(machine.row(self.refs[name], 0, DIM // 2) for name in ("q_norm", "k_norm"))
        )
        factors = [products.load_bfloat16(machine, norm, place + run) for run in (0, DIM // 2)]
        for token, pair in zip(tokens, outputs, strict=True):
            row = self.first + token
            exists = row < shape.rows
            parts = [machine.load_shared(token + (shape.stats + part * shape.tokens)) for part in range(_CLUSTER)]
            scale = products.mean_scale(machine, machine.float_op("add", *parts), DIM, float_bits(shape.eps))
            pair = self.rotate(self.scaled(pair, scale, factors), "cos", "sin", row, exists, place, DIM // 2)
            with machine.when(self.is_q):
                out = machine.row(self.refs["q_out"], machine.select(exists, row, 0), shape.heads * DIM // 2)
                self.store(out, exists, self.head * DIM + self.rank * 32, DIM // 2, *pair)
            with machine.when(self.unit >= shape.heads):
                self.store_cache("kv", row, exists, self.kv_head * DIM + self.rank * 32, *pair)

    def finish_index_query(self, row, exists, pair):
        machine, shape = self.machine, self.shape
        norm = machine.row(self.refs["index_q_norm"], 0, INDEX_DIM // 2)
        factors = [products.load_bfloat16(machine, norm, machine.lane + run) for run in (0, 32)]
        scale = products.mean_scale(machine, self.squares(pair), INDEX_DIM, float_bits(shape.index_eps))
        pair = self.scaled(pair, scale, factors)
        pair = self.rotate(pair, "index_cos", "index_sin", row, exists, machine.lane, INDEX_DIM // 2)
        out = machine.row(self.refs["index_q_out"], machine.select(exists, row, 0), shape.index_heads * INDEX_DIM // 2)
        self.store(out, exists, self.index_head * INDEX_DIM, 32, *pair)

    def finish_index_key(self, row, exists, pair):
        machine, shape, op = self.machine, self.shape, self.machine.float_op
        factors, biases = (
            [
                products.load_bfloat16(machine, machine.row(self.refs[name], 0, INDEX_DIM // 2), machine.lane + run)
                for run in (0, 32)
            ]
            for name in ("index_k_norm", "index_k_bias")
        )
        mean = op("mul", products.lane_sum(machine, op("add", *pair)), float_bits(1 / INDEX_DIM))
        pair = [op("add", x, mean ^ 0x80000000) for x in pair]
        scale = products.mean_scale(machine, self.squares(pair), INDEX_DIM, float_bits(shape.index_eps))
        pair = [op("mul", op("mul", x, scale), factor) for x, factor in zip(pair, factors, strict=True)]
        pair = rounded(machine, *(op("add", x, bias) for x, bias in zip(pair, biases, strict=True)))
        pair = self.rotate(pair, "index_cos", "index_sin", row, exists, machine.lane, INDEX_DIM // 2)
        self.store_cache("index_keys", row, exists, machine.word(0), *pair)

    # Parts of them.

    def squares(self, pair):
        """The sum over the warp of its numbers' squares."""
        op = self.machine.float_op
        return products.lane_sum(self.machine, op("fma", pair[1], pair[1], op("mul", pair[0], pair[0])))

    def scaled(self, pair, scale, factors):
        op = self.machine.float_op
        scaled = [op("mul", op("mul", x, scale), factor) for x, factor in zip(pair, factors, strict=True)]
        return rounded(self.machine, *scaled)

    def rotate(self, pair, cos, sin, row, exists, place, angles):
        machine, op = self.machine, self.machine.float_op
        row = machine.select(exists, row, 0)
        cos, sin = (machine.load_global(machine.row(self.refs[name], row, angles), place) for name in (cos, sin))
        first, second = pair
        return [
            op("fma", first, cos, op("mul", second, sin) ^ 0x80000000),
            op("fma", second, cos, op("mul", first, sin)),
        ]

    def store_cache(self, name, row, exists, start, first, second):
        """Stores a part of a token's row of the cache, where it has one."""
        machine, shape = self.machine, self.shape
        if shape.slots is not None:
            slots = machine.row(self.refs["slots"], 0, shape.rows)
            row = machine.load_global(slots, machine.select(exists, row, 0))
            exists = exists & (row < shape.slots)  # As an unsigned number, -1 is larger.
        words, run = (shape.kv_heads * DIM, DIM // 2) if name == "kv" else (INDEX_DIM // 2, 32)
        self.store(
            machine.row(self.refs[name], machine.select(exists, row, 0), words), exists, start, run, first, second
        )

    def store(self, out, exists, start, run, first, second):
        """Stores a warp's two runs of 32 numbers in bfloat16, from `start` and from `start + run` on.

        A lane stores two numbers: an even one of the first run, an odd one of the second.
        """
        machine = self.machine
        odd = (machine.lane & 1).ne(0)
        before, after = machine.shuffle_xor(second, 1), machine.shuffle_xor(first, 1)
        word = machine.select(odd, machine.pack_bfloat16(before, second), machine.pack_bfloat16(first, after))
        at = (start + machine.select(odd, run, 0) >> 1) + (machine.lane >> 1)
        machine.store_global_where(out, at, word, exists)
