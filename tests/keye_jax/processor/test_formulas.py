"""smart_resize, frame_indices, frame_size and mrope_positions against the golden data and a plain oracle."""

import json
from pathlib import Path

import numpy as np
import pytest

from keye_jax.errors import UserError
from keye_jax.processor.image_size import MAX_ASPECT_RATIO, largest_area, smart_resize
from keye_jax.processor.options import VideoOptions, read_options, resolve_options
from keye_jax.processor.positions import mrope_positions
from keye_jax.processor.video import adaptive_factor, frame_indices, frame_size

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/preprocess.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["smart_resize"])
def test_smart_resize(case):
    limits = {"min_pixels": case["min_pixels"], "max_pixels": case["max_pixels"]}
    if case["expect"] == "error":
        with pytest.raises(UserError, match=f"{case['height']}x{case['width']}.*aspect ratio must be at most 200"):
            smart_resize(case["height"], case["width"], **limits)
    else:
        assert smart_resize(case["height"], case["width"], **limits) == tuple(case["expect"])


@pytest.mark.parametrize(
    ("min_pixels", "max_pixels"), [(1, 784), (784, 784), (50_176, 50_176), (3136, 60_000), (50_176, 200_704)]
)
def test_no_size_exceeds_the_largest_area(min_pixels, max_pixels):
    rng, largest = np.random.default_rng(max_pixels), 0
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    for _ in range(3000):
        short, ratio = 10 ** rng.uniform(0, 3.5), MAX_ASPECT_RATIO ** rng.uniform(0, 1)
        sides = max(1, int(short)), int(max(1, int(short)) * ratio)
        sides = sides if rng.random() < 0.5 else sides[::-1]
        height, width = smart_resize(*sides, **limits)
        largest = max(largest, height * width)
    assert largest <= largest_area(**limits)
    # The last limits are those of frames by default: nothing larger is prepared for them.
    assert (largest > max_pixels) == (largest_area(**limits) > max_pixels) == (max_pixels < 200_704)


def options(case, *names):
    values = vars(resolve_options(VideoOptions(), read_options("video", case["options"], "options"), "options"))
    return {name: values[name] for name in names}


@pytest.mark.parametrize("case", GOLDEN["frame_count"])
def test_frame_indices(case):
    given = options(case, "fps", "min_frames", "max_frames", "total_pixels")
    indices = frame_indices(case["total_frames"], case["native_fps"], **given)
    assert indices.dtype == np.int64
    assert len(indices) == case["expect_frames"]
    head, tail = case["expect_indices_head"], case["expect_indices_tail"]
    assert indices[: len(head)].tolist() == head
    assert indices[-len(tail) :].tolist() == tail


@pytest.mark.parametrize("case", GOLDEN["video_frames"])
def test_frame_size(case):
    given = options(case, "min_pixels", "max_pixels", "total_pixels")
    assert frame_size(case["frames"], case["height"], case["width"], **given) == tuple(case["expect"])


@pytest.mark.parametrize("frames", [1, 700, 721, 1000, 2000, 2879, 2881, 10**5])
def test_frame_size_is_the_largest_that_fits(frames):
    fits = [tokens for tokens in range(64, 257) if tokens * frames <= 184320]
    best = max(fits, default=64)
    assert frame_size(frames, 720, 1280) == smart_resize(720, 1280, min_pixels=64 * 784, max_pixels=best * 784)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frame_indices(0, 25.0), "total_frames is 0; it must be positive"),
        (lambda: frame_indices(10, 0.0), "native_fps is 0.0; it must be positive"),
        (lambda: frame_indices(10, float("nan")), "native_fps is nan; it must be positive"),
        (lambda: frame_indices(10, 25.0, fps=-1), "fps is -1; it must be positive"),
        (lambda: frame_indices(10, 25.0, max_frames=0), "max_frames is 0; it must be positive"),
        (lambda: frame_indices(10, 25.0, total_pixels=784), "total_pixels is 784; it must be at least 50176"),
        (lambda: frame_size(0, 10, 10), "frames is 0; it must be positive"),
        (lambda: frame_size(1, 10, 10, max_pixels=784), "min_pixels is 50176; it must be at most max_pixels 784"),
        (lambda: smart_resize(0, 10, min_pixels=1, max_pixels=2), "the image is 0x10"),
        (lambda: smart_resize(5, 5, min_pixels=3, max_pixels=2), "min_pixels is 3; it must be at most max_pixels 2"),
    ],
)
def test_bad_values_name_the_field(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_adaptive_factor():
    table = ((259, 0.09), (518, 0.18))
    assert [adaptive_factor(seconds, table) for seconds in (1, 259, 260, 519)] == [0.09, 0.09, 0.18, 1.0]
    assert adaptive_factor(1, ()) == 1.0


@pytest.mark.parametrize("case", GOLDEN["positions"])
def test_positions_golden(case):
    positions, delta = mrope_positions(
        case["input_ids"],
        case["image_grid_thw"],
        case["video_grid_thw"],
        image_token_id=case["image_token_id"],
        video_token_id=case["video_token_id"],
    )
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(positions, case["expect_positions"])
    assert delta == case["expect_delta"]


IMAGE, VIDEO = 900, 901


def walk(ids, image_grids, video_grids, merge):
    """Positions by a plain loop over the tokens."""
    grids = {IMAGE: list(image_grids), VIDEO: list(video_grids)}
    positions, free, index = [], 0, 0
    while index < len(ids):
        if ids[index] not in grids:
            positions.append((free, free, free))
            free, index = free + 1, index + 1
            continue
        _, height, width = grids[ids[index]].pop(0)
        for row in range(height // merge):
            for col in range(width // merge):
                positions.append((free, free + row, free + col))
                index += 1
        free += max(height, width) // merge
    return np.array(positions).reshape(-1, 3).T, free - len(ids)


@pytest.mark.parametrize("seed", range(60))
def test_positions_against_walk(seed):
    random = np.random.default_rng(seed)
    merge = int(random.integers(1, 4))
    ids, grids = [], {IMAGE: [], VIDEO: []}
    for _ in range(random.integers(0, 30)):
        kind = int(random.choice([0, IMAGE, VIDEO]))
        if not kind:
            ids += random.integers(0, 800, random.integers(0, 6)).tolist()
            continue
        height, width = random.integers(1, 7, 2)
        grids[kind].append((1, height * merge, width * merge))
        ids += [kind] * int(height * width)
    got, delta = mrope_positions(
        np.array(ids, np.int32),
        grids[IMAGE],
        grids[VIDEO],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        merge_size=merge,
    )
    expected, expected_delta = walk(ids, grids[IMAGE], grids[VIDEO], merge)
    np.testing.assert_array_equal(got, expected)
    assert delta == expected_delta


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([1, IMAGE], [], "has 1 image pad tokens .900.; it must have 0"),
        ([1], [(1, 2, 2)], "has 0 image pad tokens .900.; it must have 1, which its 1 image grids need"),
        ([IMAGE, 1, IMAGE], [(1, 2, 4)], "index 0 of input_ids are interrupted; image_grids.0. needs 2 in a row"),
        ([IMAGE], [(2, 2, 2)], r"image_grids\[0\] is \[2, 2, 2\]; it must be \(1, h, w\)"),
        ([IMAGE], [(1, 3, 2)], "positive multiples of 2"),
    ],
)
def test_positions_that_do_not_match(ids, grids, message):
    with pytest.raises(UserError, match=message):
        mrope_positions(ids, grids, [], image_token_id=IMAGE, video_token_id=VIDEO)
