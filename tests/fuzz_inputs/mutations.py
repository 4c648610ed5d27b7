"""Damage to the bytes of a file."""

from __future__ import annotations

import random
import re
import zlib

# Bytes. No mutation makes a file longer than this.
LIMIT = 1 << 20
# What sizes, counts and times overflow at, and sides of pictures that are large but allowed.
_EXTREMES = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFE,
    0xFFFFFFFF,
    2000,
    13_000,
)
_PNG = b"\x89PNG\r\n\x1a\n"
_NAMES = re.compile(rb"[A-Za-z0-9 ]{4}")


def truncated(rng: random.Random, data: bytearray, other: bytes) -> None:
    del data[_place(rng, data) :]


def headless(rng: random.Random, data: bytearray, other: bytes) -> None:
    del data[: rng.randrange(min(len(data), 256))]


def flipped_bits(rng: random.Random, data: bytearray, other: bytes) -> None:
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def random_bytes(rng: random.Random, data: bytearray, other: bytes) -> None:
    for _ in range(rng.choice((1, 2, 4, 16, 64))):
        data[_place(rng, data)] = rng.randrange(256)


def zeros(rng: random.Random, data: bytearray, other: bytes) -> None:
    start, stop = _block(rng, data)
    data[start:stop] = bytes(stop - start)


def noise(rng: random.Random, data: bytearray, other: bytes) -> None:
    start, stop = _block(rng, data)
    data[start:stop] = rng.randbytes(stop - start)


def removed_block(rng: random.Random, data: bytearray, other: bytes) -> None:
    start, stop = _block(rng, data)
    del data[start:stop]


def inserted_block(rng: random.Random, data: bytearray, other: bytes) -> None:
    place = _place(rng, data)
    data[place:place] = rng.randbytes(rng.choice((1, 2, 3, 4, 8, 64, 1000)))


def repeated_block(rng: random.Random, data: bytearray, other: bytes) -> None:
    start, stop = _block(rng, data)
    data[start:start] = data[start:stop] * rng.choice((1, 2, 8, 100))


def swapped_blocks(rng: random.Random, data: bytearray, other: bytes) -> None:
    length = min(rng.choice((1, 2, 4, 8, 64, 512)), len(data) // 2)
    first, second = sorted(rng.randrange(len(data) - length + 1) for _ in range(2))
    if first + length <= second:
        left, right = data[first : first + length], data[second : second + length]
        data[first : first + length], data[second : second + length] = right, left


def huge_numbers(rng: random.Random, data: bytearray, other: bytes) -> None:
    for _ in range(rng.choice((1, 1, 2, 4))):
        _write_number(rng, data, _place(rng, data))


def box_sizes(rng: random.Random, data: bytearray, other: bytes) -> None:
    """Writes numbers where the sizes of boxes, chunks and elements stand: before and after their names."""
    names = [match.start() for match in _NAMES.finditer(data)]
    for place in rng.choices(names, k=rng.choice((1, 1, 2, 4))) if names else ():
        _write_number(rng, data, rng.choice((place - 4, place + 4, place + 8)), size=4)


def joined(rng: random.Random, data: bytearray, other: bytes) -> None:
    data += other


def grafted(rng: random.Random, data: bytearray, other: bytes) -> None:
    """The start of one file and the end of another."""
    data[_place(rng, data) :] = other[rng.randrange(len(other)) :]


MUTATIONS = (
    *(truncated, headless, flipped_bits, random_bytes, zeros, noise, removed_block, inserted_block, repeated_block),
    *(swapped_blocks, huge_numbers, huge_numbers, box_sizes, box_sizes, joined, grafted),
)


def mutate(rng: random.Random, data: bytes, other: bytes) -> tuple[bytes, str]:
    """Damages `data` in one to three ways, and says which; `other` is a second file, to mix in."""
    result, names = bytearray(data), []
    for mutation in rng.choices(MUTATIONS, k=rng.choice((1, 1, 2, 3))):
        if len(result) < 2:
            break
        mutation(rng, result, other)
        names.append(mutation.__name__.replace("_", " "))
    if result.startswith(_PNG) and rng.random() < 0.8:
        _repair_checksums(result)
    return bytes(result[:LIMIT]), ", ".join(names)


def _repair_checksums(data: bytearray) -> None:
    """Makes the checksums of a PNG file right, so that decoders see what was done to its chunks."""
    start = len(_PNG)
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        if end + 4 > len(data):
            return
        data[end : end + 4] = zlib.crc32(data[start + 4 : end]).to_bytes(4, "big")
        start = end + 4


def _place(rng: random.Random, data: bytearray) -> int:
    """An index into `data`, more often near its start or its end, where headers and indices are."""
    near = min(len(data), 512)
    return rng.choice((rng.randrange(len(data)), rng.randrange(near), len(data) - 1 - rng.randrange(near)))


def _block(rng: random.Random, data: bytearray) -> tuple[int, int]:
    start = _place(rng, data)
    return start, min(len(data), start + rng.choice((1, 4, 16, 100, 1000, 10_000)))


def _write_number(rng: random.Random, data: bytearray, place: int, size: int | None = None) -> None:
    size = size or rng.choice((2, 4, 4, 8))
    place = min(max(0, place), len(data) - 1)
    value = rng.choice((*_EXTREMES, rng.getrandbits(8 * size), (1 << 8 * size) - 1, (1 << 8 * size - 1) - 1))
    number = (value % (1 << 8 * size)).to_bytes(size, rng.choice(("big", "little")))
    data[place : place + size] = number[: len(data) - place]
