"""Digits and letters of the generated world, drawn as strokes."""

from __future__ import annotations

import functools
import itertools

import numpy as np

CELL = 28
"""Side of a glyph's cell in pixels: the glyphs of a text stand one token apart."""

# Strokes between points (x, y) of a grid of 3 x 5, y downwards. A stroke is a chain of points.
_STROKES = {
    "0": "00 20 24 04 00",
    "1": "01 10 14, 04 24",
    "2": "00 20 22 02 04 24",
    "3": "00 20 24 04, 02 22",
    "4": "00 02 22, 20 24",
    "5": "20 00 02 22 24 04",
    "6": "20 00 04 24 22 02",
    "7": "00 20 13 14",
    "8": "00 20 24 04 00, 02 22",
    "9": "22 02 00 20 24 04",
    ":": "11 11, 13 13",
    "a": "04 01 10 21 24, 02 22",
    "b": "00 04 14 23 12 02, 12 21 10 00",
    "c": "20 00 04 24",
    "d": "00 04 14 23 21 10 00",
    "e": "20 00 04 24, 02 12",
    "f": "20 00 04, 02 12",
    "g": "20 00 04 24 22 12",
    "h": "00 04, 20 24, 02 22",
    "i": "10 14, 00 20, 04 24",
    "k": "00 04, 20 02 24",
    "l": "00 04 24",
    "m": "04 00 12 20 24",
    "n": "04 00 24 20",
    "o": "10 21 23 14 03 01 10",
    "p": "04 00 20 22 02",
    "r": "04 00 20 22 02, 12 24",
    "s": "20 00 02 22 24 04",
    "t": "00 20, 10 14",
    "u": "00 04 24 20",
    "v": "00 14 20",
    "w": "00 04 12 24 20",
}
_LEFT, _TOP, _STEP_X, _STEP_Y = 7.5, 4.0, 6.5, 5.0
_PEN = 1.9
"""Half the width of a stroke, in pixels."""

GLYPHS = "".join(_STROKES)
"""Characters that there are; a glyph's number is its place here."""


@functools.lru_cache
def atlas(scale: int) -> np.ndarray:
    """How much of each pixel a glyph covers, float32 [glyphs, scale * CELL, scale * CELL], from 0 to 1."""
    middles = (np.arange(scale * CELL) + 0.5) / scale
    x, y = np.meshgrid(middles, middles)
    drawn = []
    for strokes in _STROKES.values():
        nearest = np.full(x.shape, np.inf)
        for stroke in strokes.split(", "):
            chain = [(_LEFT + _STEP_X * int(px), _TOP + _STEP_Y * int(py)) for px, py in stroke.split()]
            for (ax, ay), (bx, by) in itertools.pairwise(chain):
                length = max((bx - ax) ** 2 + (by - ay) ** 2, 1e-9)
                along = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length, 0, 1)
                nearest = np.minimum(nearest, np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)))
        drawn.append(np.clip(0.5 + scale * (_PEN - nearest), 0, 1))
    return np.array(drawn, np.float32)


def glyph_numbers(text: str) -> list[int]:
    """Numbers of the glyphs of a text."""
    return [GLYPHS.index(character) for character in text]
