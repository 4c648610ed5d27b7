"""Scenes of the generated world: what moves, appears, vanishes and changes colour in a clip, and when.

A scene follows from its seed and options alone. All its events happen at times of the frames that the processor
samples: something that is visible "from 3.5 to 7.0" is in the frame of 3.5 s and in that of 7.0 s, and in none outside.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from keye_jax.errors import UserError
from keye_jax.processor.video import DEFAULT_FPS, frame_indices

SIDE = 168
"""Side of a frame in pixels: 6 x 6 tokens of 28 x 28 pixels. Places and sizes of a scene are in these pixels."""

SHAPES = ("circle", "square", "triangle", "cross", "star", "diamond", "ring")

NEEDLE = "ring"
"""The shape that only a needle has: something that is seen for a few frames of a clip."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "green": (40, 165, 50),
    "blue": (45, 75, 225),
    "yellow": (235, 220, 50),
    "orange": (240, 130, 25),
    "purple": (145, 45, 185),
    "cyan": (60, 215, 220),
    "white": (245, 245, 245),
}

WORDS = (
    *("moon", "coin", "lamp", "tree", "fish", "bird", "door", "road", "king", "gold", "snow", "rain", "wind", "fire"),
    *("lake", "hill", "sand", "ship", "boat", "cake", "milk", "salt", "desk", "book", "park", "farm", "bell", "drum"),
    *("leaf", "rose", "wolf", "bear", "frog", "duck", "goat", "lion", "seed", "corn", "rice", "soup"),
)

HELD_OUT = 2**32
"""Seeds from here on are for evaluation: training takes smaller ones."""

RATES = (2.0, 4.0, 8.0)
"""Frames a second of a clip, from which the processor samples 2. The times of all frames are exact in binary."""

MOST_OBJECTS = 5
"""Objects of a scene's arrays: up to four, and a needle."""

MOST_SPANS = 3
"""Colours that an object has one after the other, at most."""

CLOCK_LENGTH = 3600
"""Seconds after which the clock, mm:ss, would begin again. No clip gets there."""

_NEEDLE_FRAMES = 2
_FEWEST_FRAMES = 3
"""Frames that an object, a colour or the word is seen at least, where there are `_WHOLE_FRAMES`."""

_WHOLE_FRAMES = 8
"""Frames of the shortest clip. A part of one may have fewer, and what it shows may be seen in one of them."""

_LANE, _TOP, _BOTTOM = 30, 56, 112
"""Objects move around lanes this many pixels apart, between heights that leave room for the word and the clock."""


@dataclasses.dataclass(frozen=True)
class SceneOptions:
    """What scenes are like.

    Attributes:
      frames: frames that the model sees, at 2 a second; at least 8, or 1 of a part.
      part_of: frames of the clip of which the model sees a part, at its times, from a random frame on; None for a whole
        clip. Parts are for training: short ones cost less, and teach more of what is seen in a frame.
      rate: frames a second of the clip, one of `RATES`; None for any of them.
      objects: fewest and most objects, from 1 to 4.
      spans: most colours that an object has one after the other, from 1 to 3.
      needle: probability of a needle, from 0 to 1; 0 for fewer than 8 frames.

    Raises:
      UserError: a value is not allowed.
    """

    frames: int = 24
    rate: float | None = None
    objects: tuple[int, int] = (2, 4)
    spans: int = MOST_SPANS
    needle: float = 0.3
    part_of: int | None = None

    def __post_init__(self) -> None:
        fewest = _WHOLE_FRAMES if self.part_of is None else 1
        if self.frames < fewest:
            raise UserError(f"frames is {self.frames}; it must be at least {fewest}")
        least = max(_WHOLE_FRAMES, self.frames)
        if self.part_of is not None and self.part_of < least:
            raise UserError(f"part_of is {self.part_of}; it must be at least {least}, or left out")
        if self.rate is not None and self.rate not in RATES:
            raise UserError(f"rate is {self.rate}; it must be one of {', '.join(f'{rate:g}' for rate in RATES)}")
        fewest, most = self.objects
        if not 1 <= fewest <= most < MOST_OBJECTS:
            raise UserError(f"objects is {self.objects}; it must be two rising numbers from 1 to {MOST_OBJECTS - 1}")
        if not 1 <= self.spans <= MOST_SPANS:
            raise UserError(f"spans is {self.spans}; it must be from 1 to {MOST_SPANS}")
        if not 0 <= self.needle <= 1:
            raise UserError(f"needle is {self.needle}; it must be from 0 to 1")
        if self.needle and self.frames < _WHOLE_FRAMES:
            raise UserError(f"needle is {self.needle}; it must be 0 for fewer than {_WHOLE_FRAMES} frames")


@dataclasses.dataclass(frozen=True)
class Span:
    """A colour of an object, from the frame `first` to the frame `last`, both included."""

    first: int
    last: int
    colour: str


@dataclasses.dataclass(frozen=True)
class Object:
    """A shape that is seen for one stretch of frames.

    Attributes:
      shape: one of `SHAPES`.
      spans: its colours, one after the other, without gaps.
      radius: pixels.
      centre, swing: pixels; the place at t seconds is centre + swing * sin(speed * t + phase), for x and for y.
      speed, phase: radians a second, radians.
      tilt: radians.
    """

    shape: str
    spans: tuple[Span, ...]
    radius: float = 18.0
    centre: tuple[float, float] = (84.0, 84.0)
    swing: tuple[float, float] = (0.0, 0.0)
    speed: tuple[float, float] = (0.0, 0.0)
    phase: tuple[float, float] = (0.0, 0.0)
    tilt: float = 0.0

    @property
    def first(self) -> int:
        return self.spans[0].first

    @property
    def last(self) -> int:
        return self.spans[-1].last

    def colour_at(self, frame: int) -> str | None:
        """Its colour in a frame; None where it is not visible."""
        return next((span.colour for span in self.spans if span.first <= frame <= span.last), None)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A clip of the generated world.

    Attributes:
      rate: frames a second of the clip.
      times: seconds of the frames that the model sees, rising.
      objects: those in front come last. No two have the same shape, nor the same colour in one frame.
      word, word_frames: the text, and the first and the last frame in which it is seen.
      clock: what the clock shows at 0 s, in seconds. It shows whole seconds, rounded down.
      background: RGB of the upper and of the lower edge.
      offsets: pixels by which the word and the clock are moved, (x, y) of each.
    """

    rate: float
    times: tuple[float, ...]
    objects: tuple[Object, ...]
    word: str
    word_frames: tuple[int, int]
    clock: float
    background: tuple[tuple[float, ...], tuple[float, ...]] = ((60.0, 60.0, 60.0), (60.0, 60.0, 60.0))
    offsets: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    @functools.cached_property
    def free(self) -> np.ndarray:
        """bool [objects, frames]: whether nothing covers the place of an object, also where it is not visible yet."""
        return _free(self.objects, np.array(self.times))

    def clock_at(self, frame: int) -> str:
        """What the clock shows in a frame, mm:ss."""
        minutes, seconds = divmod(int(self.clock + self.times[frame]), 60)
        return f"{minutes:02d}:{seconds:02d}"


def clip_frames(frames: int, rate: float) -> int:
    """Frames of a clip of `rate` a second, of which the processor samples `frames`."""
    return round(frames * rate / DEFAULT_FPS)


@functools.lru_cache
def sampled_times(frames: int, rate: float) -> tuple[float, ...]:
    """Seconds of the frames that the processor samples of a clip with `clip_frames(frames, rate)` frames."""
    indices = frame_indices(clip_frames(frames, rate), rate)
    assert len(indices) == frames
    return tuple((indices / rate).tolist())


def make_scene(seed: int, options: SceneOptions = SceneOptions(), *, number: int = 0) -> Scene:
    """Scene `number` of a seed. The same arguments give the same scene on every machine."""
    attempt = 0
    draws = _Draws(np.random.default_rng([seed, number, attempt]))
    while (objects := _objects(draws, options)) is None:
        # Each attempt has random numbers of its own, so it does not depend on how many the one before took.
        attempt += 1
        draws = _Draws(np.random.default_rng([seed, number, attempt]))
    rate = options.rate or draws.one_of(RATES)
    first, last = _stretch(draws, options.frames)
    shade = [draws.between(25, 95) for _ in range(2)]
    background = tuple(tuple(tone + draws.between(-15, 15) for _ in range(3)) for tone in shade)
    times = sampled_times(options.part_of or options.frames, rate)
    # A sixteenth of a second away from the times of all frames.
    latest = CLOCK_LENGTH - 1 - int(times[-1])
    clock = draws.integer(0, latest - 1) + (2 * draws.integer(0, 7) + 1) / 16
    begin = draws.integer(0, options.part_of - options.frames) if options.part_of else 0
    return Scene(
        rate=rate,
        times=times[begin : begin + options.frames],
        objects=objects,
        word=draws.one_of(WORDS),
        word_frames=(first, last),
        clock=clock,
        background=(background[0], background[1]),
        offsets=((draws.integer(-3, 3), draws.integer(-2, 2)), (draws.integer(-3, 3), draws.integer(-2, 2))),
    )


class _Draws:
    """Random numbers of a scene. They are drawn in blocks, since a call for each takes longer than the rest."""

    def __init__(self, generator: np.random.Generator):
        self._uniform = self._endless(generator)

    @staticmethod
    def _endless(generator: np.random.Generator) -> Iterator[float]:
        while True:
            yield from generator.random(128).tolist()

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._uniform)

    def integer(self, low: int, high: int) -> int:
        """From `low` to `high`, both included."""
        return low + int((high - low + 1) * next(self._uniform))

    def one_of[T](self, values: tuple[T, ...] | list[T]) -> T:
        return values[int(len(values) * next(self._uniform))]

    def shuffled[T](self, values: tuple[T, ...] | list[T]) -> list[T]:
        return [value for _, value in sorted(zip(self._uniform, values, strict=False), key=lambda pair: pair[0])]


def _objects(draws: _Draws, options: SceneOptions) -> tuple[Object, ...] | None:
    """The objects of a scene; None if the colours do not suffice."""
    count = draws.integer(*options.objects)
    lanes = draws.shuffled(list(range(4)))
    shapes = draws.shuffled([shape for shape in SHAPES if shape != NEEDLE])
    taken: list[Span] = []
    made = []
    for shape, lane in zip(shapes[:count], lanes, strict=False):
        first, last = _stretch(draws, options.frames)
        fewest = _FEWEST_FRAMES if options.frames >= _WHOLE_FRAMES else 1
        spans = _spans(draws, first, last, options.spans, taken, fewest)
        if spans is None:
            return None
        made.append(_moving(draws, shape, spans, lane))
    if draws.between(0, 1) < options.needle:
        first = draws.integer(1, options.frames - 1 - _NEEDLE_FRAMES)
        spans = _spans(draws, first, first + _NEEDLE_FRAMES - 1, 1, taken)
        if spans is None:
            return None
        made.append(_moving(draws, NEEDLE, spans, draws.integer(0, 3)))
    return tuple(made)


def _stretch(draws: _Draws, frames: int) -> tuple[int, int]:
    """First and last frame of something that is seen for a third of the clip to nearly all of it."""
    if frames >= _WHOLE_FRAMES:
        length = draws.integer(max(2 * _FEWEST_FRAMES, frames // 3), frames - 2)
    else:
        length = draws.integer(-(-frames // 2), frames)
    first = draws.integer(0, frames - length)
    return first, first + length - 1


def _spans(
    draws: _Draws, first: int, last: int, most: int, taken: list[Span], fewest: int = _FEWEST_FRAMES
) -> tuple[Span, ...] | None:
    """Colours of a stretch of frames, none of which another object has at the same time; None if there are too few.

    Args:
      most: colours at most.
      taken: those of other objects; takes the new ones.
      fewest: frames of a colour at least.
    """
    count = draws.integer(1, min(most, (last - first + 1) // fewest)) if most > 1 else 1
    # Of the frames that are not needed, as many before each change as the sorted draws say.
    spare = last - first + 1 - count * fewest if count > 1 else 0
    cuts = sorted(draws.integer(0, spare) for _ in range(count - 1))
    starts = [first] + [first + (index + 1) * fewest + cut for index, cut in enumerate(cuts)]
    spans: list[Span] = []
    for start, end in zip(starts, [*(start - 1 for start in starts[1:]), last], strict=True):
        used = {span.colour for span in taken if span.first <= end and start <= span.last}
        free = [colour for colour in COLOURS if colour not in used | {span.colour for span in spans}]
        if not free:
            return None
        spans.append(Span(start, end, draws.one_of(free)))
    taken += spans
    return tuple(spans)


def _moving(draws: _Draws, shape: str, spans: tuple[Span, ...], lane: int) -> Object:
    """An object that swings around the middle of a lane, into its neighbours."""
    swing = draws.between(8, 34), draws.between(4, 22)
    x = SIDE / 2 + (lane - 1.5) * _LANE
    return Object(
        shape=shape,
        spans=spans,
        radius=draws.between(17, 22),
        centre=(min(max(x, 24 + swing[0]), SIDE - 24 - swing[0]), draws.between(_TOP + swing[1], _BOTTOM - swing[1])),
        swing=swing,
        speed=(draws.between(0.3, 1.2), draws.between(0.3, 1.5)),
        phase=(draws.between(0, 6.28), draws.between(0, 6.28)),
        tilt=draws.between(-0.15, 0.15),
    )


def _free(objects: tuple[Object, ...], times: np.ndarray) -> np.ndarray:
    """See `Scene.free`. An object is free of another at 0.9 of the distance at which their circles would touch."""
    frames = np.arange(len(times))
    motion = np.array([(each.centre, each.swing, each.speed, each.phase) for each in objects])
    places = motion[:, 0] + motion[:, 1] * np.sin(motion[:, 2] * times[:, None, None] + motion[:, 3])  # [F, N, 2]
    radius = np.array([each.radius for each in objects])
    shown = np.array([(each.first <= frames) & (frames <= each.last) for each in objects])
    distance = np.sqrt(np.square(places[:, :, None] - places[:, None]).sum(-1)).transpose(1, 2, 0)  # [N, N, F]
    covers = (distance < 0.9 * (radius[:, None] + radius)[..., None]) & shown  # by the second of the two
    in_front = np.triu(np.ones((len(objects), len(objects)), bool), 1)
    return ~(covers & in_front[..., None]).any(1)
