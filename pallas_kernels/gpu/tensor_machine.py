"""Per-thread code with float32 arithmetic and with a warp's tensor-core products."""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAttributeAccessIssue=false

import typing

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.gpu.machine import Machine
from pallas_kernels.gpu.simt import Value


class TensorMachine(Machine):
    """A `Machine` with words that hold one float32 number, or two bfloat16 numbers, the first in the low half."""

    _FLOAT: typing.ClassVar = {
        "add": "add.f32",
        "mul": "mul.f32",
        "max": "max.f32",
        "fma": "fma.rn.f32",
        "div": "div.full.f32",
        "exp2": "ex2.approx.ftz.f32",
        "log2": "lg2.approx.f32",
        "rsqrt": "rsqrt.approx.f32",
    }

    def _emit(self, ptx, *words):
        return Value(self, utils.inline_ptx(ptx, *(self.word(w).raw for w in words), result_types=self.i32))

    def float_op(self, name, *words):
        places = ", ".join(f"${i}" for i in range(len(words) + 1))
        return self._emit(f"{self._FLOAT[name]} {places};", *words)

    def round_up(self, number):
        """The least integer from a float32 number on, from 0 to 2^32 - 1; NaN gives 0."""
        return self._emit("cvt.rpi.u32.f32 $0, $1;", number)

    def round_nearest(self, number):
        """The nearest integer to a float32 number, an even one of two, from 0 to 2^32 - 1; NaN gives 0."""
        return self._emit("cvt.rni.u32.f32 $0, $1;", number)

    def to_float(self, integer):
        """The float32 number that is next to an integer and not above it."""
        return self._emit("cvt.rz.f32.u32 $0, $1;", integer)

    def pack_bfloat16(self, low, high):
        """One word of two float32 numbers, rounded to bfloat16."""
        return self._emit("cvt.rn.bf16x2.f32 $0, $1, $2;", high, low)

    def pack_float8(self, *four):
        """One word of four float32 numbers, rounded to float8_e4m3fn; larger ones become 448."""
        first, second = "cvt.rn.satfinite.e4m3x2.f32 a, $2, $1;", "cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;"
        return self._emit(f"{{ .reg .b16 a, b; {first} {second} mov.b32 $0, {{a, b}}; }}", *four)

    def halves(self, low, high, which):
        """One word of the low halves (`which` is 0) or the high halves (`which` is 1) of two words."""
        return self._emit(f"prmt.b32 $0, $1, $2, {0x7632 if which else 0x5410};", low, high)

    def multiply_bfloat16(self, a, b):
        """The products of the two bfloat16 numbers of each word, rounded; numbers below 2**-126 count."""
        return self._emit("mul.rn.bf16x2 $0, $1, $2;", a, b)

    def subtract_bfloat16(self, a, b):
        """The differences of the two bfloat16 numbers of each word, rounded."""
        return self._emit("sub.rn.bf16x2 $0, $1, $2;", a, b)

    def permute(self, low, high, selector):
        """A word whose byte i is the byte of (low, high), 0 to 7, that bits 4 * i to 4 * i + 2 of `selector` name."""
        return self._emit("prmt.b32 $0, $1, $2, $3;", low, high, selector)

    def multiply_tiles(self, a, b, c):
        """`c + a @ b` of a warp: bfloat16 `[16, 16]` and `[16, 8]` to float32 `[16, 8]`, spread as in mma.m16n8k16."""
        results, inputs = "$0, $1, $2, $3", [self.word(w).raw for w in (*a, *b, *c)]
        words = utils.inline_ptx(
            f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{results}}}, "
            "{$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            *inputs,
            result_types=[self.i32] * 4,
            convergent=True,
        )
        return [Value(self, w) for w in words]

    def load_global4_where(self, row, index, condition):
        """As `load_global4`. Where the condition does not hold, nothing is read and the words are 0."""
        zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
        words = utils.inline_ptx(
            f"{zeros} @$5 ld.global.nc.L1::no_allocate.v4.b32 {{$0, $1, $2, $3}}, [$4];",
            self._at(row, index),
            condition.raw,
            result_types=[self.i32] * 4,
            has_side_effects=True,
        )
        return [Value(self, w) for w in words]

    def load_global_pair(self, row, index):
        """Two words from an even index. They are read here, also if only a branch below uses them."""
        return self._load("ld.global.nc", row, index, 2)

    def load_global_now(self, row, index, size):
        """One word, or four from a multiple of four, not kept in L1.

        ptxas moves no such load behind a barrier, as it does with others, to where the words are needed.
        """
        return self._load("ld.relaxed.cta.global.L1::no_allocate", row, index, size)

    def row_at(self, low, high):
        """Pointer to global memory, of this GPU or another, from the halves of its address."""
        halves = (arith.extui(self.i64, half.raw) for half in (low, high))
        low, high = next(halves), arith.shli(next(halves), arith.constant(self.i64, 32))
        return llvm.inttoptr(llvm.PointerType.get(address_space=1), arith.ori(low, high))

    def send4(self, row, index, words, flag):
        """Stores four words in another GPU's memory, each pair of them with a flag, for `receive4`."""
        for i in (0, 2):
            to = self._at(row, index + 2 * i)
            ptx = "st.volatile.global.v4.b32 [$0], {$1, $3, $2, $3};"
            utils.inline_ptx(ptx, to, words[i].raw, words[i + 1].raw, flag.raw)

    def receive4(self, row, index, flag):
        """Waits for four words from another GPU: until the flags beside them are `flag`.

        A GPU reads and writes 8 bytes as one, so a word is there when its flag is.
        """
        words = []
        for i in (0, 2):
            words += utils.inline_ptx(
                "{ .reg .pred missing; .reg .b32 a, b, flag_a, flag_b;\n"
                "AGAIN: ld.volatile.global.v4.b32 {a, flag_a, b, flag_b}, [$2];\n"
                "setp.ne.b32 missing, flag_a, $3;\n"
                "setp.ne.or.b32 missing, flag_b, $3, missing;\n"
                "@missing bra AGAIN;\n"
                "mov.b32 $0, a; mov.b32 $1, b; }",
                self._at(row, index + 2 * i),
                flag.raw,
                result_types=[self.i32] * 2,
                has_side_effects=True,
            )
        return [Value(self, word) for word in words]

    def store_global_pair(self, row, index, a, b):
        """Stores two words at an even index."""
        utils.inline_ptx("st.global.v2.b32 [$0], {$1, $2};", self._at(row, index), self.word(a).raw, self.word(b).raw)

    def shuffle_xor(self, value, mask):
        """The value of the lane whose number differs from this lane's in the bits of `mask`."""
        return Value(self, utils.shfl_bfly(value.raw, mask))

    def ballot(self, condition):
        """A word with one bit per lane, set where the lane's condition holds."""
        return Value(
            self,
            utils.inline_ptx(
                "vote.sync.ballot.b32 $0, $1, 0xffffffff;",
                condition.raw,
                result_types=self.i32,
                has_side_effects=True,
                convergent=True,
            ),
        )
