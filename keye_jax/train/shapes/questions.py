"""Questions about scenes of the generated world, with their answers.

A question has one right answer, which the frames that the model sees show: what something else covers is not asked.
Answers are short and of a fixed form: a colour, a shape, a number, "mm:ss", a word, or "3.5-7.0" for an interval in
seconds, whose ends are the times of the first and of the last frame.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from keye_jax.errors import UserError
from keye_jax.train.shapes.scene import NEEDLE, Scene, Span

KINDS = ("attributes", "counts", "order", "when", "clock", "word", "needle")

_LONGEST_INTERVAL = 0.7
"""Of a clip: the whole clip must be a bad guess of an interval."""

_ATTEMPTS = 8
"""For each question that is wanted: a scene may have nothing to ask of a kind, or too little."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a video.

    Attributes:
      kind: one of `KINDS`.
      form: names the questions that differ only in what they ask about; guesses are counted by form.
      text: as the user asks it.
      answer: as the model should write it.
      guess: what somebody could say who does not see the video, such as "the first one named", or the whole clip as
        an interval; empty for the answer itself.
      interval: seconds, of a question after a time.
    """

    kind: str
    form: str
    text: str
    answer: str
    guess: str = ""
    interval: tuple[float, float] | None = None


def stamp(seconds: float) -> str:
    """A time as the prompt states it."""
    return f"{seconds:.1f}"


def ask(
    scene: Scene, count: int, seed: int | Sequence[int], *, kinds: Mapping[str, float] | None = None
) -> list[Question]:
    """Up to `count` different questions about a scene, in random order; fewer if it has no more to ask.

    Args:
      seed: the same one gives the same questions about the same scene.
      kinds: how often each kind is asked, as weights; all alike if left out.

    Raises:
      UserError: a kind is unknown, or its weight negative.
    """
    kinds = dict.fromkeys(KINDS, 1.0) if kinds is None else kinds
    for kind, weight in kinds.items():
        if kind not in KINDS or not weight >= 0:
            raise UserError(f"kinds has {kind!r}: {weight}; it must be weights, 0 or more, of: {', '.join(KINDS)}")
    names, weights = list(kinds), np.array(list(kinds.values()), np.float64)
    generator = np.random.default_rng(seed)
    bounds = np.cumsum(weights) / weights.sum()
    found: dict[str, Question] = {}
    for draw in generator.random((_ATTEMPTS * count, 5)).tolist():
        if len(found) == count:
            break
        kind = names[int(np.searchsorted(bounds, draw[0], "right"))]
        question = _ASKERS[kind](scene, _Choice(draw[1:]))
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())


class _Choice:
    """A few random numbers, each used once."""

    def __init__(self, uniform: list[float]):
        self._uniform = iter(uniform)

    def of[T](self, values: list[T] | tuple[T, ...]) -> T:
        return values[int(len(values) * next(self._uniform))]

    def chance(self, probability: float) -> bool:
        return next(self._uniform) < probability


def _attributes(scene: Scene, choice: _Choice) -> Question | None:
    """The colour of a shape, or the shape of a colour, in a frame."""
    ask_colour = choice.chance(0.5)
    # Each colour of each shape alike: most questions are about shapes that change theirs, so the time matters.
    spans = [(number, span) for number, each in enumerate(scene.objects) for span in each.spans]
    number, span = choice.of(spans)
    shown = scene.objects[number]
    frames = [frame for frame in range(span.first, span.last + 1) if scene.free[number, frame]]
    if not frames or shown.shape == NEEDLE:
        return None
    when = stamp(scene.times[choice.of(frames)])
    if ask_colour:
        return Question("attributes", "colour", f"What colour is the {shown.shape} at {when} s?", span.colour)
    return Question("attributes", "shape", f"Which shape is {span.colour} at {when} s?", shown.shape)


def _counts(scene: Scene, choice: _Choice) -> Question | None:
    """How many shapes a frame shows, or the whole clip."""
    plain = [number for number, each in enumerate(scene.objects) if each.shape != NEEDLE]
    needle = len(plain) < len(scene.objects)
    if choice.chance(0.3):
        seen = all(
            scene.free[number, each.first : each.last + 1].sum() > 1 for number, each in enumerate(scene.objects)
        )
        if needle or not seen:
            return None
        return Question("counts", "in all", "How many shapes are there in all?", str(len(plain)))
    frames: dict[int, list[int]] = {}
    for frame in range(len(scene.times)):
        visible = [number for number, each in enumerate(scene.objects) if each.first <= frame <= each.last]
        if all(scene.free[number, frame] and scene.objects[number].shape != NEEDLE for number in visible):
            frames.setdefault(len(visible), []).append(frame)
    if not frames:
        return None
    count = choice.of(sorted(frames))  # each number that there is alike
    when = stamp(scene.times[choice.of(frames[count])])
    return Question("counts", "in a frame", f"How many shapes are there at {when} s?", str(count))


def _order(scene: Scene, choice: _Choice) -> Question | None:
    """Which of two shapes comes first, or what colour a shape has before or after another."""
    if choice.chance(0.5):
        pair = [number for number, each in enumerate(scene.objects) if each.shape != NEEDLE]
        one, two = choice.of([(one, two) for one in pair for two in pair if one != two] or [(0, 0)])
        first, second = scene.objects[one], scene.objects[two]
        if abs(first.first - second.first) < 2 or not (_begins(scene, one) and _begins(scene, two)):
            return None
        answer, guess = (first, "first named") if first.first < second.first else (second, "second named")
        text = f"Which comes first, the {first.shape} or the {second.shape}?"
        return Question("order", "first", text, answer.shape, guess)
    number = choice.of(_places(scene.objects))
    shown = scene.objects[number]
    steps = list(itertools.pairwise(shown.spans))
    if not steps:
        return None
    before, after = choice.of(steps)
    if not (_seen(scene, number, before) and _seen(scene, number, after)):
        return None
    if choice.chance(0.5):
        text = f"What colour is the {shown.shape} after {before.colour}?"
        return Question("order", "after", text, after.colour)
    return Question("order", "before", f"What colour is the {shown.shape} before {after.colour}?", before.colour)


def _when(scene: Scene, choice: _Choice) -> Question | None:
    """From when to when a shape, one of its colours, or the word is visible."""
    candidates: list[tuple[str, str, int, int]] = []
    for number, shown in enumerate(scene.objects):
        spans = [Span(shown.first, shown.last, "visible")] + (list(shown.spans) if len(shown.spans) > 1 else [])
        for span in spans:
            if shown.shape != NEEDLE and _ends_free(scene, number, span):
                form = "visible" if span.colour == "visible" else "colour"
                candidates.append((form, f"When is the {shown.shape} {span.colour}?", span.first, span.last))
    candidates.append(("word", "When is the word visible?", *scene.word_frames))
    form = choice.of(sorted({each[0] for each in candidates}))
    _, text, first, last = choice.of([each for each in candidates if each[0] == form])
    start, end, earliest, latest = (stamp(scene.times[frame]) for frame in (first, last, 0, -1))
    if float(end) - float(start) > _LONGEST_INTERVAL * (float(latest) - float(earliest)):
        return None
    return Question("when", form, text, f"{start}-{end}", f"{earliest}-{latest}", (float(start), float(end)))


def _clock(scene: Scene, choice: _Choice) -> Question:
    """What the clock shows in a frame."""
    frame = choice.of(_places(scene.times))
    return Question(
        "clock", "clock", f"What does the clock show at {stamp(scene.times[frame])} s?", scene.clock_at(frame)
    )


def _word(scene: Scene, choice: _Choice) -> Question:
    return Question("word", "word", "What is the word?", scene.word)


def _needle(scene: Scene, choice: _Choice) -> Question | None:
    """The colour of something that is seen for a moment."""
    shown = scene.objects[-1]
    if shown.shape != NEEDLE:
        return None
    return Question("needle", "needle", f"What colour is the {NEEDLE}?", shown.spans[0].colour)


_ASKERS: dict[str, Callable[[Scene, _Choice], Question | None]] = {
    "attributes": _attributes,
    "counts": _counts,
    "order": _order,
    "when": _when,
    "clock": _clock,
    "word": _word,
    "needle": _needle,
}


def _places(values: tuple) -> list[int]:
    """The places of `values`."""
    return list(range(len(values)))


def _seen(scene: Scene, number: int, span: Span) -> bool:
    """Whether a frame shows an object in a colour."""
    return bool(scene.free[number, span.first : span.last + 1].any())


def _begins(scene: Scene, number: int) -> bool:
    """Whether the frame in which an object appears shows it."""
    return bool(scene.free[number, scene.objects[number].first])


def _ends_free(scene: Scene, number: int, span: Span) -> bool:
    """Whether nothing covers an object in the first and last frames of a span and in those beside them."""
    free = scene.free[number]
    return bool(free[max(span.first - 1, 0) : span.first + 1].all() and free[span.last : span.last + 2].all())
