"""Attention of single queries on Hopper GPUs, to listed positions or to all positions, in one launch.

A cluster of blocks takes one query and up to eight query heads of one KV head. The cluster's warps take turns with
steps of 32 keys, and each warp works on its own. Keys and values go from memory straight to registers, a step ahead, in
an order that suits the tensor cores. A thread may load any dimensions of a head: of the keys, if it loads the same
dimensions of the queries (the product sums over them), and of the values, if it writes the result accordingly.

S = Q K^T uses eight of 16 rows. O^T = V^T P^T wastes nothing, and takes P as the threads hold it. Warps and blocks are
combined by log-sum-exp through (distributed) shared memory.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu.hopper import MULTIPROCESSORS
from pallas_kernels.gpu.machine import launch
from pallas_kernels.gpu.simt import float_bits
from pallas_kernels.gpu.tensor_machine import TensorMachine
from pallas_kernels.sparse_attention.mosaic_gpu.attend import check
from pallas_kernels.sparse_attention.mosaic_gpu.gather import DIM

STEP = 32
"""Keys of one step of a warp: each lane looks up one."""
HEADS = 8
"""Query heads of a block."""
NOWHERE = 0xFFFFFFFF
"""The row of a key that does not exist."""

_WARPS = 8
_LOG2E = math.log2(math.e)
_LOWEST, _MASKED, _ONE = 0xE0AD78EC, 0xFF800000, 0x3F800000  # -1e20, -inf and 1 in float32

# Addresses in shared memory, in words. In order: the warps' sums, a row of 128 for each head, padded against bank
# conflicts; maxima and totals of each warp and head; the same of each block of the cluster and head; the blocks' sums
# of the part that this block finishes; the lowest position that each warp has seen in the list.
_PITCH = DIM + 4
_STATS = _WARPS * HEADS * _PITCH
_PEER_STATS = _STATS + _WARPS * HEADS * 2
_PEER_SUMS = _PEER_STATS + 16 * HEADS * 2
_LOWEST_POSITIONS = _PEER_SUMS + HEADS * DIM
WORDS = _LOWEST_POSITIONS + _WARPS


def attend_single(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    page_table: jax.Array,
    *,
    scale: float,
    cluster: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Each query attends to its listed positions, independently of other queries.

    Args:
      q: bfloat16 `[b, t, n, 128]`.
      kv: bfloat16 `[p, page_size, 2 * k, 128]` pages. A row holds the keys of all k heads, then their values.
      indices: int32 `[b, t, top_k]` positions; -1 is ignored.
      page_table: int32 `[b, m]`.
      scale: factor on the dot products, above 0.
      cluster: number of blocks that share the keys of a query and KV head: 1, 2, 4, 8 or 16; None chooses.

    Returns:
      bfloat16 `[b, t, n, 128]`, and the log-sum-exp of the scaled dot products, float32 `[b, t, n]`. A query with no
      position gets zeros and -inf.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take.
    """
    kv_heads = check(q, kv, scale)
    shape = DecodeShape.of(q, indices, page_table, kv.shape[1], kv_heads, scale)
    return run(decode_body, shape, q, (kv, indices.reshape(-1, shape.size), page_table), cluster)


def attend_all(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    counts: jax.Array,
    *,
    scale: float,
    cluster: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `attend_single`, but each query attends to the first `counts` positions of its sequence, int32 `[b, t]`."""
    kv_heads = check(q, kv, scale)
    shape = DecodeShape.of(q, None, page_table, kv.shape[1], kv_heads, scale)
    return run(decode_body, shape, q, (kv, counts.reshape(-1, 1), page_table), cluster)


def run(body, shape, q, others, cluster=None):
    """Launches `body(machine, q, *others, out, lse, block, rank, shape=shape)`; results as of `attend_single`."""
    if not shape.queries or not shape.size:
        raise NotImplementedError("no queries, or no positions")
    out, lse = launch(
        functools.partial(body, shape=shape),
        (
            jax.ShapeDtypeStruct((shape.queries, shape.heads, DIM), q.dtype),
            jax.ShapeDtypeStruct((shape.queries, shape.heads), jnp.float32),
        ),
        shape.blocks,
        cluster or shape.best_cluster(),
        _WARPS * 32,
        WORDS,
        machine_type=TensorMachine,
    )(q.reshape(-1, shape.heads, DIM), *others)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """The sizes of a launch.

    Attributes:
      queries: queries of all sequences.
      queries_per_sequence: consecutive queries that use one row of the page table.
      heads: query heads.
      kv_heads: heads of keys and values.
      pages: pages of one sequence's page table.
      page_size: positions of one page.
      size: entries of a list; without lists, the most positions of a sequence.
      listed: whether queries have lists of positions. Otherwise they have a number of positions.
      scale: factor on the dot products.
    """

    queries: int
    queries_per_sequence: int
    heads: int
    kv_heads: int
    pages: int
    page_size: int
    size: int
    listed: bool
    scale: float

    @classmethod
    def of(cls, q, indices, page_table, page_size, kv_heads, scale):
        """The sizes for arguments as `attend_single` takes them; without lists, `indices` is None."""
        (batch, length, heads, _), pages = q.shape, page_table.shape[1]
        size = pages * page_size if indices is None else indices.shape[-1]
        return cls(batch * length, length, heads, kv_heads, pages, page_size, size, indices is not None, scale)

    @property
    def q_per_kv(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def parts(self) -> int:
        """Clusters that the query heads of one KV head need."""
        return -(-self.q_per_kv // HEADS)

    @property
    def blocks(self) -> int:
        """Number of clusters."""
        return self.queries * self.kv_heads * self.parts

    def best_cluster(self) -> int:
        """The widest cluster that the GPU has room for and whose warps all have a step."""
        # 256 blocks read a batch of 4 at 128K faster than 128 did. Lists of a few steps per warp were not faster. But
        # most of many rows may be idle, and pairs of blocks are done sooner with the others.
        rooms = {2: 4 * MULTIPROCESSORS} if self.listed else {}
        room = MULTIPROCESSORS if self.listed else 2 * MULTIPROCESSORS
        fits = [c for c in (2, 4, 8, 16) if self.blocks * c <= rooms.get(c, room) and c * _WARPS * STEP <= self.size]
        return max(fits, default=1)


def decode_body(machine, q, kv, lists, page_table, out, lse, block, rank, *, shape):
    """Runs in each thread of cluster number `block`. `rank` is the block's number in the cluster."""
    SingleQuery(machine, shape, block, rank, q, kv, lists, page_table).run(out, lse)


class SingleQuery:
    """One query and up to eight of its heads, as each thread sees them. Its lane is 4 * g + c in a tensor-core tile.

    What follows from the dtype of keys and values:
      HEAD_WORDS: words of a head's key, or of its value.
      KEY_WORDS, VALUE_WORDS: words that `load_keys` and `load_values` give.
      Q_STEP, Q_OFFSETS: the query's dimensions in the order of the keys': four words from Q_STEP * c + each offset on.
      G_DIMS, SIDE_DIMS: sum 4 * m + 2 * side + j is for dimension G_DIMS * g + SIDE_DIMS * side + m and head 2 * c + j.
    """

    HEAD_WORDS = DIM // 2
    KEY_WORDS = VALUE_WORDS = 2 * STEP
    Q_STEP, Q_OFFSETS = 4, (0, 16, 32, 48)
    G_DIMS, SIDE_DIMS = 8, 64

    def __init__(self, machine, shape, block, rank, q, kv, lists, page_table):
        block, self.rank = machine.word(block), machine.word(rank)
        pair, self.query = block // shape.parts, block // (shape.parts * shape.kv_heads)
        self.kv_head = pair - self.query * shape.kv_heads
        self.first_head = (block - pair * shape.parts) * HEADS
        self.machine, self.shape, self.kv = machine, shape, kv
        self.g, self.c = machine.lane >> 2, machine.lane & 3
        self.head = self.kv_head * shape.q_per_kv + self.first_head
        self.table = machine.row(page_table, self.query // shape.queries_per_sequence, shape.pages)
        self.list = machine.row(lists, self.query, shape.size if shape.listed else 1)
        self.count = machine.word(shape.size) if shape.listed else machine.load_global(self.list, 0).min(shape.size)
        q_row = machine.row(q, self.query, shape.heads * DIM // 2)
        exists = self.first_head + self.g < shape.q_per_kv
        at = (self.head + machine.select(exists, self.g, 0)) * (DIM // 2) + self.c * self.Q_STEP
        self.q = [machine.load_global4_where(q_row, at + offset, exists) for offset in self.Q_OFFSETS]

    def run(self, out, lse):
        """Writes the query's attention. Without a position it ends early: an idle row of a batch leaves room soon."""
        machine = self.machine
        begun = self.begin()
        some = self.sees_keys()
        with machine.when(some.ne(0)):
            self.combine(out, lse, *self.attend(*begun))
        with machine.when(some.eq(0) & self.rank.eq(0)):
            self.write(out, lse, machine.warp, machine.lane * 4, machine.word(_LOWEST), machine.word(0), [0] * 4)

    def sees_keys(self):
        """A word that is 0 if the query has no position, the same in all threads of the cluster."""
        machine, shape = self.machine, self.shape
        if not shape.listed:
            return self.count
        places = range(0, shape.size, machine.threads)
        positions = [machine.load_global(self.list, (machine.thread + i).min(shape.size - 1)) for i in places]
        lowest = machine.warp_min(functools.reduce(lambda a, b: a.min(b), positions))
        with machine.when(machine.lane.eq(0)):
            machine.store_shared(machine.warp + _LOWEST_POSITIONS, lowest)
        machine.barrier()
        lowest = machine.warp_min(machine.load_shared((machine.lane & (_WARPS - 1)) + _LOWEST_POSITIONS))
        return machine.select(lowest < shape.pages * shape.page_size, machine.word(1), 0)

    # Keys and values.

    def slots(self, step):
        """The row of the flattened pages of the key that this lane looks up; `NOWHERE` if there is no key."""
        machine, shape = self.machine, self.shape
        index = step * STEP + machine.lane
        exists, position = index < self.count, index
        if shape.listed:
            position = machine.load_global(self.list, index.min(shape.size - 1))
            exists = exists & (position < shape.pages * shape.page_size)  # As an unsigned number, -1 is larger.
        position = machine.select(exists, position, 0)
        page = position // shape.page_size
        slot = machine.load_global(self.table, page) * shape.page_size + (position - page * shape.page_size)
        return machine.select(exists, slot, NOWHERE)

    def load_row(self, slots, lane, head, offsets):
        machine = self.machine
        slot = machine.shuffle(slots, lane)
        exists = slot.ne(NOWHERE)
        row = machine.row(self.kv, machine.select(exists, slot, 0), 2 * self.shape.kv_heads * self.HEAD_WORDS)
        return [machine.load_global4_where(row, head * self.HEAD_WORDS + offset, exists) for offset in offsets]

    def load_keys(self, slots):
        """Of keys 8 * i + g, the 8 dimensions from 8 * c on in each 32 dimensions."""
        offsets = [self.c * 4 + 16 * i for i in range(4)]
        rows = [self.load_row(slots, self.g + 8 * i, self.kv_head, offsets) for i in range(STEP // 8)]
        return [word for row in rows for words in row for word in words]

    def load_values(self, slots):
        """Of keys 8 * i + 2 * c and the next, the 8 dimensions from 8 * g on in each 64 dimensions."""
        offsets = [self.g * 4, self.g * 4 + 32]
        lanes = [self.c * 2 + (8 * i + j) for i in range(STEP // 8) for j in range(2)]
        rows = [self.load_row(slots, lane, self.kv_head + self.shape.kv_heads, offsets) for lane in lanes]
        return [word for row in rows for words in row for word in words]

    # Attention.

    @property
    def factor(self):
        """What makes a product a score in units of log2."""
        return self.machine.word(float_bits(self.shape.scale * _LOG2E))

    def prepare_keys(self, keys):
        """Words of `load_keys` in bfloat16, of keys 8 * i + g `[i, 4, 4]`; and the factors of a lane's products."""
        return np.array(keys, dtype=object).reshape(STEP // 8, 4, 4), [self.factor] * (STEP // 4)

    def prepare_values(self, weights, values):
        """Weights with the values' factors; and words of two keys each, `[tile, m, half, side]`, of `load_values`."""
        machine = self.machine
        values = np.array(values, dtype=object).reshape(STEP // 16, 2, 2, 2, 4)  # tile, half, key of a pair, 64s, words

        def pairs(tile):
            for m in range(8):
                yield [[machine.halves(*tile[half, :, side, m // 2], m % 2) for side in range(2)] for half in range(2)]

        return weights, [pairs(tile) for tile in values]

    def score(self, keys, slots):
        """Scores of head g and keys 8 * i + 2 * c and the next, in units of log2; -inf where there is no key."""
        machine, zero = self.machine, self.machine.word(0)
        keys, factors = self.prepare_keys(keys)
        there = machine.ballot(slots.ne(NOWHERE)) >> self.c * 2
        scores = []
        for i, tile in enumerate(keys):
            products = [zero] * 4
            for own, other in zip(self.q, tile, strict=True):
                for j in (0, 2):
                    products = machine.multiply_tiles((own[j], zero, own[j + 1], zero), other[j : j + 2], products)
            for j in range(2):
                scaled = machine.float_op("mul", products[j], factors[2 * i + j])
                scores.append(machine.select((there >> 8 * i + j & 1).ne(0), scaled, _MASKED))
        return scores

    def add_values(self, sums, weights, values):
        machine = self.machine
        weights, values = self.prepare_values(weights, values)
        sums = [list(s) for s in np.array(sums, dtype=object).reshape(8, 4)]
        for i, tile in enumerate(values):
            four = weights[4 * i : 4 * i + 4]
            b = [machine.pack_bfloat16(*four[j : j + 2]) for j in (0, 2)]
            for m, a in enumerate(tile):
                sums[m] = machine.multiply_tiles([word for half in a for word in half], b, sums[m])
        return [word for row in sums for word in row]

    def begin(self):
        """The warp's first step, the distance between its steps, and the `slots` of its first two."""
        machine = self.machine
        first, stride = machine.warp * machine.cluster + self.rank, machine.cluster * _WARPS
        return first, stride, self.slots(first), self.slots(first + stride)

    def attend(self, first, stride, slots, following):
        """Attention to this warp's keys: the highest score and the sum of weights of head g, and the sums of values.

        Args:
          first, stride, slots, following: what `begin` returned.
        """
        machine = self.machine
        op, maximum = machine.float_op, functools.partial(machine.float_op, "max")
        loaded = self.KEY_WORDS + self.VALUE_WORDS
        steps = (self.count + (STEP - 1)) // STEP
        keys, values = self.load_keys(slots), self.load_values(slots)

        def visit(step, slots, following, highest, total, *words):
            keys, values, sums = words[: self.KEY_WORDS], words[self.KEY_WORDS : loaded], words[loaded:]
            scores = self.score(keys, slots)
            keys = self.load_keys(following)
            best = functools.reduce(maximum, scores)
            for mask in (1, 2):
                best = maximum(best, machine.shuffle_xor(best, mask))
            best = maximum(best, highest)
            negative = best ^ 0x80000000
            rescale = op("exp2", op("add", highest, negative))
            weights = [op("exp2", op("add", score, negative)) for score in scores]
            total = functools.reduce(functools.partial(op, "add"), weights, op("mul", total, rescale))
            factors = [machine.shuffle(rescale, self.c * 8 + 4 * j) for j in range(2)]
            sums = [op("mul", s, factors[i % 2]) for i, s in enumerate(sums)]
            sums = self.add_values(sums, weights, values)
            values = self.load_values(following)
            after = self.slots(step + 2 * stride)
            return following, after, best, total, *keys, *values, *sums

        carry = [slots, following, _LOWEST, 0, *keys, *values, *[0] * 32]
        _, _, highest, total, *words = machine.loop(first, steps, stride, visit, carry)
        for mask in (1, 2):
            total = op("add", total, machine.shuffle_xor(total, mask))
        return highest, total, words[loaded:]

    # Combining.

    def merge(self, stats):
        """Of parts `[(highest, total)]`: the highest of all, each part's weight, and the weighted total."""
        machine = self.machine
        op = machine.float_op
        highest = functools.reduce(functools.partial(op, "max"), (h for h, _ in stats))
        weights = [op("exp2", op("add", h, highest ^ 0x80000000)) for h, _ in stats]
        terms = [op("mul", w, t) for w, (_, t) in zip(weights, stats, strict=True)]
        return highest, weights, functools.reduce(functools.partial(op, "add"), terms)

    def weigh(self, weights, rows):
        machine = self.machine
        sums = [machine.word(0)] * 4
        for weight, row in zip(weights, rows, strict=True):
            sums = [machine.float_op("fma", weight, x, s) for x, s in zip(row, sums, strict=True)]
        return sums

    def combine(self, out, lse, highest, total, sums):
        machine, cluster = self.machine, self.machine.cluster
        warp = machine.warp * (HEADS * _PITCH)
        for j in range(2):
            row = (self.c * 2 + j) * _PITCH + warp + self.g * self.G_DIMS
            for side in range(2):
                for m in (0, 4):
                    four = [sums[4 * (m + i) + 2 * side + j] for i in range(4)]
                    machine.store_shared_vector(row + (self.SIDE_DIMS * side + m), four)
        with machine.when(self.c.eq(0)):
            machine.store_shared_vector((machine.warp * HEADS + self.g) * 2 + _STATS, [highest, total])
        machine.barrier()
        # Warp h sums up head h, with four dimensions per lane.
        head, dim = machine.warp, machine.lane * 4
        stats = [machine.load_shared_vector((head + w * HEADS) * 2 + _STATS, 2) for w in range(_WARPS)]
        highest, weights, total = self.merge(stats)
        rows = [machine.load_shared_vector(head * _PITCH + dim + w * HEADS * _PITCH, 4) for w in range(_WARPS)]
        sums = self.weigh(weights, rows)
        if cluster == 1:
            self.write(out, lse, head, dim, highest, total, sums)
            return
        # Each block finishes `fours` groups of four dimensions, of all heads, and gets the others' sums of them.
        fours = HEADS * DIM // 4 // cluster
        owner, at = machine.thread // fours, machine.thread & (fours - 1)
        machine.store_peer_vector((self.rank * fours + at) * 4 + _PEER_SUMS, owner, sums)
        with machine.when(machine.lane < cluster):
            machine.store_peer_vector((self.rank * HEADS + head) * 2 + _PEER_STATS, machine.lane, [highest, total])
        machine.cluster_barrier()
        with machine.when(machine.thread < fours):
            mine = self.rank * fours + machine.thread
            head, dim = mine // (DIM // 4), (mine & (DIM // 4 - 1)) * 4
            stats = [machine.load_shared_vector((head + r * HEADS) * 2 + _PEER_STATS, 2) for r in range(cluster)]
            highest, weights, total = self.merge(stats)
            first = machine.thread * 4 + _PEER_SUMS
            rows = [machine.load_shared_vector(first + r * fours * 4, 4) for r in range(cluster)]
            self.write(out, lse, head, dim, highest, total, self.weigh(weights, rows))

    def write(self, out, lse, head, dim, highest, total, sums):
        machine, shape = self.machine, self.shape
        op = machine.float_op
        with machine.when(self.first_head + head < shape.q_per_kv):
            some = total.ne(0)
            inverse = machine.select(some, op("div", _ONE, total), 0)
            sums = [op("mul", s, inverse) for s in sums]
            row = machine.row(out, self.query, shape.heads * DIM // 2)
            at = ((self.head + head) * DIM + dim) >> 1
            machine.store_global_pair(row, at, machine.pack_bfloat16(*sums[:2]), machine.pack_bfloat16(*sums[2:]))
            with machine.when(dim.eq(0)):
                value = op("mul", op("add", highest, op("log2", total)), float_bits(1 / _LOG2E))
                value = machine.select(some, value, _MASKED)
                machine.store_global(machine.row(lse, self.query, shape.heads), self.head + head, value)
