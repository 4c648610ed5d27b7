"""A NumPy machine that runs kernels for a TPU's vector subcores, which Pallas does not interpret.

It evaluates the traced kernel once for each subcore, those of one core at a time. Memory begins with random bits. A
copy moves its data when it is waited for. Loops whose turns are independent take them in a random order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src.pallas.mosaic import sc_core
from jax._src.state import indexing
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu_sc as plsc


@dataclasses.dataclass(frozen=True)
class SubcoreInfo:
    """What a kernel asks for: the same fields as the class that `get_sparse_core_info` returns."""

    num_cores: int
    num_subcores: int
    num_lanes: int
    vmem_capacity_bytes: int


@contextlib.contextmanager
def simulated_subcores(info: SubcoreInfo):
    """Kernels of `pl.kernel` run on a machine with these subcores."""

    def kernel(body, *, out_type, mesh, scratch_types, **_):
        def call(*arrays):
            traced = jax.make_jaxpr(real(body, out_type=out_type, mesh=mesh, scratch_types=scratch_types))(*arrays)
            [equation] = traced.jaxpr.eqns
            [program] = equation.params["jaxprs"]

            def run(*arrays):
                out = np.empty(out_type.shape, out_type.dtype)
                _run(program, info, [np.asarray(x) for x in arrays], out)
                return out

            return jax.pure_callback(run, jax.ShapeDtypeStruct(out_type.shape, out_type.dtype), *arrays)

        return call

    real = pl.kernel
    with (
        mock.patch.object(sc_core, "get_sparse_core_info", lambda: info),
        mock.patch.object(plsc, "get_sparse_core_info", lambda: info),
        mock.patch.object(pl, "kernel", kernel),
    ):
        yield


def _run(program, info, arrays, out):
    rng = np.random.default_rng(0)
    for core in range(info.num_cores):
        spaces = [str(variable.aval.memory_space) for variable in program.invars]
        shared = {i: _memory(rng, program.invars[i].aval) for i, space in enumerate(spaces) if space == "vmem_shared"}
        barrier, failures = threading.Barrier(info.num_subcores), []

        def work(subcore, core=core, spaces=spaces, shared=shared, barrier=barrier, failures=failures):
            machine = _Subcore({"core": core, "subcore": subcore}, barrier, np.random.default_rng(subcore))
            given = [*arrays, out]
            for i in range(len(given), len(spaces)):
                given.append(shared[i] if i in shared else machine.allocate(program.invars[i].aval))
            try:
                with np.errstate(all="ignore"):
                    machine.evaluate(program, given)
            except BaseException as error:
                failures.append(error)
                barrier.abort()

        threads = [threading.Thread(target=work, args=(subcore,)) for subcore in range(info.num_subcores)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise next((e for e in failures if not isinstance(e, threading.BrokenBarrierError)), failures[0])


def _memory(rng, aval):
    return np.frombuffer(rng.bytes(4 * int(np.prod(aval.shape))), aval.dtype).reshape(aval.shape).copy()


class _Subcore:
    def __init__(self, place, barrier, rng):
        self.place, self.barrier, self.rng = place, barrier, rng

    def allocate(self, aval):
        if "semaphore" in str(aval.memory_space):
            semaphores = np.empty(aval.shape, object)
            for i in np.ndindex(semaphores.shape):
                semaphores[i] = []
            return semaphores
        return _memory(self.rng, aval)

    def evaluate(self, program, arguments, consts=None):
        values = dict(_literals(program))
        values |= zip(map(id, program.invars), arguments, strict=True)
        values |= zip(map(id, program.constvars), program.consts if consts is None else consts, strict=True)
        for equation, name, inputs, outputs in _steps(program):
            given = [values[atom] for atom in inputs]
            if name in _PURE:
                results = [_PURE[name](*given, **equation.params)]
            else:
                results = getattr(self, f"_{name}")(given, equation)
            for (variable, dtype, shape), result in zip(outputs, results or (), strict=True):
                result = np.asarray(result)
                assert result.shape == shape, (name, result.shape)
                values[variable] = result if result.dtype == dtype else result.astype(dtype)
        return [values[id(atom)] for atom in program.outvars]

    def _jit(self, inputs, equation):
        return self.evaluate(equation.params["jaxpr"], inputs)

    def _cond(self, inputs, equation):
        return self.evaluate(equation.params["branches"][int(inputs[0])], inputs[1:])

    def _scan(self, inputs, equation):
        """A loop over turns. It carries what it returns."""
        carried = len(inputs) - len(equation.outvars)
        consts, carry = inputs[:carried], inputs[carried:]
        for _ in range(equation.params["length"]):
            carry = self.evaluate(equation.params["jaxpr"], [*consts, *carry])
        return carry

    def _parallel_loop(self, inputs, equation):
        first, end, step, consts, carry = equation.params["tree"].unflatten(inputs)
        turns = np.arange(first, end, step, dtype=np.int32)
        for turn in turns if carry else self.rng.permutation(turns):
            carry = self.evaluate(equation.params["jaxpr"], [*consts, turn, *carry])
        return carry

    def _run_scoped(self, inputs, equation):
        body = equation.params["jaxpr"]
        return self.evaluate(body, [self.allocate(variable.aval) for variable in body.invars], inputs)

    def _axis_index(self, _, equation):
        return [np.int32(self.place[equation.params["axis_name"]])]

    def _barrier(self, *_):
        self.barrier.wait()

    def _get(self, inputs, equation):
        ref, *flat = inputs
        return [_view(ref, jax.tree.unflatten(equation.params["tree"], flat)).copy()]

    def _swap(self, inputs, equation):
        ref, new, *flat = inputs
        mask = flat.pop() if equation.params.get("has_mask") else np.ones(new.shape, bool)
        part = _view(ref, jax.tree.unflatten(equation.params["tree"], flat))
        old = part.copy()
        part[: mask.sum()] = new[mask]
        return [old]

    def _gather(self, inputs, equation):
        ref, transforms, [index], mask = equation.params["tree"].unflatten(inputs)
        assert not transforms and mask is None and (index >= 0).all() and (index < ref.size).all()
        return [ref[index]]

    def _scatter(self, inputs, equation):
        ref, transforms, [index], new, mask = equation.params["tree"].unflatten(inputs)
        mask = np.ones(index.shape, bool) if mask is None else mask
        assert not transforms and (index[mask] >= 0).all() and (index[mask] < ref.size).all()
        # No two lanes may have one address.
        assert len(set(index[mask])) == mask.sum()
        ref[index[mask]] = new[mask] + (ref[index[mask]] if equation.params["add"] else 0)

    def _dma_start(self, inputs, equation):
        source, target, semaphore, *_ = _copied(inputs, equation)
        semaphore[()].append((source, target))

    def _dma_wait(self, inputs, equation):
        _, target, semaphore, *_ = _copied(inputs, equation)
        [(source, own_target)] = semaphore[()]
        assert own_target.size == target.size
        own_target[...] = source
        semaphore[()].clear()


@functools.cache
def _steps(program):
    """Of each equation: itself, its primitive's name, its inputs, and its outputs with their dtypes and shapes."""

    def outputs(equation):
        return [(id(x), getattr(x.aval, "dtype", None), getattr(x.aval, "shape", None)) for x in equation.outvars]

    return [(eqn, eqn.primitive.name, list(map(id, eqn.invars)), outputs(eqn)) for eqn in program.eqns]


@functools.cache
def _literals(program):
    atoms = [atom for equation in program.eqns for atom in equation.invars] + program.outvars
    return {id(atom): np.asarray(atom.val, atom.aval.dtype) for atom in atoms if hasattr(atom, "val")}


def _copied(inputs, equation):
    """Source, target and semaphore of a copy, as views."""
    references = equation.params["tree"].unflatten(inputs)
    return [_view(x.ref, x.transforms) if hasattr(x, "transforms") else x for x in references if x is not None]


def _view(array, transforms):
    for transform in transforms:
        assert isinstance(transform, indexing.NDIndexer)
        index: list[Any] = []
        for size, one in zip(array.shape, transform.indices, strict=True):
            if isinstance(one, pl.Slice):
                assert one.stride == 1
                index.append(slice(int(one.start), int(one.start) + one.size))
                assert index[-1].start >= 0 and index[-1].stop <= size
            else:
                index.append(int(one))
                assert 0 <= index[-1] < size
        array = array[(*index, ...)]  # The dots keep a view where nothing else is left.
    return array


def _broadcast(x, *, shape, broadcast_dimensions, **_):
    assert x.ndim == len(broadcast_dimensions) == 0 or x.shape == shape
    return np.broadcast_to(x, shape)


def _masked_cumsum(x, mask):
    assert mask.all()
    return np.cumsum(x, dtype=x.dtype)


_PURE = {
    "add": lambda a, b, **_: a + b,
    "sub": lambda a, b, **_: a - b,
    "mul": lambda a, b, **_: a * b,
    "div": lambda a, b, **_: a // b if (a >= 0).all() else 1 // 0,
    "rem": lambda a, b, **_: a % b if (a >= 0).all() else 1 // 0,
    "max": lambda a, b, **_: np.maximum(a, b),
    "min": lambda a, b, **_: np.minimum(a, b),
    "and": lambda a, b, **_: a & b,
    "or": lambda a, b, **_: a | b,
    "not": lambda a, **_: ~a,
    "lt": lambda a, b, **_: a < b,
    "le": lambda a, b, **_: a <= b,
    "gt": lambda a, b, **_: a > b,
    "eq": lambda a, b, **_: a == b,
    "shift_left": lambda a, b, **_: a << b,
    "shift_right_arithmetic": lambda a, b, **_: a >> b,
    "select_n": lambda which, a, b, **_: np.where(which, b, a),
    "convert_element_type": lambda x, new_dtype, **_: np.asarray(x).astype(new_dtype),
    "bitcast_convert_type": lambda x, new_dtype, **_: x.view(new_dtype),
    "broadcast_in_dim": _broadcast,
    "multiple_of": lambda x, values: x if x % values[0] == 0 else 1 // 0,
    "iota": lambda shape, **_: np.arange(shape[0], dtype=np.int32),
    "slice": lambda x, start_indices, limit_indices, **_: x[start_indices[0] : limit_indices[0]],
    "squeeze": lambda x, dimensions, **_: np.squeeze(x, dimensions),
    "reduce_sum": lambda x, **_: np.sum(x, dtype=x.dtype),
    "reduce_max": lambda x, **_: np.max(x),
    "masked_cumsum": _masked_cumsum,
    "all_reduce_population_count": lambda x, **_: np.full(x.shape, x.sum()),
}
