"""A NumPy machine that runs per-thread kernel bodies, all threads of a cluster in lockstep."""

import contextlib
import time

import jax
import ml_dtypes
import numpy as np

from pallas_kernels.gpu.simt import Value

U32 = np.uint32

MEMORIES: dict[tuple[int, int], np.ndarray] = {}
"""What GPUs write to each other, by the low and the high half of its address."""


class NumpyMachine:
    """Same methods as `pallas_kernels.gpu.machine.Machine`. Reads outside an array by an active thread raise."""

    def __init__(self, threads, cluster, shared_words, seed=0):
        self.threads, self.cluster, self.teams = threads, cluster, 1
        lanes = np.arange(threads * cluster)
        self.block = lanes // threads
        self.memory = np.random.default_rng(seed).integers(0, 1 << 32, (cluster, shared_words), dtype=U32)
        self.active = np.ones(lanes.size, bool)
        self.thread = self._value(lanes % threads)
        self.lane, self.warp = self.thread & 31, self.thread >> 5
        self.rank = self._value(self.block)
        self.batch, self.copies = np.zeros(lanes.size, int), []

    def _value(self, raw):
        raw = np.asarray(raw)
        return Value(self, raw if raw.dtype == bool else raw.astype(U32))

    def word(self, value):
        return (
            value if isinstance(value, Value) else self._value(np.full(self.active.size, value, np.int64) & 0xFFFFFFFF)
        )

    def binary(self, name, a, b):
        a, b = a.raw, self.word(b).raw

        def wide(v):
            return v.astype(np.int64)

        with np.errstate(all="ignore"):
            match name:
                case "add":
                    r = a + b
                case "sub":
                    r = a - b
                case "mul":
                    r = a * b
                case "div":
                    r = a // np.maximum(b, 1)
                case "and":
                    r = a & b
                case "or":
                    r = a | b
                case "xor":
                    r = a ^ b
                case "shl":
                    assert (b[self.active] < 32).all()
                    r = wide(a) << wide(np.minimum(b, 31)) & 0xFFFFFFFF
                case "shr":
                    assert (b[self.active] < 32).all()
                    r = a >> np.minimum(b, 31)
                case "sar":
                    r = a.astype(np.int32) >> b.astype(np.int32)
                case _:
                    raise ValueError(name)
        return self._value(r.view(U32) if r.dtype == np.int32 else r)

    def compare(self, name, a, b):
        a, b = a.raw, self.word(b).raw
        return self._value({"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "eq": a == b, "ne": a != b}[name])

    def select(self, condition, a, b):
        return self._value(np.where(condition.raw, self.word(a).raw, self.word(b).raw))

    def leading_zeros(self, a):
        return self._value(np.array([32 - int(x).bit_length() for x in a.raw]))

    def bit_count(self, a):
        return self._value(np.bitwise_count(a.raw))

    def square_root(self, a):
        return self._value(np.sqrt(a.raw.astype(np.float32)).astype(np.int64))

    def row(self, ref, index, size):
        return ref.reshape(-1, size), self.word(index).raw

    def load_global(self, row, index):
        array, rows = row
        index = self.word(index).raw.astype(np.int64)
        assert (index[self.active] < array.shape[1]).all(), "read outside a row"
        return self._value(array[np.where(self.active, rows, 0), np.minimum(index, array.shape[1] - 1)])

    def load_global4(self, row, index):
        assert (self.word(index).raw[self.active] % 4 == 0).all()
        return [self.load_global(row, index + i) for i in range(4)]

    def load_global4_in_order(self, row, index):
        return self.load_global4(row, index)

    def copy_shared4(self, address, row, index, condition):
        with self.when(condition):
            lanes, where, words = np.flatnonzero(self.active), self._where(address), self.load_global4(row, index)
            assert (where[lanes] % 4 == 0).all()
            for i, word in enumerate(words):
                self.copies.append((lanes, self.batch[lanes], where[lanes] + i, word.raw[lanes]))
                self.memory[self.block[lanes], where[lanes] + i] = 0xFFFFFFFF  # A read before the wait finds this.

    def commit_copies(self):
        self.batch[self.active] += 1

    def wait_copies(self, pending):
        left = []
        for lanes, batch, where, words in self.copies:
            done = self.active[lanes] & (batch < self.batch[lanes] - pending)
            self.memory[self.block[lanes[done]], where[done]] = words[done]
            if not done.all():
                left.append((lanes[~done], batch[~done], where[~done], words[~done]))
        self.copies = left

    def store_global(self, row, index, value):
        array, rows = row
        at = self.active
        array[rows[at], self.word(index).raw[at]] = self.word(value).raw[at]

    def store_global4(self, row, index, values):
        assert (self.word(index).raw[self.active] % 4 == 0).all()
        for i, value in enumerate(values):
            self.store_global(row, index + i, value)

    def store_global_where(self, row, index, value, condition):
        with self.when(condition):
            self.store_global(row, index, value)

    def _where(self, address):
        address = self.word(address).raw.astype(np.int64)
        assert (address[self.active] < self.memory.shape[1]).all()
        return np.minimum(address, self.memory.shape[1] - 1)

    def load_shared(self, address):
        return self._value(self.memory[self.block, self._where(address)])

    def load_shared_behind(self, address, words):
        return self.load_shared(address + words)

    def load_shared_vector(self, address, size):
        assert (self.word(address).raw[self.active] % size == 0).all()
        return [self.load_shared(address + i) for i in range(size)]

    def store_shared(self, address, value):
        at = self.active
        self.memory[self.block[at], self._where(self.word(address))[at]] = self.word(value).raw[at]

    def address_of(self, address):
        return self.word(address) * 4

    def store_pair_where(self, byte_address, a, b, condition):
        with self.when(condition):
            self.store_shared_vector(byte_address >> 2, [a, b])

    def store_shared_vector(self, address, values):
        assert (self.word(address).raw[self.active] % len(values) == 0).all()
        for i, value in enumerate(values):
            self.store_shared(address + i, value)

    def count_shared(self, address, condition):
        with self.when(condition):
            self.add_shared(address, 1)

    def add_shared(self, address, value):
        at = self.active
        np.add.at(self.memory, (self.block[at], self._where(address)[at]), self.word(value).raw[at])

    def max_shared(self, address, value):
        at = self.active
        np.maximum.at(self.memory, (self.block[at], self._where(address)[at]), self.word(value).raw[at])

    def fetch_add_shared(self, address, value):
        where, value, before = self._where(address), self.word(value).raw, np.zeros(self.active.size, U32)
        for lane in np.flatnonzero(self.active):
            before[lane] = self.memory[self.block[lane], where[lane]]
            self.memory[self.block[lane], where[lane]] += value[lane]
        return self._value(before)

    def or_shared_where(self, address, value, condition):
        with self.when(condition):
            at = self.active
            np.bitwise_or.at(self.memory, (self.block[at], self._where(address)[at]), self.word(value).raw[at])

    def add_first(self, address, value):
        self.add_peer(address, 0, value)

    def _peer(self, rank):
        rank = self.word(rank).raw
        assert (rank[self.active] < self.cluster).all()
        return np.minimum(rank, self.cluster - 1)

    def add_peer(self, address, rank, value):
        at = self.active
        np.add.at(self.memory, (self._peer(rank)[at], self._where(address)[at]), self.word(value).raw[at])

    def fetch_add_peer(self, address, rank, value):
        where, value, before = self._where(address), self.word(value).raw, np.zeros(self.active.size, U32)
        for lane in np.flatnonzero(self.active):
            word = self._peer(rank)[lane], where[lane]
            before[lane] = self.memory[word]
            self.memory[word] += value[lane]
        return self._value(before)

    def store_peer(self, address, rank, value):
        at = self.active
        self.memory[self._peer(rank)[at], self._where(address)[at]] = self.word(value).raw[at]

    def store_peer_vector(self, address, rank, values):
        assert (self.word(address).raw[self.active] % len(values) == 0).all()
        for i, value in enumerate(values):
            self.store_peer(address + i, rank, value)

    def load_peer_vector(self, address, size, rank):
        assert (self.word(address).raw[self.active] % min(size, 4) == 0).all()
        return [self.load_peer(address + i, rank) for i in range(size)]

    def load_peer(self, address, rank):
        return self._value(self.memory[self._peer(rank), self._where(address)])

    def barrier(self):
        full = self.active.reshape(self.cluster, -1)
        assert (full.all(1) | ~full.any(1)).all(), "barrier in divergent code"

    def cluster_barrier(self):
        assert self.active.all() or not self.active.any(), "cluster barrier in divergent code"

    def _warps(self, value):
        warps = self.active.reshape(-1, 32)
        assert (warps.all(1) | ~warps.any(1)).all(), "shuffle in divergent code"
        return value.raw.reshape(-1, 32)

    def shuffle_up(self, value, distance):
        v = self._warps(value).copy()
        v[:, distance:] = v[:, :-distance].copy()
        return self._value(v.reshape(-1))

    def shuffle(self, value, lane):
        v, lane = self._warps(value), self._warps(self.word(lane)).astype(np.int64) & 31
        return self._value(np.take_along_axis(v, lane, 1).reshape(-1))

    def warp_min(self, value):
        return self._value(np.repeat(self._warps(value).min(1), 32))

    def warp_sum(self, value):
        return self._value(np.repeat(self._warps(value).sum(1, dtype=np.int64) & 0xFFFFFFFF, 32))

    def warp_max(self, value):
        return self._value(np.repeat(self._warps(value).max(1), 32))

    @contextlib.contextmanager
    def when(self, condition):
        saved = self.active
        self.active = saved & condition.raw
        yield
        self.active = saved

    def branch(self, condition, body, carry, otherwise=lambda *carry: carry):
        carry = [self.word(v) for v in carry]
        results = []
        for taken, run in ((condition.raw, body), (~condition.raw, otherwise)):
            if (self.active & taken).any():
                with self.when(self._value(taken)):
                    results.append((self._value(taken), run(*carry)))
        for taken, new in results:
            carry = [self.select(taken, n, c) for n, c in zip(new, carry, strict=True)]
        return carry

    def loop(self, start, stop, step, body, carry=()):
        i, stop = self.word(start), self.word(stop)
        return self.while_loop(lambda i, *_: i < stop, lambda i, *c: [i + step, *(body(i, *c) or ())], [i, *carry])[1:]

    def while_loop(self, condition, body, carry):
        carry, saved = [self.word(v) for v in carry], self.active
        while True:
            going = condition(*carry).raw & self.active
            if not going.any():
                self.active = saved
                return carry
            self.active = going
            keep = self._value(going)
            carry = [self.select(keep, n, c) for n, c in zip(body(*carry), carry, strict=True)]


class NumpyTensorMachine(NumpyMachine):
    """Same methods as `TensorMachine` of `pallas_kernels.gpu.tensor_machine`."""

    def float_op(self, name, *words):
        a, *rest = (self.word(w).raw.view(np.float32) for w in words)
        with np.errstate(all="ignore"):
            match name:
                case "add":
                    r = a + rest[0]
                case "mul":
                    r = a * rest[0]
                case "max":
                    r = np.fmax(a, rest[0])
                case "fma":
                    r = a * rest[0] + rest[1]
                case "div":
                    r = a / rest[0]
                case "exp2":
                    r = np.exp2(a)
                case "log2":
                    r = np.log2(a)
                case "rsqrt":
                    r = 1 / np.sqrt(a)
                case _:
                    raise ValueError(name)
        return self._value(r.astype(np.float32).view(U32))

    def round_up(self, number):
        return self._to_integer(np.ceil(self.word(number).raw.view(np.float32).astype(np.float64)))

    def round_nearest(self, number):
        return self._to_integer(np.rint(self.word(number).raw.view(np.float32).astype(np.float64)))

    def _to_integer(self, numbers):
        return self._value(np.clip(np.nan_to_num(numbers, nan=0.0, posinf=2**33), 0, 2**32 - 1).astype(np.int64))

    def to_float(self, integer):
        exact = self.word(integer).raw.astype(np.float64)
        near = exact.astype(np.float32)
        return self._value(np.where(near > exact, np.nextafter(near, np.float32(0)), near).view(U32))

    def pack_bfloat16(self, low, high):
        low, high = (
            self.word(w).raw.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16).astype(U32)
            for w in (low, high)
        )
        return self._value(low | high << U32(16))

    def pack_float8(self, *four):
        numbers = np.stack([self.word(w).raw.view(np.float32) for w in four], 1)
        return self._value(np.clip(numbers, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(U32)[:, 0])

    def halves(self, low, high, which):
        shift = U32(16 * which)
        return self._value((low.raw >> shift & U32(0xFFFF)) | (high.raw >> shift & U32(0xFFFF)) << U32(16))

    def multiply_bfloat16(self, a, b):
        a, b = (np.ascontiguousarray(self.word(w).raw).view(ml_dtypes.bfloat16).astype(np.float32) for w in (a, b))
        return self._value((a * b).astype(ml_dtypes.bfloat16).view(U32))

    def subtract_bfloat16(self, a, b):
        a, b = (np.ascontiguousarray(self.word(w).raw).view(ml_dtypes.bfloat16).astype(np.float32) for w in (a, b))
        return self._value((a - b).astype(ml_dtypes.bfloat16).view(U32))

    def permute(self, low, high, selector):
        choices = np.stack([self.word(w).raw for w in (low, high)], 1).view(np.uint8)
        places = self.word(selector).raw[:, None] >> np.arange(0, 16, 4, dtype=U32) & U32(15)
        assert (places < 8).all()
        return self._value(np.take_along_axis(choices, places.astype(np.int64), 1).view(U32)[:, 0])

    def multiply_tiles(self, a, b, c):
        a, b, c = ([self._warps(self.word(w)) for w in words] for words in (a, b, c))
        g, t = np.arange(32) // 4, np.arange(32) % 4
        left, right = np.zeros((len(c[0]), 16, 16), np.float32), np.zeros((len(c[0]), 16, 8), np.float32)
        sums = np.zeros((len(c[0]), 16, 8), np.float32)
        for half in range(2):

            def number(words, half=half):
                return (words >> U32(16 * half) << U32(16)).view(np.float32)

            for i, words in enumerate(a):
                left[:, g + i % 2 * 8, 2 * t + half + i // 2 * 8] = number(words)
            for i, words in enumerate(b):
                right[:, 2 * t + half + i * 8, g] = number(words)
        for i, words in enumerate(c):
            sums[:, g + i // 2 * 8, 2 * t + i % 2] = words.view(np.float32)
        with np.errstate(all="ignore"):
            sums += left @ right
        return [
            self._value(np.ascontiguousarray(sums[:, g + i // 2 * 8, 2 * t + i % 2]).reshape(-1).view(U32))
            for i in range(4)
        ]

    def load_global4_where(self, row, index, condition):
        with self.when(condition):
            words = self.load_global4(row, index)
        return [self.select(condition, word, 0) for word in words]

    def load_global_pair(self, row, index):
        assert (self.word(index).raw[self.active] % 2 == 0).all()
        return [self.load_global(row, index + i) for i in range(2)]

    def load_global_now(self, row, index, size):
        return self.load_global4(row, index) if size == 4 else [self.load_global(row, index)]

    def row_at(self, low, high):
        (address,) = {*zip(low.raw.tolist(), high.raw.tolist(), strict=True)}
        return MEMORIES[address].reshape(1, -1), self.word(0).raw

    def send4(self, row, index, words, flag):
        for i, word in enumerate(words):
            self.store_global(row, index + 2 * i, word)
            self.store_global(row, index + 2 * i + 1, flag)

    def receive4(self, row, index, flag):
        """Waits for a thread of Python that simulates the other GPU."""
        for _ in range(10_000):
            flags = [self.load_global(row, index + i).eq(flag).raw[self.active].all() for i in (1, 3, 5, 7)]
            if all(flags):
                return [self.load_global(row, index + i) for i in (0, 2, 4, 6)]
            time.sleep(0.001)
        raise TimeoutError("nothing was sent")

    def store_global_pair(self, row, index, a, b):
        assert (self.word(index).raw[self.active] % 2 == 0).all()
        self.store_global(row, index, a)
        self.store_global(row, index + 1, b)

    def shuffle_xor(self, value, mask):
        return self.shuffle(value, self.lane ^ mask)

    def ballot(self, condition):
        bits = self._warps(condition).astype(U32) << np.arange(32, dtype=U32)
        return self._value(np.repeat(bits.sum(1, dtype=U32), 32))


def numpy_launch(body, out_type, rows, cluster, threads, shared_words, machine_type=None, in_place=0):
    """As `pallas_kernels.gpu.machine.launch`, but a `NumpyTensorMachine` runs each cluster after the other."""
    results = out_type if isinstance(out_type, tuple) else (out_type,)
    run = numpy_run(body, out_type, rows, cluster, threads, shared_words, machine_type, in_place)

    def call(*arrays):
        written = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[len(arrays) - in_place :]]
        found = jax.pure_callback(run, (*results, *written), *arrays)
        return found if isinstance(out_type, tuple) else found[0]

    return call


def numpy_run(body, out_type, rows, cluster, threads, shared_words, machine_type=None, in_place=0):
    """As `numpy_launch`, but what it returns is no function of JAX, and always gives a tuple."""
    del machine_type
    results = out_type if isinstance(out_type, tuple) else (out_type,)

    def run(*arrays):
        arrays = [np.array(x) for x in arrays]
        out = [np.full(x.shape, 7, x.dtype) for x in results]
        refs = [x.view(U32) for x in (*arrays, *out)]
        for block in range(rows):
            machine = NumpyTensorMachine(threads, cluster, shared_words, block)
            body(machine, *refs, machine.word(block), machine.rank)
        return (*out, *arrays[len(arrays) - in_place :])

    return run
