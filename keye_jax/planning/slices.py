"""TPU slices that there are, and devices that stand in for theirs where a mesh is arranged without any.

Shapes are those of Google Cloud's TPU documentation, with the shortest side first, as it writes them.
"""

from __future__ import annotations

import dataclasses
import itertools

_FLAT_KINDS = ("v5e", "v6e")
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""Slices of these generations, whose chips lie in a plane."""

_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
"""Slices of v5p and tpu7x below a cube of 4x4x4; larger ones are made of cubes."""

_MOST_CHIPS = {"v5p": 6144, "tpu7x": 9216}
_KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "v5p": "TPU v5", "tpu7x": "TPU7x"}
_CORES = {"tpu7x": 2}


@dataclasses.dataclass(frozen=True)
class StandIn:
    """What arranging a mesh must know of a device. The attributes are those of a JAX device."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int
    device_kind: str
    platform: str = "tpu"


def sides_of(kind: str, topology: str) -> tuple[int, ...] | None:
    """The sides of a slice in chips, or None if there is no such slice of this generation."""
    small = _FLAT if kind in _FLAT_KINDS else _SMALL
    known = topology in small or (kind not in _FLAT_KINDS and _is_made_of_cubes(kind, topology))
    return tuple(map(int, topology.split("x"))) if known else None


def _is_made_of_cubes(kind: str, topology: str) -> bool:
    sides = topology.split("x")
    if len(sides) != 3 or not all(side.isdecimal() and side.isascii() and 0 < len(side) <= 3 for side in sides):
        return False
    a, b, c = map(int, sides)
    return topology == f"{a}x{b}x{c}" and 4 <= a <= b <= c and not (a | b | c) % 4 and a * b * c <= _MOST_CHIPS[kind]


def known_slices(kind: str) -> str:
    """The slices of a generation, for a message."""
    if kind in _FLAT_KINDS:
        return ", ".join(_FLAT)
    return f"{', '.join(_SMALL)}, or AxBxC of multiples of 4, A <= B <= C, at most {_MOST_CHIPS[kind]:,} chips"


def devices_of(kind: str, sides: tuple[int, ...]) -> int:
    """Devices of a slice as JAX counts them."""
    chips = 1
    for side in sides:
        chips *= side
    return chips * _CORES.get(kind, 1)


def stand_ins(kind: str, sides: tuple[int, ...], slices: int) -> list[StandIn]:
    """Devices with the places of those of `slices` slices. A host has 4 chips, or a whole flat slice of up to 8."""
    width, depth, height = (*sides, 1)[:3]
    chips = list(itertools.product(range(height), range(depth), range(width)))
    per_host = 8 if kind in _FLAT_KINDS and len(chips) <= 8 else 4
    cores = _CORES.get(kind, 1)
    hosts = -(-len(chips) // per_host)
    return [
        StandIn(
            id=(index * len(chips) + chip) * cores + core,
            process_index=index * hosts + chip // per_host,
            slice_index=index,
            coords=(x, y, z),
            core_on_chip=core,
            device_kind=_KINDS[kind],
        )
        for index in range(slices)
        for chip, (z, y, x) in enumerate(chips)
        for core in range(cores)
    ]
