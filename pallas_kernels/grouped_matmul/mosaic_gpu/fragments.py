"""Weights of fewer bits, from shared memory to the registers in which wgmma takes its left operand, per thread.

A tile of weights has two halves of `width` output columns, and `STEP` inputs. Its bytes lie as a copy with a swizzle of
`width` bytes leaves them: the 16-byte chunks of a row are permuted. A warpgroup takes 64 columns of each half. They are
the rows of two products of 64: a thread reads words of four neighbouring columns; the first two are its rows g and
g + 8 of the first product, the last two are those of the second.

Lanes whose g is below 4 read the first half and the others the second. So a thread has only a gate's columns or only
up's, and lane ^ 16 has the other's. The two read their rows in different orders, and then no two lanes of a warp read
the same bank.

A product's result is [64, rows of activations]. A thread has rows g and g + 8 of it, and of each 8 columns two.

Every number is exact in bfloat16. float8_e4m3fn has its bits moved to their places and is multiplied by 2**120; what is
no number counts as 480. Whole numbers become the last bits of 128, whose steps are 1 in bfloat16, and 128 or more is
subtracted.

With activations in float8, weights stay in float8. A register then has four neighbouring inputs of one column, while
memory has four columns of one input. So a thread reads four inputs and transposes 4 x 4 bytes.
"""

import functools
import math
import typing

import numpy as np

from pallas_kernels.indexer_scores.quantize import SMALLEST

STEP = 128
"""Inputs of a tile."""
PARTS = STEP // 16
"""Parts of a tile that one wgmma multiplies."""
FLOAT8_PARTS = STEP // 32
"""The same of a wgmma in float8."""

_SIGN, _REST = 0x80008000, 0x07F007F0
_TWO_TO_120 = 0x7B807B80
_128, _136 = 0x43004300, 0x43084308
"""Each twice, in bfloat16."""


class ThreadColumns:
    """The columns of a tile that one thread reads, and the rows of activations whose sums it has.

    Attributes:
      half: which half of the columns the thread reads, 0 or 1.
      column: the first of its four columns, in its half of the tile.
      row: the rows of activations whose sums it has are, of each 8, this one and the next.
    """

    def __init__(self, machine, width, warpgroup):
        """`width` is 64 or 128; `warpgroup` is the number of the 64 columns."""
        self.machine, self.width, self.pitch = machine, width, width // 4
        thread = machine.thread & 127
        lane, warp = thread & 31, thread >> 5
        self.quad = lane & 3
        self.half, self.row = lane >> 4, self.quad * 2
        self.flipped = self.half.ne(0)
        self._word, self._chunk = (lane >> 2) & 3, warp + warpgroup * 4
        self.column = self._chunk * 16 + self._word * 4

    def address(self, row, rows):
        """The thread's word of a row of its half, of `rows` rows as stored."""
        place = self._chunk ^ (((row * self.width) >> 7) & (self.width // 16 - 1))
        return self.half * (rows * self.pitch) + row * self.pitch + place * 4 + self._word

    def output(self, column, half_step):
        """The first of the thread's four columns of the matrix.

        Args:
          column: where the first half of the tile begins; the second half begins `half_step` columns behind it.
        """
        return self.machine.word(column) + self.half * half_step + self.column

    def results(self, sums, *, fused):
        """What a thread stores, from float32 sums `[2 products][of each 8 rows: row g, row g; row g + 8, row g + 8]`.

        Args:
          fused: whether the first half is a gate and the second half is up, of which `silu(gate) * up` is made.

        Returns:
          The offset of the first row; and for each row that the thread stores, the rows from there to it, a constant,
          and two words with its four columns in bfloat16.
        """
        machine, found = self.machine, []
        for eight in range(0, 2 * len(sums[0]), 8):
            rows = [[each[eight // 2 + 2 * i + pair] for each in sums for i in range(2)] for pair in range(2)]
            if fused:
                rows = [self._silu_up(*rows)]
            for pair, four in enumerate(rows):
                found.append((eight + pair, [machine.pack_bfloat16(*four[i : i + 2]) for i in (0, 2)]))
        return self.row + self.half if fused else self.row, found

    def _silu_up(self, first_row, second_row):
        """`silu(gate) * up` of the first row in lanes with a gate, and of the second row in lanes with up."""
        machine, results = self.machine, []
        for first, second in zip(first_row, second_row, strict=True):
            kept, sent = machine.select(self.flipped, second, first), machine.select(self.flipped, first, second)
            got = machine.shuffle_xor(sent, 16)
            gate, up = machine.select(self.flipped, got, kept), machine.select(self.flipped, kept, got)
            power = machine.float_op("exp2", machine.float_op("mul", gate, _bits(-math.log2(math.e))))
            silu = machine.float_op("div", gate, machine.float_op("add", power, _bits(1.0)))
            results.append(machine.float_op("mul", silu, up))
        return results

    def largest(self, words):
        """The largest magnitude of the four bfloat16 numbers of two words, as the bits of a float32 number."""
        machine, found = self.machine, []
        for word in words:
            magnitudes = word & 0x7FFF7FFF
            found += [magnitudes << 16, magnitudes & 0x7FFF0000]
        return functools.reduce(lambda a, b: machine.select(a < b, b, a), found)

    def to_float8(self, words, largest):
        """The four bfloat16 numbers of two words in float8, one word, and their scale's bits: see `quantize`.

        Args:
          largest: the largest magnitude of all that share the scale, as `largest` gives it.
        """
        machine = self.machine
        largest = machine.select(largest < _bits(SMALLEST), machine.word(_bits(SMALLEST)), largest)
        exponent = ((largest + 0x1FFFFF) >> 23) - 8
        inverse = (machine.word(254) - exponent) << 23
        numbers = [part for word in words for part in (word << 16, word & 0xFFFF0000)]
        return machine.pack_float8(*(machine.float_op("mul", x, inverse) for x in numbers)), exponent << 23


class WeightReader(ThreadColumns):
    """What one thread reads of a tile whose numbers become bfloat16."""

    _SWAP: typing.ClassVar = {"float8_e4m3fn": 0x4040, "int8": 0x0404}

    def __init__(self, machine, kind, width, warpgroup):
        """`kind` is the name of the values' dtype; the others are as for `ThreadColumns`."""
        super().__init__(machine, width, warpgroup)
        self.kind = kind
        packed = kind == "uint8"
        rows = STEP // 2 if packed else STEP
        near, far = (self.quad, self.quad + 4) if packed else (self.row, self.row + 1)
        self.first = self.address(machine.select(self.flipped, far, near), rows)
        self.second = self.address(machine.select(self.flipped, near, far), rows)

    def load(self, part):
        """The words of part `part` of the tile: of its inputs 2 * c and 2 * c + 1 of each 8, with c the lane's place.

        Returns:
          Two pairs. Of 8-bit values, each has the two inputs of an 8, the second half's in the other order. Of 4-bit
          values, both words of an 8 are one, and there is no pair.
        """
        machine, pitch = self.machine, self.pitch
        if self.kind == "uint8":
            first, second = (machine.load_shared_behind(each, part * 8 * pitch) for each in (self.first, self.second))
            return machine.select(self.flipped, second, first), machine.select(self.flipped, first, second)
        rows = [(part * 16 + 8 * eight) * pitch for eight in range(2)]
        return [[machine.load_shared_behind(each, row) for each in (self.first, self.second)] for row in rows]

    def registers(self, words, product):
        """The four registers of wgmma's left operand for the words that `load` returned, of product 0 or 1."""
        return [self._number(each, 2 * product + i) for each in words for i in range(2)]

    def _number(self, words, byte):
        """Two neighbouring inputs of column `byte` of four, as bfloat16."""
        machine = self.machine
        if self.kind == "uint8":
            both = machine.permute(words, words >> 4, machine.word(byte | (4 + byte) << 8))
            return machine.subtract_bfloat16((both & 0x000F000F) | _128, machine.word(_136))
        low, high = byte, 4 + byte
        selector = low << 4 | high << 12 if self.kind == "float8_e4m3fn" else low | high << 8
        selector = machine.select(self.flipped, selector ^ self._SWAP[self.kind], selector)
        both = machine.permute(*words, selector)
        if self.kind == "float8_e4m3fn":
            small = (both & _SIGN) | ((both >> 4) & _REST)
            return machine.multiply_bfloat16(small, machine.word(_TWO_TO_120))
        return machine.subtract_bfloat16((both & 0x007F007F) | _128, (both & 0x00800080) | _128)


class Float8Reader(ThreadColumns):
    """What one thread reads of a tile of float8_e4m3fn that is multiplied in float8.

    Of each 16 inputs a thread takes four neighbours. Lanes take them in four orders: the n-th read is of input n with
    two bits flipped, so that no two lanes of a warp read the same bank. What is no number stays none.
    """

    def __init__(self, machine, width, warpgroup):
        super().__init__(machine, width, warpgroup)
        later = self.quad >> 1
        flips = later | self.half << 1
        self.addresses = [self.address(self.quad * 4 + (flips ^ i), STEP) for i in range(4)]
        self._pairs = [later * 0x4444 ^ selector for selector in (0x5140, 0x7362)]
        self._halves = [self.half * 0x4444 ^ selector for selector in (0x5410, 0x7632)]

    def load(self, part):
        """The words of 32 inputs: of each 16, four."""
        return [
            [self.machine.load_shared_behind(each, (32 * part + 16 * i) * self.pitch) for each in self.addresses]
            for i in range(2)
        ]

    def registers(self, words):
        """The four registers of wgmma's left operand, of product 0 and of product 1, for what `load` returned."""
        columns = [self._transpose(four) for four in words]
        return [[each[2 * product + i] for each in columns for i in range(2)] for product in range(2)]

    def _transpose(self, words):
        """Four inputs of each of the four columns, in the inputs' order, from words with four columns of an input."""
        permute, found = self.machine.permute, []
        for pair in self._pairs:
            low, high = permute(*words[:2], pair), permute(*words[2:], pair)
            found += [permute(low, high, half) for half in self._halves]
        return found


def spread_columns(four, rows, product):
    """Numbers of a thread's four columns, one for each of its sums of a product with `rows` rows of activations."""
    return [four[2 * product + i // 2] for i in range(4)] * (rows // 8)


def _bits(number):
    return int(np.float32(number).view(np.uint32))
