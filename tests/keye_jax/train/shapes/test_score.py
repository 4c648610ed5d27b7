import pytest

from keye_jax.train.shapes.questions import Question
from keye_jax.train.shapes.score import guessing_scores, mean_scores, score, temporal_iou

COLOUR = Question("attributes", "colour", "?", "red")
WHEN = Question("when", "visible", "?", "2.0-4.0", "0.0-8.0", (2.0, 4.0))


@pytest.mark.parametrize(("answer", "value"), [("red", 1), (" Red\n", 1), ("blue", 0), ("red.", 0), ("", 0)])
def test_an_answer_is_right_or_wrong(answer, value):
    assert score(COLOUR, answer) == value


@pytest.mark.parametrize(
    ("answer", "value"),
    [("2.0-4.0", 1), ("2 - 4", 1), ("3.0-5.0", 1 / 3), ("0.0-8.0", 1 / 4), ("5.0-6.0", 0), ("4.0-2.0", 0), ("2.0", 0)],
)
def test_an_interval_scores_by_its_overlap(answer, value):
    assert score(WHEN, answer) == pytest.approx(value)


def test_iou_of_moments():
    assert temporal_iou((2.0, 2.0), (2.0, 2.0)) == 1
    assert temporal_iou((2.0, 2.0), (2.0, 3.0)) == 0


def test_means_by_kind():
    assert mean_scores([COLOUR, WHEN, COLOUR], [1, 0.5, 0]) == {"attributes": 0.5, "when": 0.5}


def test_guesses_are_the_commonest_answers_of_a_form_and_the_whole_clip():
    order = [Question("order", "first", "?", shape, guess) for shape, guess in (("star", "one"), ("ring", "one"))]
    order += [Question("order", "after", "?", colour) for colour in ("red", "red", "blue")]
    assert guessing_scores([*order, WHEN]) == {"order": 4 / 5, "when": 0.25}
