"""Attention of single queries to listed positions on Hopper GPUs, for keys and values in float8 with scales.

It is the kernel of `decode` with half the bytes: a thread loads 16 dimensions of a head at once. Tensor cores multiply
bfloat16, which holds float8_e4m3fn exactly. A key's scale is a factor on its scores, a value's one on its weights.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sparse_attention.mosaic_gpu.attend import check
from pallas_kernels.sparse_attention.mosaic_gpu.decode import NOWHERE, STEP, DecodeShape, SingleQuery, run
from pallas_kernels.sparse_attention.mosaic_gpu.gather import DIM

_SIGN, _REST = 0x80008000, 0x07F007F0
_TWO_TO_120 = 0x7B807B80
"""Twice, in bfloat16."""


def attend_single_float8(
    q: jax.Array, kv: jax.Array, kv_scales: jax.Array, indices: jax.Array, page_table: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """As `attend_single`, of float8_e4m3fn pages with scales.

    Args:
      kv: float8_e4m3fn `[p, page_size, 2 * k, 128]`. What is no number counts as 480.
      kv_scales: float32 `[p, page_size, 2 * k]`, factors on each head's keys and values.

    Raises:
      NotImplementedError: dtypes or sizes that the kernel does not take.
    """
    kv_heads = check(q, kv, scale, jnp.float8_e4m3fn)
    shape = DecodeShape.of(q, indices, page_table, kv.shape[1], kv_heads, scale)
    return run(float8_body, shape, q, (kv, kv_scales, indices.reshape(-1, shape.size), page_table))


def float8_body(machine, q, kv, scales, lists, page_table, out, lse, block, rank, *, shape):
    """Runs in each thread of cluster number `block`. `rank` is the block's number in the cluster."""
    SingleFloat8Query(machine, shape, block, rank, q, kv, lists, page_table, scales).run(out, lse)


class SingleFloat8Query(SingleQuery):
    """One query and up to eight of its heads. The last word of its keys, and of its values, is the scale of one key."""

    HEAD_WORDS = DIM // 4
    KEY_WORDS = VALUE_WORDS = STEP + 1
    Q_STEP, Q_OFFSETS = 8, (0, 4, 32, 36)
    G_DIMS, SIDE_DIMS = 16, 8

    def __init__(self, machine, shape, block, rank, q, kv, lists, page_table, scales):
        super().__init__(machine, shape, block, rank, q, kv, lists, page_table)
        self.scales = scales
        pairs = [(words[i], words[i + 1]) for words in self.q for i in (0, 2)]
        # Of four dimensions, in the order of `unpack`.
        self.q = [machine.halves(*pair, which) for pair in pairs for which in range(2)]
        self.q = [self.q[i : i + 4] for i in range(0, len(self.q), 4)]

    def load_scale(self, slots, head):
        """The scale of the key that this lane looks up, 0 if there is none."""
        machine, heads = self.machine, 2 * self.shape.kv_heads
        exists = slots.ne(NOWHERE)
        row = machine.row(self.scales, machine.select(exists, slots, 0), heads)
        return machine.select(exists, machine.load_global(row, head), 0)

    def load_keys(self, slots):
        """Of keys 8 * i + g, the 16 dimensions from 16 * c on in each 64 dimensions."""
        offsets = [self.c * 4 + 16 * i for i in range(2)]
        rows = [self.load_row(slots, self.g + 8 * i, self.kv_head, offsets) for i in range(STEP // 8)]
        return [word for row in rows for words in row for word in words] + [self.load_scale(slots, self.kv_head)]

    def load_values(self, slots):
        """Of keys 8 * i + 2 * c and the next, the 16 dimensions from 16 * g on."""
        head, lanes = self.kv_head + self.shape.kv_heads, [self._key(i) for i in range(STEP // 4)]
        rows = [self.load_row(slots, lane, head, [self.g * 4])[0] for lane in lanes]
        return [word for words in rows for word in words] + [self.load_scale(slots, head)]

    def _key(self, i):
        """The key of a step whose score is number i of this lane's."""
        return self.c * 2 + (8 * (i // 2) + i % 2)

    def prepare_keys(self, keys):
        machine, (*keys, scale) = self.machine, keys
        words = [word for four in keys for word in unpack(machine, four)]
        factors = [machine.shuffle(scale, self._key(i)) for i in range(STEP // 4)]
        factors = [machine.float_op("mul", each, self.factor) for each in factors]
        return np.array(words, dtype=object).reshape(STEP // 8, 4, 4), factors

    def prepare_values(self, weights, values):
        machine, (*values, scale) = self.machine, values
        scales = [machine.shuffle(scale, self._key(i)) for i in range(STEP // 4)]
        weights = [machine.float_op("mul", *both) for both in zip(weights, scales, strict=True)]
        values = np.array(values, dtype=object).reshape(STEP // 16, 2, 2, 4)  # tile, half, key of a pair, words

        def pairs(tile):
            for quad in range(4):
                halves = [[machine.halves(*two[:, i // 2], i % 2) for i in (quad, quad + 4)] for two in tile]
                unpacked = [[unpack(machine, side) for side in half] for half in halves]
                for i in range(2):
                    yield [[side[i] for side in half] for half in unpacked]

        return weights, [pairs(tile) for tile in values]


def unpack(machine, word):
    """Of four float8_e4m3fn numbers, the first and the third, and the second and the fourth, as bfloat16; exact."""

    def numbers(shifted):
        # The exponent's bias is 7, not 127. A number without a leading one has none as bfloat16 either.
        small = (shifted & _SIGN) | ((shifted >> 4) & _REST)
        return machine.multiply_bfloat16(small, machine.word(_TWO_TO_120))

    return [numbers(word << 8), numbers(word)]
