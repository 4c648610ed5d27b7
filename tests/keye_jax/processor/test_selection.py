"""Which frames are chosen: in time, in a part of the video, or as asked for."""

import numpy as np
import pytest

from keye_jax.errors import UserError
from keye_jax.processor.options import VideoOptions
from keye_jax.processor.selection import select_frames
from keye_jax.processor.timeline import VideoInfo
from keye_jax.processor.video import TOTAL_PIXELS, frame_indices


def constant(frames, fps):
    return VideoInfo(48, 64, fps, np.arange(frames) / fps)


def variable(times, last):
    times = np.asarray(times, float)
    return VideoInfo(48, 64, len(times) / (times[-1] + last), times, constant=False)


SCREEN = variable(np.concatenate([np.arange(600) / 60, 10 + np.arange(100) / 2]), 0.5)
"""A recording of a screen: 60 frames a second for 10 s, then 2 a second for 50 s."""


def select(info, **options):
    return select_frames(info, VideoOptions(**options), options.get("total_pixels", TOTAL_PIXELS))


@pytest.mark.parametrize("options", [{}, {"fps": 0.5}, {"max_frames": 7}, {"min_frames": 30}, {"total_pixels": 10**6}])
def test_a_constant_rate_gives_the_publishers_indices(options):
    chosen = select(constant(747, 29.97), **options)
    np.testing.assert_array_equal(chosen, frame_indices(747, 29.97, **options))


def test_a_variable_rate_gives_so_many_a_second_in_every_part():
    times = SCREEN.times[select(SCREEN)]
    assert len(times) >= 117
    for second in range(0, 59, 4):
        assert abs(np.count_nonzero((times >= second) & (times < second + 4)) - 8) <= 1
    assert np.abs(np.diff(times) - 0.5).max() < 0.51
    times = SCREEN.times[select(SCREEN, fps=1.0, max_frames=30)]
    assert len(times) == 30
    assert np.abs(np.diff(times) - 59.5 / 29).max() < 0.51


def test_a_frame_that_is_shown_for_long_appears_once():
    slides = variable([0, 20, 20.1, 20.2, 47], 5)
    assert select(slides).tolist() == [0, 1, 3, 4]
    assert select(slides, fps=0.1).tolist() == [0, 3, 4]
    assert select(slides, fps=30.0).tolist() == [0, 1, 2, 3, 4]
    assert select(slides, min_frames=5).tolist() == [0, 1, 2, 3, 4]
    assert select(slides, max_frames=2).tolist() == [0, 4]


@pytest.mark.parametrize(
    "info", [constant(1000, 25.0), variable(np.arange(1000) / 25 + 1e-3 * (np.arange(1000) % 5), 0.04)]
)
def test_a_part_of_a_video(info):
    times = info.times[select(info, start=10.0, end=20.0)]
    assert times[0] == pytest.approx(10, abs=0.05) and times[-1] == pytest.approx(20, abs=0.05)
    assert len(times) == 20
    np.testing.assert_allclose(np.diff(times), 10 / 19, atol=0.05)
    assert info.times[select(info, start=39.0)][0] == pytest.approx(39, abs=0.05)
    assert info.times[select(info, end=1.0, num_frames=3)] == pytest.approx([0, 0.5, 1], abs=0.05)
    assert len(select(info, start=30.0, end=400.0)) == 20
    assert select(info, start=10.001, end=10.002).tolist() == [250]


def test_frames_that_are_asked_for():
    info = constant(100, 10.0)
    assert select(info, num_frames=4).tolist() == [0, 33, 66, 99]
    assert select(info, num_frames=1000).tolist() == list(range(100))
    assert select(info, frame_times=(0.0, 0.3, 0.39, 9.95)).tolist() == [0, 3, 99]
    assert select(info, frame_indices=(2, 5, 99)).tolist() == [2, 5, 99]
    assert select(SCREEN, frame_times=(9.0, 30.2)).tolist() == [540, 640]
    assert len(select(SCREEN, num_frames=50)) == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 10.0}, "start is 10; the video ends at 10.000 s"),
        ({"frame_times": (3.0, 11.5)}, "frame_times has 11.5; the video ends at 10.000 s"),
        ({"frame_indices": (3, 100)}, "frame_indices has 100; the video has frames 0 to 99"),
        ({"num_frames": 60}, "num_frames is 60; total_pixels 1000000 allows 19"),
        ({"frame_indices": tuple(range(20))}, "frame_indices has 20 frames; total_pixels 1000000 allows 19"),
    ],
)
def test_what_the_video_does_not_have_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        select(constant(100, 10.0), total_pixels=10**6, **options)
