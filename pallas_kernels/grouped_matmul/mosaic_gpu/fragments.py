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
"""

import math
import typing

import numpy as np

STEP = 128
"""Inputs of a tile."""
PARTS = STEP // 16
"""Parts of a tile that one wgmma multiplies."""

_SIGN, _REST = 0x80008000, 0x07F007F0
_TWO_TO_120 = 0x7B807B80
_128, _136 = 0x43004300, 0x43084308
"""Each twice, in bfloat16."""


class WeightReader:
    """What one thread of a warpgroup reads of a tile.

    Attributes:
      half: which half of the columns the thread reads, 0 or 1.
      column: the first of its four columns, in its half of the tile.
      row: the rows of activations whose sums it has are, of each 8, this one and the next.
    """

    _SWAP: typing.ClassVar = {"float8_e4m3fn": 0x4040, "int8": 0x0404}

    def __init__(self, machine, kind, width, warpgroup):
        """`kind` is the name of the values' dtype, `width` 64 or 128; `warpgroup` is the number of the 64 columns."""
        self.machine, self.kind = machine, kind
        thread = machine.thread & 127
        lane, warp = thread & 31, thread >> 5
        quad = lane & 3
        self.half, self.row = lane >> 4, quad * 2
        word = (lane >> 2) & 3
        chunk = warp + warpgroup * 4
        self.column = chunk * 16 + word * 4
        packed = kind == "uint8"
        self.pitch = width // 4
        rows = STEP // 2 if packed else STEP
        near, far = (quad, quad + 4) if packed else (self.row, self.row + 1)
        flipped = self.half.ne(0)

        def address(row):
            place = chunk ^ (((row * width) >> 7) & (width // 16 - 1))
            return self.half * (rows * self.pitch) + row * self.pitch + place * 4 + word

        self.flipped = flipped
        self.first = address(machine.select(flipped, far, near))
        self.second = address(machine.select(flipped, near, far))

    def output(self, column, half_step):
        """The first of the thread's four columns of the matrix.

        Args:
          column: where the first half of the tile begins; the second half begins `half_step` columns behind it.
        """
        return self.machine.word(column) + self.half * half_step + self.column

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


def spread_columns(four, rows, product):
    """Numbers of a thread's four columns, one for each of its sums of a product with `rows` rows of activations."""
    return [four[2 * product + i // 2] for i in range(4)] * (rows // 8)


def _bits(number):
    return int(np.float32(number).view(np.uint32))
