"""Products of a few rows with a tile of a weight matrix, and norms of rows, as code for single threads.

A weight matrix is `[out, in]`. A block of 8 warps takes 16 of its rows, the outputs, or a multiple of them, and a group
of 8 tokens, or a multiple. In a step the warps take 32 inputs each, 256 neighbouring ones together. Weights go
from memory straight to registers, several steps ahead, and each is read once by a block. A thread loads 8 neighbouring
inputs of a row where the tensor cores want pairs from two places: products sum over inputs, so any order will do that
tokens and weights share.

The warps' sums are added through shared memory, in the order of the warps. So the order of every sum follows from the
sizes of the matrix alone: a token's results have the same bits in any group, alone or with others.
"""

import functools

from pallas_kernels.gpu.simt import float_bits

WARPS = 8
THREADS = 32 * WARPS
STEP = 32 * WARPS
"""Inputs of one step of a block."""

_CHUNK = 16
"""Words of the inputs of one step of a warp."""
_HIGH = 0xFFFF0000


def row_pitch(size: int) -> int:
    """Words from one token to the next in shared memory, without bank conflicts."""
    return size // 2 + 16


def sums_words(tiles: int, tokens: int) -> int:
    """Words of shared memory that `TileProduct.share` takes."""
    return WARPS * tokens * _sums_pitch(tiles)


def _sums_pitch(tiles: int) -> int:
    return 16 * tiles + 4


class TileProduct:
    """The product of a tile of `16 * len(rows)` outputs with a group of tokens, as each thread sees it.

    Its weights begin to arrive when it is made. A lane is 4 * g + c.

    Args:
      weights: the whole matrix as one row.
      rows: for each 16 outputs, the rows of outputs g and g + 8.
      size: inputs.
      tokens: of the group, a multiple of 8.
      ahead: steps whose weights are on their way.
      load_weights: gives 4 words of weights, from a word on.
    """

    def __init__(self, machine, weights, rows, size, tokens, ahead, load_weights):
        self.machine, self.weights, self.tokens, self.ahead = machine, weights, tokens, ahead
        self.g, self.c = machine.lane >> 2, machine.lane & 3
        self.rows = [[row * (size // 2) for row in pair] for pair in rows]
        self.steps, self.load_weights = size // STEP, load_weights
        self.pending = [self._load(step) for step in range(min(ahead, self.steps))]

    def _word(self, step):
        return self.machine.warp * _CHUNK + self.c * 4 + step * (WARPS * _CHUNK)

    def _load(self, step):
        word = self._word(step)
        return [[self.load_weights(self.weights, row + word) for row in pair] for pair in self.rows]

    def shared_tokens(self, start, pitch):
        """For `sums`: tokens in shared memory, in rows of `pitch` words from `start` on."""

        def load(word):
            machine = self.machine
            rows = [(self.g + first) * pitch + word for first in range(0, self.tokens, 8)]
            return [machine.load_shared_vector(row + start, 4) for row in rows]

        return load

    def sums(self, load_tokens):
        """This warp's part: float32 `[tile, 8 tokens, 4]`, each four as `multiply_tiles` gives them.

        Args:
          load_tokens: gives a lane's 4 words of token g of each 8, from a word on.
        """
        machine = self.machine
        sums = [[[machine.word(0)] * 4 for _ in range(0, self.tokens, 8)] for _ in self.rows]
        for step in range(self.steps):
            tiles = self.pending.pop(0)
            if step + self.ahead < self.steps:
                self.pending.append(self._load(step + self.ahead))
            tokens = load_tokens(self._word(step))
            for half in (0, 2):
                for own, (low, high) in zip(sums, tiles, strict=True):
                    a = low[half], high[half], low[half + 1], high[half + 1]
                    for i, b in enumerate(tokens):
                        own[i] = machine.multiply_tiles(a, b[half : half + 2], own[i])
        return sums

    def share(self, sums, start):
        """Writes this warp's sums to shared memory from `start` on, for `total`."""
        machine, pitch = self.machine, _sums_pitch(len(self.rows))
        base = (machine.warp * self.tokens + self.c * 2) * pitch + self.g + start
        for tile, own in enumerate(sums):
            for i, four in enumerate(own):
                for j, word in enumerate(four):
                    machine.store_shared(base + ((8 * i + j % 2) * pitch + 16 * tile + j // 2 * 8), word)

    def total(self, start, token, output):
        """The sum of all warps for a token of the group and an output of the tile, after a barrier."""
        machine, pitch = self.machine, _sums_pitch(len(self.rows))
        at = machine.word(token) * pitch + output + start
        words = [machine.load_shared(at + warp * self.tokens * pitch) for warp in range(WARPS)]
        return functools.reduce(functools.partial(machine.float_op, "add"), words)


def unpack(machine, words):
    """The numbers of words of two bfloat16 numbers each, in order, as float32."""
    return [half for word in words for half in (word << 16, word & _HIGH)]


def lane_sum(machine, number, lanes=32):
    """The sum over each `lanes` lanes, 32 or 16, in an order that is always the same; every lane gets it."""
    for mask in (16, 8, 4, 2, 1) if lanes == 32 else (8, 4, 2, 1):
        number = machine.float_op("add", number, machine.shuffle_xor(number, mask))
    return number


def normalise_token(machine, token, factors, size, eps):
    """The RMS norm of a warp's token, from a lane's words of it and of the norm's weights, each in lists of four."""
    op, total = machine.float_op, machine.word(0)
    for words in token:
        for number in unpack(machine, words):
            total = op("fma", number, number, total)
    scale, normed = mean_scale(machine, lane_sum(machine, total), size, eps), []
    for words, own in zip(token, factors, strict=True):
        scaled = [op("mul", x, scale) for x in unpack(machine, words)]
        scaled = [op("mul", x, factor) for x, factor in zip(scaled, unpack(machine, own), strict=True)]
        normed.append([machine.pack_bfloat16(*scaled[i : i + 2]) for i in range(0, 8, 2)])
    return normed


def mean_scale(machine, total, size, eps):
    """`1 / sqrt(total / size + eps)`; eps is a float32 word."""
    op = machine.float_op
    return op("rsqrt", op("add", op("mul", total, float_bits(1 / size)), eps))
