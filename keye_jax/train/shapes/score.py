"""Scores of answers to questions about the generated world, from 0 to 1; they are rewards too."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Sequence

from keye_jax.train.shapes.questions import KINDS, Question

_INTERVAL = re.compile(r"(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)")


def score(question: Question, answer: str) -> float:
    """1 for the right answer and 0 for a wrong one; for an interval the temporal IoU.

    Case and spaces at the ends do not count.
    """
    said = answer.strip().lower()
    if question.interval is None:
        return float(said == question.answer)
    match = _INTERVAL.fullmatch(said)
    return temporal_iou((float(match[1]), float(match[2])), question.interval) if match else 0.0


def temporal_iou(found: tuple[float, float], true: tuple[float, float]) -> float:
    """max(0, min(ends) - max(starts)) / (max(ends) - min(starts)); 0 for an interval that ends before it starts."""
    if found[1] < found[0]:
        return 0.0
    both = max(0.0, min(found[1], true[1]) - max(found[0], true[0]))
    union = max(found[1], true[1]) - min(found[0], true[0])
    return both / union if union else 1.0


def mean_scores(questions: Sequence[Question], scores: Iterable[float]) -> dict[str, float]:
    """The mean score of each kind that was asked."""
    by_kind: dict[str, list[float]] = {}
    for question, value in zip(questions, scores, strict=True):
        by_kind.setdefault(question.kind, []).append(value)
    return {kind: sum(by_kind[kind]) / len(by_kind[kind]) for kind in KINDS if kind in by_kind}


def guessing_scores(questions: Sequence[Question]) -> dict[str, float]:
    """For each kind, the mean score of somebody who does not see the videos and guesses as well as possible.

    That is the commonest answer among the questions of a form. Of an interval it is the whole clip.
    """
    guesses: dict[tuple[str, str], collections.Counter[str]] = {}
    for question in questions:
        guesses.setdefault((question.kind, question.form), collections.Counter())[
            question.guess or question.answer
        ] += 1
    best = {form: counts.most_common(1)[0][0] for form, counts in guesses.items()}
    return mean_scores(
        questions,
        [
            score(question, question.guess)
            if question.interval
            else float(best[question.kind, question.form] == (question.guess or question.answer))
            for question in questions
        ],
    )
