import dataclasses

import pytest

from keye_jax.errors import UserError
from keye_jax.train.shapes.questions import KINDS, ask
from keye_jax.train.shapes.scene import Object, Span, make_scene


def everything(scene, kind):
    """All questions of a kind that are ever asked about a scene, with their answers."""
    found = {}
    for seed in range(60):
        for question in ask(scene, 8, seed, kinds={kind: 1.0}):
            assert question.kind == kind
            assert found.setdefault(question.text, question.answer) == question.answer
    return found


def test_attributes(scene):
    found = everything(scene, "attributes")
    assert found["What colour is the square at 2.0 s?"] == "red"
    assert found["What colour is the square at 2.5 s?"] == "blue"
    assert found["Which shape is red at 0.5 s?"] == "square"
    assert found["Which shape is green at 7.5 s?"] == "star"
    colours = {text: answer for text, answer in found.items() if text.startswith("What")}
    assert len(colours) == 9 + 12 and len(found) == 2 * len(colours)  # each frame of each shape, in both ways
    assert not any("ring" in text for text in found)


def test_counts(scene):
    found = everything(scene, "counts")
    assert found["How many shapes are there at 0.0 s?"] == "0"
    assert found["How many shapes are there at 1.0 s?"] == "1"
    assert found["How many shapes are there at 2.0 s?"] == "2"
    # A ring is not counted, so nothing is asked about the frames that show it, nor about the whole clip.
    assert len(found) == 14
    plain = dataclasses.replace(scene, objects=scene.objects[:2])
    assert everything(plain, "counts")["How many shapes are there in all?"] == "2"


def test_order(scene):
    assert everything(scene, "order") == {
        "Which comes first, the square or the star?": "square",
        "Which comes first, the star or the square?": "square",
        "What colour is the square after red?": "blue",
        "What colour is the square before blue?": "red",
    }


def test_when(scene):
    assert everything(scene, "when") == {
        "When is the square visible?": "0.5-4.5",
        "When is the square red?": "0.5-2.0",
        "When is the square blue?": "2.5-4.5",
        "When is the word visible?": "1.5-4.0",
    }  # the star is visible for most of the clip, so the whole clip would be a good guess


def test_the_clock_the_word_and_the_needle(scene):
    clock = everything(scene, "clock")
    assert len(clock) == 16 and clock["What does the clock show at 6.5 s?"] == "01:06"
    assert everything(scene, "word") == {"What is the word?": "moon"}
    assert everything(scene, "needle") == {"What colour is the ring?": "yellow"}
    assert everything(dataclasses.replace(scene, objects=scene.objects[:2]), "needle") == {}


def test_nothing_is_asked_about_what_is_covered(scene):
    front = Object("circle", (Span(4, 5, "white"),), centre=scene.objects[0].centre)
    covered = dataclasses.replace(scene, objects=(scene.objects[0], front))
    attributes = everything(covered, "attributes")
    assert "What colour is the square at 1.5 s?" in attributes
    assert "What colour is the square at 2.0 s?" not in attributes
    assert "How many shapes are there at 2.0 s?" not in everything(covered, "counts")
    # When red turns to blue is not seen.
    when = everything(covered, "when")
    assert "When is the square visible?" in when and "When is the square red?" not in when


def test_questions_differ_and_follow_from_the_seed():
    scene = make_scene(0)
    asked = ask(scene, 8, 5)
    assert len({question.text for question in asked}) == len(asked) == 8
    assert asked == ask(scene, 8, 5) != ask(scene, 8, 6)
    assert ask(scene, 8, (5, 1)) == ask(scene, 8, (5, 1)) != asked


def test_kinds_are_asked_as_often_as_their_weights_say():
    kinds = [ask(make_scene(0, number=number), 1, number)[0].kind for number in range(700)]
    assert set(kinds) == set(KINDS)
    kinds = [ask(make_scene(0, number=n), 1, n, kinds={"clock": 3, "word": 1})[0].kind for n in range(400)]
    assert 260 < kinds.count("clock") < 340 and kinds.count("clock") + kinds.count("word") == 400


@pytest.mark.parametrize("kinds", [{"colour": 1}, {"clock": -1}])
def test_kinds_that_are_not_allowed(kinds):
    with pytest.raises(UserError, match="kinds has"):
        ask(make_scene(0), 1, 0, kinds=kinds)
