"""Per-thread code in Mosaic GPU kernels, as MLIR inside one `plgpu.inline_mgpu`."""

# The types of Pallas' decorators and transforms are not yet complete.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

import contextlib
import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, scf

from pallas_kernels.gpu.hopper import MULTIPROCESSORS, SHARED_BYTES
from pallas_kernels.gpu.mlir import byte_offset, global_pointer
from pallas_kernels.gpu.simt import Value

ALL_LANES = 0xFFFFFFFF
SHARED_WORDS = SHARED_BYTES // 4
"""Words of shared memory that one block can have."""


class Machine:
    """Emits MLIR for one thread.

    A team of `threads` threads works together. Either `teams` teams share a block, or `cluster` blocks, one team each,
    work together.
    """

    _BINARY: typing.ClassVar = {
        "add": arith.addi,
        "sub": arith.subi,
        "mul": arith.muli,
        "div": arith.divui,
        "and": arith.andi,
        "or": arith.ori,
        "xor": arith.xori,
        "shl": arith.shli,
        "shr": arith.shrui,
        "sar": arith.shrsi,
    }
    _COMPARE: typing.ClassVar = {
        "lt": arith.CmpIPredicate.ult,
        "le": arith.CmpIPredicate.ule,
        "gt": arith.CmpIPredicate.ugt,
        "ge": arith.CmpIPredicate.uge,
        "eq": arith.CmpIPredicate.eq,
        "ne": arith.CmpIPredicate.ne,
    }

    def __init__(self, threads, cluster, shared, teams=1, shared_words=0):
        self.threads, self.cluster, self.teams = threads, cluster, teams
        self.i32, self.i64, self.f32 = (
            ir.IntegerType.get_signless(32),
            ir.IntegerType.get_signless(64),
            ir.F32Type.get(),
        )
        self.shared = utils.memref_ptr(shared)
        self.thread, self.warp, self.team = Value(self, utils.thread_idx()), Value(self, utils.warp_idx()), self.word(0)
        if teams > 1:
            self.team = self.warp // (threads // 32)
            self.thread, self.warp = self.thread - self.team * threads, self.warp - self.team * (threads // 32)
            self.shared = self._shared_at(self.team * shared_words)
        self.lane, self.turn = self.thread & 31, self.word(0)

    # Values.

    def word(self, value):
        if isinstance(value, Value):
            return value
        return Value(self, arith.constant(self.i32, value - (1 << 32) if value >= 1 << 31 else value))

    def binary(self, name, a, b):
        return Value(self, self._BINARY[name](a.raw, self.word(b).raw))

    def compare(self, name, a, b):
        return Value(self, arith.cmpi(self._COMPARE[name], a.raw, self.word(b).raw))

    def select(self, condition, a, b):
        return Value(self, arith.select(condition.raw, self.word(a).raw, self.word(b).raw))

    def leading_zeros(self, a):
        return Value(self, utils.inline_ptx("clz.b32 $0, $1;", a.raw, result_types=self.i32))

    def bit_count(self, a):
        return Value(self, utils.inline_ptx("popc.b32 $0, $1;", a.raw, result_types=self.i32))

    def square_root(self, a):
        root = utils.inline_ptx("sqrt.approx.f32 $0, $1;", arith.uitofp(self.f32, a.raw), result_types=self.f32)
        return Value(self, arith.fptoui(self.i32, root))

    # Global memory: an array as rows of words.

    def row(self, ref, index, size):
        """Pointer to row `index` of `ref`, rows of `size` words."""
        base = global_pointer(ref)
        offset = arith.muli(arith.extui(self.i64, self.word(index).raw), arith.constant(self.i64, 4 * size))
        return byte_offset(base, offset)

    def _at(self, pointer, index):
        offset = arith.muli(arith.extui(self.i64, self.word(index).raw), arith.constant(self.i64, 4))
        return byte_offset(pointer, offset)

    def load_global(self, row, index):
        return Value(self, llvm.load(self.i32, self._at(row, index), alignment=4, invariant=True))

    def load_global4(self, row, index):
        """Four words from a multiple of four. They are read once and not kept in L1."""
        return self._load("ld.global.nc.L1::no_allocate", row, index, 4)

    def load_global4_in_order(self, row, index):
        """As `load_global4`, but behind all barriers that come before it; compilers move the other loads ahead."""
        return self._load("ld.global.L1::no_allocate", row, index, 4)

    def _load(self, instruction, row, index, size):
        """One, two or four words, by an instruction that stays where it is written."""
        places = ", ".join(f"${i}" for i in range(size))
        kind, places = (f".v{size}", f"{{{places}}}") if size > 1 else ("", places)
        words = utils.inline_ptx(
            f"{instruction}{kind}.b32 {places}, [${size}];",
            self._at(row, index),
            result_types=[self.i32] * size,
            has_side_effects=True,
        )
        return [Value(self, w) for w in words]

    def copy_shared4(self, address, row, index, condition):
        """Starts to copy four words of a row, from a multiple of four, where `condition` holds, with no branch."""
        utils.inline_ptx(
            "cp.async.cg.shared.global [$0], [$1], 16;",
            self._shared_at(address),
            self._at(row, index),
            predicate=condition.raw,
        )

    def commit_copies(self):
        """Makes one batch of the copies that this thread has started since its last batch."""
        nvvm.cp_async_commit_group()

    def wait_copies(self, pending):
        """Waits until at most `pending` batches of this thread's copies are unfinished."""
        nvvm.cp_async_wait_group(pending)

    def store_global(self, row, index, value):
        llvm.store(self.word(value).raw, self._at(row, index), alignment=4)

    def store_global4(self, row, index, values):
        """Stores four words at a multiple of four."""
        words = (self.word(v).raw for v in values)
        utils.inline_ptx("st.global.v4.b32 [$0], {$1, $2, $3, $4};", self._at(row, index), *words)

    def store_global_where(self, row, index, value, condition):
        """Stores a word where `condition` holds, with no branch."""
        utils.inline_ptx("st.global.b32 [$0], $1;", self._at(row, index), self.word(value).raw, predicate=condition.raw)

    # Shared memory.

    def _shared_at(self, address):
        return utils.getelementptr(self.shared, [self.word(address).raw], self.i32)

    def load_shared(self, address):
        return Value(self, llvm.load(self.i32, self._shared_at(address), alignment=4))

    def load_shared_behind(self, address, words):
        """The word a constant number of words behind an address, which takes no instruction for the sum."""
        pointer = byte_offset(self._shared_at(address), arith.constant(self.i32, 4 * words))
        return Value(self, llvm.load(self.i32, pointer, alignment=4))

    def load_shared_vector(self, address, size):
        """`size` words, a power of two, from an address that is a multiple of `size`."""
        if size == 1:
            return [self.load_shared(address)]
        if size > 4:
            return [v for i in range(0, size, 4) for v in self.load_shared_vector(self.word(address) + i, 4)]
        vector = llvm.load(ir.VectorType.get((size,), self.i32), self._shared_at(address), alignment=4 * size)
        return [Value(self, llvm.extractelement(vector, arith.constant(self.i32, i))) for i in range(size)]

    def store_shared(self, address, value):
        llvm.store(self.word(value).raw, self._shared_at(address), alignment=4)

    def address_of(self, address):
        """The byte address of a word of shared memory, for `store_pair_where`."""
        return Value(self, llvm.ptrtoint(self.i32, self._shared_at(address)))

    def store_pair_where(self, byte_address, a, b, condition):
        """Stores two words at a byte address, a multiple of 8, with no branch."""
        utils.inline_ptx("st.shared.v2.b32 [$0], {$1, $2};", byte_address.raw, a.raw, b.raw, predicate=condition.raw)

    def store_shared_vector(self, address, values):
        if len(values) == 1:
            return self.store_shared(address, values[0])
        if len(values) > 4:
            for i in range(0, len(values), 4):
                self.store_shared_vector(self.word(address) + i, values[i : i + 4])
            return None
        vector = llvm.mlir_undef(ir.VectorType.get((len(values),), self.i32))
        for i, value in enumerate(values):
            vector = llvm.insertelement(vector, self.word(value).raw, arith.constant(self.i32, i))
        llvm.store(vector, self._shared_at(address), alignment=4 * len(values))

    def count_shared(self, address, condition):
        """Adds one to a word of shared memory, atomically, where `condition` holds."""
        utils.inline_ptx("red.shared.add.u32 [$0], 1;", self._shared_at(address), predicate=condition.raw)

    def add_shared(self, address, value):
        utils.inline_ptx("red.shared.add.u32 [$0], $1;", self._shared_at(address), self.word(value).raw)

    def max_shared(self, address, value):
        """Makes a word of shared memory the larger of it and another one, atomically."""
        utils.inline_ptx("red.shared.max.u32 [$0], $1;", self._shared_at(address), self.word(value).raw)

    def fetch_add_shared(self, address, value):
        """Adds to a word of shared memory, atomically. Returns the word before the addition."""
        return Value(
            self,
            utils.inline_ptx(
                "atom.shared.add.u32 $0, [$1], $2;",
                self._shared_at(address),
                self.word(value).raw,
                result_types=self.i32,
                has_side_effects=True,
            ),
        )

    def or_shared_where(self, address, value, condition):
        """Sets bits of a word of shared memory, atomically, where `condition` holds."""
        utils.inline_ptx(
            "red.shared.or.b32 [$0], $1;", self._shared_at(address), self.word(value).raw, predicate=condition.raw
        )

    def load_peer(self, address, rank):
        """A word of the shared memory of block `rank` of the cluster."""
        pointer = utils.get_cluster_ptr(self._shared_at(address), self.word(rank).raw, generic=False)
        return Value(
            self,
            utils.inline_ptx("ld.shared::cluster.u32 $0, [$1];", pointer, result_types=self.i32, has_side_effects=True),
        )

    def load_peer_vector(self, address, size, rank):
        """`size` words (1, 2 or a multiple of 4) of block `rank`'s shared memory, from a multiple of `size`."""
        if size == 1:
            return [self.load_peer(address, rank)]
        if size > 4:
            return [v for i in range(0, size, 4) for v in self.load_peer_vector(self.word(address) + i, 4, rank)]
        pointer = utils.get_cluster_ptr(self._shared_at(address), self.word(rank).raw, generic=False)
        places = ", ".join(f"${i}" for i in range(size))
        words = utils.inline_ptx(
            f"ld.shared::cluster.v{size}.u32 {{{places}}}, [${size}];",
            pointer,
            result_types=[self.i32] * size,
            has_side_effects=True,
        )
        return [Value(self, w) for w in words]

    def store_peer(self, address, rank, value):
        self.store_peer_vector(address, rank, [value])

    def store_peer_vector(self, address, rank, values):
        """Stores 1, 2 or 4 words in block `rank`'s shared memory, at a multiple of their number."""
        pointer = utils.get_cluster_ptr(self._shared_at(address), self.word(rank).raw, generic=False)
        kind = f".v{len(values)}" if len(values) > 1 else ""
        places = ", ".join(f"${i + 1}" for i in range(len(values)))
        utils.inline_ptx(
            f"st.shared::cluster{kind}.u32 [$0], {{{places}}};" if kind else "st.shared::cluster.u32 [$0], $1;",
            pointer,
            *(self.word(v).raw for v in values),
        )

    def add_peer(self, address, rank, value):
        """Adds to a word of the shared memory of block `rank` of the cluster, atomically."""
        pointer = utils.get_cluster_ptr(self._shared_at(address), self.word(rank).raw, generic=False)
        utils.inline_ptx("red.shared::cluster.add.u32 [$0], $1;", pointer, self.word(value).raw)

    def fetch_add_peer(self, address, rank, value):
        """As `add_peer`. Returns the word before the addition."""
        pointer = utils.get_cluster_ptr(self._shared_at(address), self.word(rank).raw, generic=False)
        return Value(
            self,
            utils.inline_ptx(
                "atom.shared::cluster.add.u32 $0, [$1], $2;",
                pointer,
                self.word(value).raw,
                result_types=self.i32,
                has_side_effects=True,
            ),
        )

    def add_first(self, address, value):
        """Adds to a word of the shared memory of the cluster's first block, atomically."""
        self.add_peer(address, 0, value)

    # Other threads.

    def barrier(self):
        """Barrier of the team's threads in this block."""
        if self.teams == 1:
            gpu.barrier()
        else:  # Barriers below 9 are Mosaic's.
            utils.inline_ptx(
                f"bar.sync $0, {self.threads};", (self.team + 9).raw, has_side_effects=True, convergent=True
            )

    def delay(self, cycles):
        """Waits for about `cycles` clock cycles."""

        def clock():
            words = utils.inline_ptx("mov.u32 $0, %clock;", result_types=self.i32, has_side_effects=True)
            return Value(self, words)

        def sleep(_):
            utils.inline_ptx("nanosleep.u32 500;")
            return [clock()]

        start = clock()
        self.while_loop(lambda now: now - start < cycles, sleep, [start])

    def cluster_barrier(self):
        """Barrier of all threads of the cluster, or of the team if the block is alone. It orders shared memory."""
        if self.cluster == 1:
            return self.barrier()
        nvvm.cluster_arrive(aligned=True)
        nvvm.cluster_wait(aligned=True)

    def shuffle_up(self, value, distance):
        """The value of the lane `distance` below, or the lane's own value if there is no such lane."""
        return Value(
            self,
            nvvm.shfl_sync(
                utils.c(ALL_LANES - (1 << 32), self.i32),
                value.raw,
                self.word(distance).raw,
                utils.c(0, self.i32),
                nvvm.ShflKind.up,
            ),
        )

    def shuffle(self, value, lane):
        """The value of lane `lane`."""
        return Value(
            self,
            nvvm.shfl_sync(
                utils.c(ALL_LANES - (1 << 32), self.i32),
                value.raw,
                self.word(lane).raw,
                utils.c(31, self.i32),
                nvvm.ShflKind.idx,
            ),
        )

    def warp_sum(self, value):
        mask = utils.c(ALL_LANES - (1 << 32), self.i32)
        return Value(self, utils.redux(value.raw, mask, nvvm.ReductionKind.ADD))

    def warp_max(self, value):
        mask = utils.c(ALL_LANES - (1 << 32), self.i32)
        return Value(self, utils.redux(value.raw, mask, nvvm.ReductionKind.UMAX))

    def warp_min(self, value):
        mask = utils.c(ALL_LANES - (1 << 32), self.i32)
        return Value(self, utils.redux(value.raw, mask, nvvm.ReductionKind.UMIN))

    # Control flow.

    @contextlib.contextmanager
    def when(self, condition):
        with utils.when(condition.raw):
            yield

    def branch(self, condition, body, carry, otherwise=lambda *carry: carry):
        """`body(*carry)` where the condition holds, else `otherwise(*carry)`."""
        carry = [self.word(v) for v in carry]
        operation = scf.IfOp(condition.raw, [v.raw.type for v in carry], has_else=True)
        for block, run in ((operation.then_block, body), (operation.else_block, otherwise)):
            with ir.InsertionPoint(block):
                scf.yield_([self.word(v).raw for v in run(*carry)])
        return [Value(self, v) for v in operation.results]

    def loop(self, start, stop, step, body, carry=()):
        """`carry = body(i, *carry)` for i from start below stop."""
        start, stop, step = (self.word(v).raw for v in (start, stop, step))
        operation = scf.ForOp(start, stop, step, [self.word(v).raw for v in carry])
        with ir.InsertionPoint(operation.body):
            result = body(
                Value(self, operation.induction_variable), *(Value(self, v) for v in operation.inner_iter_args)
            )
            scf.yield_([self.word(v).raw for v in result or ()])
        return [Value(self, v) for v in operation.results]

    def while_loop(self, condition, body, carry):
        """`carry = body(*carry)` while `condition(*carry)` holds."""
        carry = [self.word(v).raw for v in carry]
        types = [v.type for v in carry]
        operation = scf.WhileOp(types, carry)
        before, after = operation.before.blocks.append(*types), operation.after.blocks.append(*types)
        with ir.InsertionPoint(before):
            values = list(before.arguments)
            scf.condition(condition(*(Value(self, v) for v in values)).raw, values)
        with ir.InsertionPoint(after):
            scf.yield_([self.word(v).raw for v in body(*(Value(self, v) for v in after.arguments))])
        return [Value(self, v) for v in operation.results]


def launch(
    body, out_type, rows, cluster, threads, shared_words, teams=1, machine_type=Machine, in_place=0
) -> typing.Any:
    """A kernel that runs `body(machine, *refs, row, rank)` in every thread of each row's team or cluster.

    Args:
      body: the kernel body.
      out_type: shapes and dtypes of the results.
      rows: number of rows; each is the work of one team or cluster.
      cluster: blocks that work on a row together.
      threads: threads of a team.
      shared_words: words of shared memory of a team.
      teams: teams of a block. With more than one, a team works on several rows in turn, and its machine's `turn` is the
        number of rows before the current one.
      machine_type: the class of the machine.
      in_place: how many of the arguments, the last ones, `body` also writes to. They come back behind the results, and
        are copied only if the caller still uses what they were.
    """
    blocks = rows if teams == 1 else min(rows, MULTIPROCESSORS)

    def kernel(*refs):
        *refs, shared = refs

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (len(refs) + 1) + (plgpu.Layout.WG_SPLAT,) * 2)
        def run(_, *args):
            *args, shared, block, rank = args
            machine = machine_type(threads, cluster, shared, teams, shared_words)
            block, rank = (Value(machine, v.registers.item()) for v in (block, rank))
            if teams == 1:
                body(machine, *args, block, rank)
                return
            start, stride = machine.team * blocks + block, blocks * teams

            def run_row(row):
                machine.turn = (row - start) // stride
                body(machine, *args, row, rank)
                machine.barrier()

            machine.loop(start, rows, stride, run_row)

        rank = lax.axis_index("part") if cluster > 1 else jnp.int32(0)
        run(*refs, shared, lax.axis_index("block"), rank)

    clustered = {"cluster": (cluster,), "cluster_names": ("part",)} if cluster > 1 else {}
    where = {"grid": (blocks,), "grid_names": ("block",), "num_threads": teams * threads // 128}
    where |= {"thread_name": "warpgroup", **clustered}
    scratch = [plgpu.SMEM((teams * shared_words,), jnp.int32)]
    parameters = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    if not in_place:
        return plgpu.kernel(kernel, out_type=out_type, scratch_types=scratch, compiler_params=parameters, **where)

    # `plgpu.kernel` takes no arrays that are written.
    def with_scratch(*refs):
        pl.run_scoped(functools.partial(kernel, *refs), *scratch, collective_axes="warpgroup")

    call: typing.Any = pl.kernel(
        with_scratch, out_type=out_type, mesh=plgpu.Mesh(**where), compiler_params=parameters, name="kernel"
    )

    def run(*arrays):
        written = [jax.new_ref(x) for x in arrays[-in_place:]]
        results = call(*arrays[:-in_place], *written)
        return (*results, *(jax.freeze(ref) for ref in written))

    return run
