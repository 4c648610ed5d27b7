"""Compiles and times cases."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import power
from pallas_kernels.bench.cases import BenchCase, TorchCall
from pallas_kernels.bench.timing import (
    Arguments,
    copies,
    device_seconds,
    median_seconds,
    number_of_calls,
    program,
    torch_seconds_per_call,
)
from pallas_kernels.errors import UnsupportedError

_PORTABLE_CALLS = 2
"""Most calls in one program of a candidate that is not accelerated: each may take very long."""

_FAST = ("mosaic_gpu", "cudnn", "cuDNN", "dsa", "scores")
"""Names of accelerated candidates."""

_SHORT_SECONDS = 1e-4
"""Below this, a call may be mostly launches, so the time on the device is measured too."""

_FAILURES = (NotImplementedError, ValueError, RuntimeError)


class Programs:
    """All programs of a run. They are compiled in parallel, before anything is timed."""

    def __init__(self, cases: Iterable[BenchCase]):
        self._futures: dict[Any, Future[Any]] = {}
        begin = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as self._pool:
            for case in cases:
                self._once(case.make, lambda case=case: jax.jit(case.make).lower(*_settings(case)).compile())
                specs = jax.eval_shape(case.make, *_settings(case))
                for name, function in case.candidates.items():
                    if not isinstance(function, TorchCall):
                        calls = _calls(case, name, specs)
                        self._once((function, calls, specs), self._compiler(program(function, calls), (specs,) * calls))
                if case.union:
                    self._once((case.union, specs), self._compiler(jax.jit(case.union), specs))
        taken = time.perf_counter() - begin
        print(f"{len(self._futures)} programs compiled in {taken:.0f} s", file=sys.stderr)

    def make(self, case: BenchCase) -> Arguments:
        """The arguments of a case."""
        return jax.block_until_ready(self._futures[case.make].result()(*_settings(case)))

    def union(self, case: BenchCase, arguments: Arguments) -> float | None:
        """The mean size of unions of selections, if the case has one."""
        return float(self._futures[case.union, _specs(arguments)].result()(*arguments)) if case.union else None

    def candidate(self, function: Callable[..., Any], calls: int, arguments: Arguments) -> Any:
        """The compiled program of `calls` calls of a candidate."""
        return self._futures[function, calls, _specs(arguments)].result()

    def _once(self, key: Any, compile: Callable[[], Any]) -> None:
        if key not in self._futures:
            self._futures[key] = self._pool.submit(compile)

    @staticmethod
    def _compiler(function: Any, specs: Any) -> Callable[[], Any]:
        takes_calls = bool(specs) and isinstance(specs[0], tuple)
        return lambda: (function.lower(specs) if takes_calls else function.lower(*specs)).compile()


def measure(
    case: BenchCase, programs: Programs, ceilings: dict[str, float | None], *, with_power: bool = False
) -> list[dict[str, Any]]:
    """Times the candidates of a case.

    Args:
      case: the measurement.
      programs: the compiled programs; they include those of `case`.
      ceilings: the machine's FLOP/s ("flops") and bytes per second ("bytes"); None if unknown.
      with_power: whether accelerated candidates are also run for the two seconds of `power.record`.

    Returns:
      A row for each candidate that supports the arguments. A candidate that fails has its reason in place of a time.
    """
    work, unit = (case.flops, "flops") if case.flops else (case.nbytes, "bytes")
    assert work is not None, case
    base: dict[str, Any] = {"operation": case.operation, "size": case.size, "unit": unit}
    try:
        arguments = programs.make(case)
        if case.union:
            base["union"] = programs.union(case, arguments)
    except _FAILURES as error:
        return [base | {"candidate": "inputs", "failed": _reason(error)}]
    rows, ceiling = [], ceilings[unit]
    for name, function in case.candidates.items():
        row: dict[str, Any] = base | {"candidate": name}
        calls = _calls(case, name, arguments)
        try:
            if isinstance(function, TorchCall):
                row["seconds"] = torch_seconds_per_call(function.function, *arguments, calls=calls)
            else:
                with_own_power = with_power and name in _FAST
                row |= _time(programs.candidate(function, calls, arguments), arguments, calls, case, with_own_power)
        except UnsupportedError:
            continue
        except _FAILURES as error:
            rows.append(row | {"failed": _reason(error)})
            continue
        rate = work / row["seconds"]
        rows.append(row | {"rate": rate} | ({"share_of_ceiling": rate / ceiling} if ceiling else {}))
    return rows


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def _time(compiled: Any, arguments: Arguments, calls: int, case: BenchCase, with_power: bool) -> dict[str, Any]:
    inputs = jax.block_until_ready(copies(arguments, calls))

    def run() -> Any:
        return compiled(inputs)

    times: dict[str, Any] = {"seconds": median_seconds(run) / calls}
    if case.floor_seconds < _SHORT_SECONDS and (found := device_seconds(run)):
        times["device_seconds"], times["launches"] = (x / calls for x in found)
    return times | (power.record(run) if with_power else {})


def _calls(case: BenchCase, name: str, specs: Any) -> int:
    calls = case.calls or number_of_calls(case.floor_seconds, specs)
    return calls if name in _FAST else min(calls, _PORTABLE_CALLS)


def _settings(case: BenchCase) -> tuple[jax.Array, ...]:
    return tuple(jnp.int32(x) for x in case.settings)


def _specs(arguments: Arguments) -> Arguments:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments)
