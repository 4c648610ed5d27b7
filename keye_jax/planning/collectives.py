"""Collectives of a program: which, how many, and how much a device receives."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")
_PRIMITIVES = {
    "all_gather": "all-gather",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "ragged-all-to-all",
    "ppermute": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a program.

    Attributes:
      kind: XLA's name, "all-gather" and so on.
      count: how many there are.
      bytes_received: by one device, in all of them; of a ragged exchange at most.
    """

    kind: str
    count: int
    bytes_received: int


def _received(kind: str, held: float, devices: int) -> float:
    """Bytes that a device receives at least (ring) for a result, or of an exchange its operand, of `held` bytes."""
    if kind == "collective-permute":
        return held
    if kind == "reduce-scatter":
        return held * (devices - 1)
    return held * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


def _collected(each: Iterator[tuple[str, float, int]]) -> tuple[Collective, ...]:
    counts: dict[str, int] = dict.fromkeys(_KINDS, 0)
    sizes: dict[str, float] = dict.fromkeys(_KINDS, 0.0)
    for kind, received, times in each:
        counts[kind] += times
        sizes[kind] += received * times
    return tuple(Collective(kind, counts[kind], round(sizes[kind])) for kind in _KINDS if counts[kind])


def of_trace(program: Any, sizes: Mapping[str, int]) -> tuple[Collective, ...]:
    """The collectives that a traced program states; the compiler adds small ones where parts of arrays meet.

    Args:
      program: a jaxpr.
      sizes: of the mesh's axes.
    """
    return _collected(_traced(program, 1, sizes))


def _traced(program: Any, times: int, sizes: Mapping[str, int]) -> Iterator[tuple[str, float, int]]:
    for equation in program.eqns:
        kind = _PRIMITIVES.get(equation.primitive.name)
        if kind:
            axes = equation.params.get("axis_name") or equation.params.get("axes") or ()
            devices = math.prod(sizes[axis] for axis in ([axes] if isinstance(axes, str) else axes))
            arrays = equation.invars[:1] if kind == "ragged-all-to-all" else equation.outvars
            for array in arrays:
                yield kind, _received(kind, array.aval.size * array.aval.dtype.itemsize, devices), times
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            for item in value if isinstance(value, list | tuple) else [value]:
                body = getattr(item, "jaxpr", item)
                if hasattr(body, "eqns"):
                    yield from _traced(body, inner, sizes)


_INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\}|mesh\[([^\]]*)\] \{([^}]*)\})")
_AXIS = re.compile(r"'([^']+)'(?:=(\d+))?")


def of_program(text: str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, XLA's text of it. Those inside a loop count once."""
    return _collected(_compiled(text))


def _compiled(text: str) -> Iterator[tuple[str, float, int]]:
    for line in text.splitlines():
        found = _INSTRUCTION.search(line)
        if not found:
            continue
        result, kind, start = found.groups()
        # What starts an asynchronous collective also returns numbers that it waits by.
        arrays = [
            _DTYPE_BYTES.get(dtype, 4) * math.prod(int(side) for side in sides.split(",") if side)
            for dtype, sides in _SHAPE.findall(result)
            if sides or not start
        ]
        # And its operands before its results, but for a sum.
        held = sum(arrays[len(arrays) // 2 :] if start and kind != "all-reduce" else arrays)
        yield kind, _received(kind, held, _group_size(line)), 1


def _group_size(line: str) -> int:
    """How many devices take part in one exchange of a collective; of a permutation two."""
    groups = _GROUPS.search(line)
    if groups is None:
        return 2
    size, members, mesh, axes = groups.groups()
    if mesh is not None:
        sizes = {axis: int(size) for axis, size in _AXIS.findall(mesh)}
        return math.prod(sizes[axis] for axis, _ in _AXIS.findall(axes))
    return int(size) if size else len(members.split(","))
