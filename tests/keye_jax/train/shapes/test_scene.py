import dataclasses
import itertools

import pytest

from keye_jax.errors import UserError
from keye_jax.train.shapes.scene import COLOURS, NEEDLE, Object, SceneOptions, Span, make_scene, sampled_times

OPTIONS = SceneOptions()
RECORDED = (
    4.0,
    "park",
    (0, 15),
    3305,
    [
        ("diamond", [(13, 16, "green"), (17, 19, "white"), (20, 22, "cyan")]),
        ("star", [(9, 18, "orange")]),
        ("square", [(15, 18, "red"), (19, 22, "purple")]),
        ("triangle", [(10, 12, "cyan"), (13, 17, "blue")]),
    ],
)


def test_a_seed_gives_the_same_scene_everywhere():
    scene = make_scene(7, number=3)
    assert scene == make_scene(7, OPTIONS, number=3)
    assert scene != make_scene(7, number=4)
    assert scene != make_scene(8, number=3)
    # Recorded: held-out scenes stay held out.
    spans = [(each.shape, [(span.first, span.last, span.colour) for span in each.spans]) for each in scene.objects]
    assert (scene.rate, scene.word, scene.word_frames, int(scene.clock), spans) == RECORDED


def test_shapes_differ_and_so_do_the_colours_of_a_frame():
    for number in range(300):
        scene = make_scene(0, number=number)
        shapes = [each.shape for each in scene.objects]
        assert len(set(shapes)) == len(shapes)
        assert 2 <= len([shape for shape in shapes if shape != NEEDLE]) <= 4
        for frame in range(OPTIONS.frames):
            colours = [each.colour_at(frame) for each in scene.objects if each.first <= frame <= each.last]
            assert len(set(colours)) == len(colours) and set(colours) <= set(COLOURS)
        for each in scene.objects:
            assert each.first >= 0 and each.last < OPTIONS.frames
            assert all(one.last + 1 == two.first for one, two in itertools.pairwise(each.spans))
            if each.shape == NEEDLE:
                assert each.last == each.first + 1
            else:
                assert all(span.last - span.first >= 2 for span in each.spans)


def test_options_set_what_scenes_are_like():
    options = SceneOptions(frames=50, rate=4.0, objects=(1, 1), spans=1, needle=1.0)
    for number in range(20):
        scene = make_scene(0, options, number=number)
        assert len(scene.times) == 50 and scene.rate == 4.0
        assert [each.shape == NEEDLE for each in scene.objects] == [False, True]
        assert len(scene.objects[0].spans) == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"frames": 7}, "frames is 7"),
        ({"rate": 3.0}, "rate is 3.0"),
        ({"objects": (3, 2)}, r"objects is \(3, 2\)"),
        ({"spans": 4}, "spans is 4"),
        ({"needle": 1.5}, "needle is 1.5"),
        ({"part_of": 20}, "part_of is 20; it must be at least 24"),
        ({"frames": 4, "part_of": 24}, "needle is 0.3; it must be 0"),
    ],
)
def test_options_that_are_not_allowed(wrong, words):
    with pytest.raises(UserError, match=words):
        SceneOptions(**wrong)


def test_the_clock(scene):
    assert [scene.clock_at(frame) for frame in (0, 1, 2, 15)] == ["00:59", "01:00", "01:00", "01:07"]


def test_sampled_times_are_the_processors():
    assert sampled_times(8, 2.0) == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
    assert sampled_times(8, 8.0) == (0.0, 0.5, 1.125, 1.625, 2.25, 2.75, 3.375, 3.875)


def test_what_covers_an_object_is_in_front_of_it_and_visible(scene):
    behind, front = scene.objects[0], Object("circle", (Span(3, 6, "white"),), centre=(45.0, 84.0))
    covered = dataclasses.replace(scene, objects=(behind, front))
    assert covered.free[0].tolist() == [not 3 <= frame <= 6 for frame in range(16)]
    assert covered.free[1].all()
