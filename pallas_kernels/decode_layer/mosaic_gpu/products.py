"""Products of eight rows with 16 rows of a weight matrix, and norms of rows, as code for single threads.

A weight matrix is `[out, in]`. A block of 8 warps takes 16 of its rows, the outputs, and eight tokens. In a step the
warps take 32 inputs each, 256 neighbouring ones together. Weights go from memory straight to registers, those of all
steps at once, and each is read once by a block. A thread loads 8 neighbouring inputs of a row where the tensor cores
want pairs from two places: products sum over inputs, so any order will do that tokens and weights share.

The warps' sums are added through shared memory, in the order of the warps. So the order of every sum follows from the
sizes of the matrix alone: a token's results have the same bits in any group, alone or with others.
"""

import functools

from pallas_kernels.gpu.simt import float_bits

OUTPUTS, TOKENS, WARPS = 16, 8, 8
THREADS = 32 * WARPS
STEP = 32 * WARPS
"""Inputs of one step of a block."""

_CHUNK = 16
"""Words of the inputs of one step of a warp."""
_SUMS_PITCH = OUTPUTS + 4
SUMS_WORDS = WARPS * TOKENS * _SUMS_PITCH
"""Words of shared memory that `TileProduct.share` takes."""
_HIGH = 0xFFFF0000


def row_pitch(size: int) -> int:
    """Words from one token to the next in shared memory, without bank conflicts."""
    return size // 2 + 16


class TileProduct:
    """The product of 16 outputs with eight tokens, as each thread sees it.

    Its weights begin to arrive when it is made. A lane is 4 * g + c.

    Args:
      weights: the whole matrix as one row.
      first: the first output.
      size: inputs.
      load_weights: gives 4 words of weights, from a word on.
    """

    def __init__(self, machine, weights, first, size, load_weights):
        self.machine, self.g, self.c = machine, machine.lane >> 2, machine.lane & 3
        self.words = [machine.warp * _CHUNK + self.c * 4 + begin for begin in range(0, size // 2, WARPS * _CHUNK)]
        rows = [(first + self.g + half) * (size // 2) for half in (0, 8)]
        self.weights = [[load_weights(weights, row + word) for row in rows] for word in self.words]

    def sums(self, start, pitch):
        """This warp's part, four float32 sums as `multiply_tiles` gives them.

        Args:
          start: where shared memory has the tokens, in rows of `pitch` words.
        """
        machine, sums = self.machine, [self.machine.word(0)] * 4
        for word, (low, high) in zip(self.words, self.weights, strict=True):
            token = machine.load_shared_vector(self.g * pitch + word + start, 4)
            for half in (0, 2):
                a = low[half], high[half], low[half + 1], high[half + 1]
                sums = machine.multiply_tiles(a, token[half : half + 2], sums)
        return sums

    def share(self, sums, start):
        """Writes this warp's sums to shared memory from `start` on, for `total`."""
        machine = self.machine
        base = (machine.warp * TOKENS + self.c * 2) * _SUMS_PITCH + self.g + start
        for j, word in enumerate(sums):
            machine.store_shared(base + (j % 2 * _SUMS_PITCH + j // 2 * 8), word)

    def total(self, start, token, output):
        """The sum of all warps for one of the tokens and one of the outputs, after a barrier."""
        machine = self.machine
        at = machine.word(token) * _SUMS_PITCH + output + start
        words = [machine.load_shared(at + warp * TOKENS * _SUMS_PITCH) for warp in range(WARPS)]
        return functools.reduce(functools.partial(machine.float_op, "add"), words)


def unpack(machine, words):
    """The numbers of words of two bfloat16 numbers each, in order, as float32."""
    return [half for word in words for half in (word << 16, word & _HIGH)]


def pack(machine, numbers):
    """Float32 numbers rounded to bfloat16, two in a word."""
    return [machine.pack_bfloat16(*numbers[i : i + 2]) for i in range(0, len(numbers), 2)]


def add_bfloat16(machine, a, b):
    """The sums of the bfloat16 numbers of words, rounded."""
    pairs = zip(unpack(machine, a), unpack(machine, b), strict=True)
    return pack(machine, [machine.float_op("add", *pair) for pair in pairs])


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
        normed.append(pack(machine, scaled))
    return normed


def mean_scale(machine, total, size, eps):
    """`1 / sqrt(total / size + eps)`; eps is a float32 word."""
    op = machine.float_op
    return op("rsqrt", op("add", op("mul", total, float_bits(1 / size)), eps))
