"""Draws scenes, with NumPy or in a jitted function of JAX: one code for both.

A scene is drawn from arrays of fixed shapes, `SceneArrays`. Shapes are signed distances in pixels, so edges are
antialiased and nothing depends on the order of pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.train.shapes.glyphs import CELL, atlas, glyph_numbers
from keye_jax.train.shapes.scene import COLOURS, MOST_OBJECTS, MOST_SPANS, SHAPES, SIDE, Scene

# A NumPy or a JAX array.
type Array = Any

_NEVER = 1e9
_SLACK = 1e-3
"""Seconds. The times of frames and of events are equal only up to rounding."""

_OUTLINE = 2.0
_INK = (20.0, 20.0, 20.0)
_TEXT = (238.0, 238.0, 225.0)
_STRIP = CELL + 8
"""Height of the strips at the upper and lower edge in which the word and the clock lie, in pixels."""

_WORD_LEFT, _CLOCK_LEFT = (SIDE - 4 * CELL) // 2, (SIDE - 5 * CELL) // 2
_PLAIN_CLOCK = glyph_numbers("00:00")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SceneArrays:
    """Scenes as arrays, with a leading dimension of scenes if there are several.

    N is `MOST_OBJECTS`, K is `MOST_SPANS`, F the number of frames to draw. Places are in pixels of `SIDE`.

    Attributes:
      times: float32 [F], seconds.
      shape: int32 [N], index into `SHAPES`.
      radius, tilt: float32 [N], pixels and radians.
      centre, swing, speed, phase: float32 [N, 2], as of `Object`.
      shown: float32 [N, 2], seconds of the first and the last frame that shows the object.
      since: float32 [N, K], seconds from which it has each colour.
      colour: float32 [N, K, 3], RGB from 0 to 255.
      word: int32 [4], numbers of glyphs.
      word_shown: float32 [2], as `shown`.
      clock: float32, seconds.
      background: float32 [2, 3], RGB of the upper and the lower edge.
      offsets: int32 [2, 2], pixels (x, y) of the word and of the clock.
    """

    times: Array
    shape: Array
    radius: Array
    tilt: Array
    centre: Array
    swing: Array
    speed: Array
    phase: Array
    shown: Array
    since: Array
    colour: Array
    word: Array
    word_shown: Array
    clock: Array
    background: Array
    offsets: Array

    def __getitem__(self, scene: int | slice) -> SceneArrays:
        """One scene, or some of them."""
        return jax.tree.map(lambda array: array[scene], self)


_FLOATS = {
    "radius": (MOST_OBJECTS,),
    "tilt": (MOST_OBJECTS,),
    "centre": (MOST_OBJECTS, 2),
    "swing": (MOST_OBJECTS, 2),
    "speed": (MOST_OBJECTS, 2),
    "phase": (MOST_OBJECTS, 2),
    "shown": (MOST_OBJECTS, 2),
    "since": (MOST_OBJECTS, MOST_SPANS),
    "colour": (MOST_OBJECTS, MOST_SPANS, 3),
}


def scene_arrays(scenes: Sequence[Scene], times: Sequence[Sequence[float]] | None = None) -> SceneArrays:
    """Scenes as NumPy arrays, with a leading dimension.

    Args:
      times: seconds of the frames to draw, equally many of each scene; those that the model sees if left out.
    """
    count = len(scenes)
    shape = np.zeros((count, MOST_OBJECTS), np.int32)
    floats = {name: np.zeros((count, *dims), np.float32) for name, dims in _FLOATS.items()}
    floats["shown"][:] = _NEVER, -_NEVER
    floats["since"][:] = _NEVER
    floats["radius"][:] = 1
    for row, scene in enumerate(scenes):
        objects, stamps = scene.objects, scene.times
        here = slice(0, len(objects))
        shape[row, here] = [SHAPES.index(each.shape) for each in objects]
        for name in ("radius", "tilt", "centre", "swing", "speed", "phase"):
            floats[name][row, here] = [getattr(each, name) for each in objects]
        floats["shown"][row, here] = [(stamps[each.first], stamps[each.last]) for each in objects]
        for index, each in enumerate(objects):
            for number, span in enumerate(each.spans):
                floats["since"][row, index, number] = stamps[span.first]
                floats["colour"][row, index, number] = COLOURS[span.colour]
    return SceneArrays(
        times=np.array([scene.times for scene in scenes] if times is None else times, np.float32),
        shape=shape,
        **floats,
        word=np.array([glyph_numbers(scene.word) for scene in scenes], np.int32),
        word_shown=np.array([[scene.times[frame] for frame in scene.word_frames] for scene in scenes], np.float32),
        clock=np.array([scene.clock for scene in scenes], np.float32),
        background=np.array([scene.background for scene in scenes], np.float32),
        offsets=np.array([scene.offsets for scene in scenes], np.int32),
    )


def draw(xp: ModuleType, scene: SceneArrays, scale: int = 1) -> Array:
    """The frames of one scene.

    Args:
      xp: numpy, or jax.numpy in a function that may be jitted and mapped over scenes.
      scene: without a leading dimension.
      scale: pixels of a frame for one pixel of the scene.

    Returns:
      float32 [F, scale * SIDE, scale * SIDE, 3], RGB from 0 to 255.
    """
    side = scale * SIDE
    middles = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / np.float32(scale)
    height = (middles / np.float32(SIDE))[:, None, None]
    frames = scene.background[0] * (1 - height) + scene.background[1] * height  # [side, 1, 3]
    frames = xp.broadcast_to(frames, (len(scene.times), side, side, 3))
    times = scene.times[:, None, None]
    if xp is np:
        frames = frames.copy()
        for number in range(MOST_OBJECTS):
            _draw_where_seen(frames, scene, number, middles, scale)
    else:
        for number in range(MOST_OBJECTS):
            frames = _draw_object(xp, frames, scene, number, scene.times, middles, middles, scale)

    word = xp.broadcast_to(scene.word, (len(scene.times), 4))
    visible = (scene.word_shown[0] - _SLACK <= times) & (times <= scene.word_shown[1] + _SLACK)
    left, top = scene.offsets[0, 0] + _WORD_LEFT, scene.offsets[0, 1] + 3
    upper = _write(xp, frames[:, : scale * _STRIP], word, left, top, visible, scale)
    seconds = xp.floor(scene.clock + scene.times).astype(np.int32)
    minutes, seconds = seconds // 60, seconds % 60
    clock = xp.stack([minutes // 10, minutes % 10, 0 * minutes, seconds // 10, seconds % 10], axis=1)
    clock = clock + np.array(_PLAIN_CLOCK, np.int32)
    left, top = scene.offsets[1, 0] + _CLOCK_LEFT, scene.offsets[1, 1] + _STRIP - CELL - 3
    lower = _write(xp, frames[:, -scale * _STRIP :], clock, left, top, xp.ones_like(visible), scale)
    return xp.concatenate([upper, frames[:, scale * _STRIP : -scale * _STRIP], lower], axis=1)


def to_uint8(xp: ModuleType, frames: Array) -> Array:
    """Frames of `draw`, rounded, uint8."""
    return xp.clip(xp.floor(frames + np.float32(0.5)), 0, 255).astype(np.uint8)


_REACH = 1.4
"""No shape reaches farther than this from its centre, in its radius."""


def _draw_where_seen(frames: np.ndarray, scene: SceneArrays, number: int, middles: np.ndarray, scale: int) -> None:
    """Draws one object on frames [F, side, side, 3], and looks only at the part of them in which it is."""
    first, last = scene.shown[number]
    seen = np.flatnonzero((first - _SLACK <= scene.times) & (scene.times <= last + _SLACK))
    if not len(seen):
        return
    when = slice(seen[0], seen[-1] + 1)
    place = _place(np, scene, number, scene.times[when])
    reach = _REACH * scene.radius[number] + 2 * _OUTLINE
    columns, rows = (
        slice(*np.clip([scale * (each.min() - reach), scale * (each.max() + reach) + 1], 0, len(middles)).astype(int))
        for each in place.T
    )
    part = frames[when, rows, columns]
    part[...] = _draw_object(np, part, scene, number, scene.times[when], middles[columns], middles[rows], scale)


def _place(xp: ModuleType, scene: SceneArrays, number: int, times: Array) -> Array:
    """Where an object is at times [F], pixels [F, 2]."""
    return scene.centre[number] + scene.swing[number] * xp.sin(
        scene.speed[number] * times[:, None] + scene.phase[number]
    )


def _draw_object(
    xp: ModuleType,
    frames: Array,
    scene: SceneArrays,
    number: int,
    stamps: Array,
    columns: np.ndarray,
    rows: np.ndarray,
    scale: int,
) -> Array:
    """Frames [F, h, w, 3] at times [F] with one object on top; the middles of their pixels are at columns and rows."""
    place, times = _place(xp, scene, number, stamps), stamps[:, None, None]
    right = columns - place[:, 0, None, None]  # [F, 1, w]
    down = (rows - place[:, 1, None])[:, :, None]  # [F, h, 1]
    cos, sin = xp.cos(scene.tilt[number]), xp.sin(scene.tilt[number])
    radius = scene.radius[number]
    unit = _distance(xp, scene.shape[number], (right * cos + down * sin) / radius, (down * cos - right * sin) / radius)
    distance = unit * radius
    visible = (scene.shown[number, 0] - _SLACK <= times) & (times <= scene.shown[number, 1] + _SLACK)
    # The colour of the last span that has begun.
    begun = (scene.since[number] <= stamps[:, None] + _SLACK).sum(1) - 1
    colour = scene.colour[number][xp.maximum(begun, 0)][:, None, None]  # [F, 1, 1, 3]
    rim = xp.where(visible, xp.clip(0.5 - scale * (distance - _OUTLINE / 2), 0, 1), 0.0)[..., None]
    inner = xp.where(visible, xp.clip(0.5 - scale * (distance + _OUTLINE / 2), 0, 1), 0.0)[..., None]
    frames = frames * (1 - rim) + np.array(_INK, np.float32) * rim
    return frames * (1 - inner) + colour * inner


def _distance(xp: ModuleType, shape: Array, x: Array, y: Array) -> Array:
    """Signed distance to the edge of a shape of radius 1 around the origin, y downwards, of places x and y."""
    if xp is np:
        return _DISTANCES[int(shape)](xp, x, y).astype(np.float32)
    x, y = jnp.broadcast_arrays(x, y)
    return jax.lax.switch(shape, [lambda x, y, each=each: each(jnp, x, y) for each in _DISTANCES], x, y)


def _circle(xp: ModuleType, x: Array, y: Array) -> Array:
    return xp.sqrt(x * x + y * y) - 1


def _square(xp: ModuleType, x: Array, y: Array) -> Array:
    return xp.maximum(abs(x), abs(y)) - np.float32(0.88)


def _triangle(xp: ModuleType, x: Array, y: Array) -> Array:
    return xp.maximum(y - np.float32(0.75), np.float32(0.8944) * abs(x) - np.float32(0.4472) * y - np.float32(0.55))


def _cross(xp: ModuleType, x: Array, y: Array) -> Array:
    wide, long, across = np.float32(1.05), np.float32(0.36), xp.maximum(abs(x), abs(y))
    return xp.maximum(across - wide, xp.minimum(abs(x), abs(y)) - long)


def _star(xp: ModuleType, x: Array, y: Array) -> Array:
    # The pentagram's points lie inside of at least four of its five lines: the second largest distance counts.
    largest = second = None
    for number in range(5):
        angle = math.pi / 2 + 2 * math.pi * number / 5
        line = np.float32(math.cos(angle)) * x + np.float32(math.sin(angle)) * y - np.float32(0.4)
        if largest is None:
            largest, second = line, xp.full_like(line, -np.inf)
        else:
            second, largest = xp.maximum(second, xp.minimum(largest, line)), xp.maximum(largest, line)
    return second


def _diamond(xp: ModuleType, x: Array, y: Array) -> Array:
    return np.float32(0.851) * abs(x) + np.float32(0.525) * abs(y) - np.float32(0.62)


def _ring(xp: ModuleType, x: Array, y: Array) -> Array:
    return abs(xp.sqrt(x * x + y * y) - np.float32(0.82)) - np.float32(0.27)


_DISTANCES = (_circle, _square, _triangle, _cross, _star, _diamond, _ring)


def _write(xp: ModuleType, strip: Array, text: Array, left: Array, top: Array, visible: Array, scale: int) -> Array:
    """A strip of frames [F, h, w, 3] with a text on it.

    Args:
      text: int32 [F, L], numbers of glyphs.
      left, top: pixels of the scene.
      visible: bool [F, 1, 1].
    """
    glyphs, cell = xp.asarray(atlas(scale)), scale * CELL
    x = np.arange(strip.shape[2], dtype=np.int32) - scale * left
    y = np.arange(strip.shape[1], dtype=np.int32) - scale * top
    inside = ((x >= 0) & (x < text.shape[1] * cell))[None, :] & ((y >= 0) & (y < cell))[:, None]
    number = text[:, xp.clip(x // cell, 0, text.shape[1] - 1)]  # [F, w]
    inked = glyphs[number[:, None, :], xp.clip(y, 0, cell - 1)[:, None], (x % cell)[None, :]]
    inked = xp.where(visible & inside, inked, 0.0)[..., None]
    return strip * (1 - inked) + np.array(_TEXT, np.float32) * inked
