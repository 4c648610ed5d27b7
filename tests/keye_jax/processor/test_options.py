"""Options by all their names, in all places, and with all kinds of values."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from keye_jax.processor import Processor
from keye_jax.processor.messages import check_messages
from keye_jax.processor.options import (
    ImageOptions,
    VideoOptions,
    merge_options,
    read_options,
    request_options,
    resized,
    resolve_options,
)
from tests.keye_jax.processor.conftest import refused

FRAMES = np.zeros((4, 28, 56, 3), np.uint8)


def video(source: Any = "x", **options: Any):
    _, [part] = check_messages([{"role": "user", "content": [{"type": "video", "video": source, **options}]}])
    return part.options


def image(**options: Any):
    _, [part] = check_messages([{"role": "user", "content": [{"type": "image", "image": "x", **options}]}])
    return part.options


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"video_start": 1, "video_end": 2.5}, {"start": 1.0, "end": 2.5}),
        ({"start": "0:05", "end": "1:02:03.25"}, {"start": 5.0, "end": 3723.25}),
        ({"start": "90", "end": " 01:30.5 "}, {"start": 90.0, "end": 90.5}),
        ({"start": 0, "end": None}, {"start": 0.0}),
        ({"end": "100:00"}, {"end": 6000.0}),
        ({"nframes": 8}, {"num_frames": 8}),
        ({"num_frames": 8.0}, {"num_frames": 8}),
        ({"video_nframes": np.int64(8)}, {"num_frames": 8}),
        ({"frame_times": [0, 1.5, "0:02"]}, {"frame_times": (0.0, 1.5, 2.0)}),
        ({"frame_indices": np.array([0, 5])}, {"frame_indices": (0, 5)}),
        ({"resized_height": 280, "resized_width": 420}, {"resized_height": 280, "resized_width": 420}),
        ({"sample_fps": 4}, {"sample_fps": 4.0}),
        ({"native_fps": Fraction(1, 2)}, {"sample_fps": 0.5}),
        ({"raw_fps": np.float32(24)}, {"sample_fps": 24.0}),
        ({"fps": 1, "video_fps": 2}, {"fps": 2.0}),
        ({"max_frames_num": 32}, {"max_frames": 32}),
        ({"subtitles": {"any": "thing"}}, {"subtitles": {"any": "thing"}}),
        ({"detail": "low"}, {"detail": "low"}),
        ({"video_kwargs": {"fps": 1}}, {"fps": 1.0}),
        ({"videos_kwargs": {"video_fps": 1, "min_frames": 4}, "min_frames": 8}, {"fps": 1.0, "min_frames": 8}),
        ({"nframes": 8, "num_frames": 8}, {"num_frames": 8}),
        ({"video_backend": "torchcodec", "uuid": 1, "cache_control": {}}, {}),
    ],
)
def test_names_and_values(given, expected):
    assert video(**given) == expected


def test_fps_of_a_list_of_frames_is_not_a_choice_of_frames():
    """It is the rate at which they were taken, so that a number of frames may stand beside it."""
    for source in (FRAMES, list(FRAMES), "data:video/jpeg;base64,AA,AA"):
        assert video(source, fps=4, num_frames=3) == {"fps": 4.0, "num_frames": 3}
    refused(lambda: video(fps=4, num_frames=3), "fps is 4.0; num_frames must not be given beside it")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 1, "nframes": 2}, "fps is 1.0; num_frames must not be given beside it"),
        ({"frame_times": [1], "frame_indices": [1]}, "must not be given beside it"),
        ({"frame_times": [1], "fps": 1}, "must not be given beside it"),
        ({"frame_times": [1], "num_frames": 1}, "must not be given beside it"),
        ({"frame_indices": [1], "start": 1}, "must not be given beside it"),
        ({"frame_times": [1], "end": 1}, "must not be given beside it"),
        ({"fps": 1, "preprocess_kwargs": {"nframes": 2}}, "must not be given beside it"),
        ({"nframes": 2, "num_frames": 3}, "num_frames is 3; nframes says 2"),
        ({"min_frames": 3, "max_frames": 2}, "min_frames is 3; it must be at most max_frames 2"),
        ({"size": {"longest_edge": 9}}, r"content\[0\].size is not known; an option of video must be one of fps"),
        ({"video_kwargs": [1]}, r"video_kwargs is \[1\]; it must be an object"),
        ({"x" * 10_000: 1}, "is not known"),
    ],
)
def test_contradictions_and_unknown_names(options, message):
    refused(lambda: video(**options), message)


def test_names_that_are_no_text():
    for name in (10**5000, 3, None, ("a", 1)):
        refused(lambda name=name: request_options(None, {name: 1}), "mm_processor_kwargs.* is not known")
        refused(lambda name=name: request_options({name: 1}, None), "media_io_kwargs.* is not known")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 2, "end": 2}, "content.end is 2 s; it must be after start 2 s"),
        ({"start": "1:00", "end": 5}, "end is 5 s; it must be after start 60 s"),
        ({"end": 0}, "end is 0 s; it must be after start 0 s"),
        ({"resized_height": 28}, "resized_height is 28; resized_width must be given too"),
        ({"resized_width": 28}, "resized_width is 28; resized_height must be given too"),
        ({"resized_width": 10**5, "resized_height": 10**5}, "the area must be at most 51380224"),
    ],
)
def test_what_is_seen_after_defaults(options, message):
    refused(lambda: resolve_options(VideoOptions(), video(**options), "content"), message)


COUNTS = ("min_frames", "max_frames", "num_frames")
AREAS = ("min_pixels", "max_pixels", "total_pixels")
SIDES = ("resized_height", "resized_width")
RATES = ("fps", "sample_fps")
TIMES = ("start", "end")
LISTS = ("frame_times", "frame_indices")
BAD = [
    True,
    False,
    float("nan"),
    float("inf"),
    -float("inf"),
    -1,
    10**400,
    10**5000,
    -(10**5000),
    "x",
    "",
    "1e3",
    [],
    {},
]
BAD += [[1], b"1", object(), np.nan, np.bool_(True), 1j, "9" * 5001, "\u0661", [[[]]]]


@pytest.mark.parametrize("name", [*COUNTS, *AREAS, *SIDES, *RATES, *TIMES, *LISTS])
@pytest.mark.parametrize("value", BAD, ids=range(len(BAD)))
def test_bad_values(name, value):
    if name in LISTS and isinstance(value, list) and value == [1]:
        return
    refused(lambda: video(**{name: value}), rf"content\[0\].{name}(\[0\])? is .*; it must be ")
    if name in SIDES or name in AREAS[:2]:
        refused(lambda: image(**{name: value}), rf"content\[0\].{name} is .*; it must be ")


@pytest.mark.parametrize("name", [*COUNTS, *AREAS, *SIDES])
def test_bad_integers(name):
    for value in (0, 1.5, "2", 1e-308, 10**13, 1e300, Fraction(1, 2)):
        refused(
            lambda value=value: video(**{name: value}), rf"{name} is .*; it must be a positive integer, at most 10+$"
        )


@pytest.mark.parametrize("name", RATES)
def test_bad_rates(name):
    for value in (0, 1e-308, 1e-7, 1e7, 1e308, "2.0"):
        refused(
            lambda value=value: video(**{name: value}), f"{name} is .*; it must be a positive number, at least 0.000001"
        )


@pytest.mark.parametrize("name", TIMES)
def test_bad_times(name):
    for value in (
        "1:60",
        "1:60:00",
        "60:1:1:1",
        ":5",
        "5:",
        "1:-5",
        "1,5",
        "1 :5",
        "-1",
        "0x5",
        "nan",
        "inf",
        10**10,
        1e300,
    ):
        refused(lambda value=value: video(**{name: value}), f"{name} is .*; it must be seconds from 0 to 1000000000")


def test_bad_lists():
    refused(lambda: video(frame_times=[1, 1]), r"frame_times\[1\] is 1.0; it must be above the one before it")
    refused(lambda: video(frame_indices=[0, 5, 3]), r"frame_indices\[2\] is 3; it must be above the one before it")
    refused(lambda: video(frame_indices=[0, 1.5]), r"frame_indices\[1\] is 1.5; it must be an integer from 0")
    refused(lambda: video(frame_times=[0, "x"]), r"frame_times\[1\] is 'x'; it must be seconds")
    refused(lambda: video(frame_times=list(range(200_000))), "it must be a list of 1 to 100000 times in seconds")
    refused(lambda: video(frame_times=np.zeros((2, 2))), r"frame_times\[0\] is")
    refused(lambda: video(frame_times=np.float64(3)), "it must be a list")


def test_defaults_give_way():
    def resolve(defaults, **options):
        base = resolve_options(VideoOptions(), defaults, "")
        return resolve_options(base, video(**options), "")

    assert resolve({"num_frames": 8}, fps=1).num_frames is None
    assert resolve({"fps": 1}, num_frames=8).num_frames == 8
    assert resolve({"start": 5, "end": 9}, frame_indices=[3]) == VideoOptions(frame_indices=(3,))
    assert resolve({"frame_times": (1.0,)}, start=3) == VideoOptions(start=3.0)
    assert resolve({"start": 5.0}, end=9) == VideoOptions(start=5.0, end=9.0)
    refused(lambda: resolve({"start": 5.0}, end=4), "^end is 4 s; it must be after start 5 s")


def test_options_of_a_request_give_way_to_those_of_a_part():
    assert merge_options({"fps": 1.0, "start": 2.0}, {"num_frames": 4}) == {"start": 2.0, "num_frames": 4}
    assert merge_options({"min_pixels": 9}, {"max_pixels": 8}) == {"max_pixels": 8}
    assert merge_options({"max_pixels": 7, "min_pixels": 3}, {"min_pixels": 8}) == {"min_pixels": 8}


def test_detail():
    low, high = (resolve_options(ImageOptions(), image(detail=detail), "") for detail in ("low", "high"))
    assert low == ImageOptions(max_pixels=512 * 512)
    assert high == resolve_options(ImageOptions(), image(detail="auto"), "") == ImageOptions()
    assert resolve_options(ImageOptions(max_pixels=9999), image(detail="low"), "").max_pixels == 9999
    assert resolve_options(ImageOptions(), image(detail="low", max_pixels=10**6), "").max_pixels == 10**6


def test_detail_of_a_picture(processor):
    def tokens(**options):
        part = {"type": "image_url", "image_url": {"url": np.zeros((1000, 1000, 3), np.uint8), **options}}
        return processor.plan([{"role": "user", "content": [part]}]).images[0].num_tokens

    assert tokens(detail="low") == 18 * 18
    assert tokens(detail="high") == tokens(detail="auto") == tokens() == 36 * 36


def test_resized(processor):
    parts = [
        {"type": "image", "image": np.zeros((500, 500, 3), np.uint8), "resized_height": 100, "resized_width": 1},
        {"type": "video", "video": FRAMES, "resized_height": 280, "resized_width": 420},
    ]
    made = processor.plan([{"role": "user", "content": parts}])
    assert (made.images[0].height, made.images[0].width) == (112, 28)
    assert (made.videos[0].height, made.videos[0].width) == (280, 420)
    assert resized(ImageOptions()) is None


class TestRequest:
    @pytest.mark.parametrize(
        ("media", "processor", "image", "video"),
        [
            (None, None, {}, {}),
            ({}, {}, {}, {}),
            ({"video": {"num_frames": 8}}, None, {}, {"num_frames": 8}),
            ({"video": {"num_frames": -1, "fps": 2}}, None, {}, {"fps": 2.0}),
            ({"video": {"num_frames": 8, "fps": -1}}, None, {}, {"num_frames": 8}),
            ({"video": {"num_frames": 32, "fps": 2}}, None, {}, {"max_frames": 32, "fps": 2.0}),
            ({"video": {"video_backend": "opencv"}, "image": {"image_mode": "RGB"}, "audio": {"x": 1}}, None, {}, {}),
            (None, {"fps": 2, "max_pixels": 9}, {"max_pixels": 9}, {"fps": 2.0, "max_pixels": 9}),
            (None, {"fps": 2, "do_sample_frames": True}, {}, {"fps": 2.0}),
            ({"video": {"fps": 3}}, {"num_frames": 4}, {}, {"num_frames": 4}),
            (
                None,
                {"max_pixels": 9, "images_kwargs": {"max_pixels": 8}, "videos_kwargs": {"fps": 1}},
                {"max_pixels": 8},
                {"max_pixels": 9, "fps": 1.0},
            ),
        ],
    )
    def test_options(self, media, processor, image, video):
        assert request_options(media, processor) == {"image": image, "video": video}

    @pytest.mark.parametrize(
        ("media", "processor", "message"),
        [
            ([1], None, r"media_io_kwargs is \[1\]; it must be an object"),
            ({"video": 3}, None, "media_io_kwargs.video is 3; it must be an object"),
            ({"film": {}}, None, "media_io_kwargs.film is not known; it must be image, video or audio"),
            ({"video": {"speed": 1}}, None, "media_io_kwargs.video.speed is not known"),
            ({"video": {"num_frames": -2}}, None, "media_io_kwargs.video.num_frames is -2; it must be a positive"),
            ({"image": {"fps": 2}}, None, "media_io_kwargs.image.fps is not known"),
            (None, "x", "mm_processor_kwargs is 'x'; it must be an object"),
            (None, {"speed": 1}, "mm_processor_kwargs.speed is not known"),
            (None, {"fps": -1}, "mm_processor_kwargs.fps is -1; it must be a positive number"),
            (None, {"images_kwargs": {"fps": 1}}, "mm_processor_kwargs.images_kwargs.fps is not known"),
            (None, {"fps": 1, "num_frames": 2}, "must not be given beside it"),
        ],
    )
    def test_what_is_refused(self, media, processor, message):
        refused(lambda: request_options(media, processor), message)

    def test_places_in_order(self, checkpoint, config, clip):
        """A part wins over mm_processor_kwargs, which win over media_io_kwargs, which win over defaults."""
        processor = Processor.from_checkpoint(checkpoint, config, defaults={"fps": 1})

        def frames(part=None, **options):
            content = [{"type": "video", "video": str(clip), **(part or {})}]
            return processor.plan([{"role": "user", "content": content}], **options).videos[0].frames

        media, values = {"video": {"fps": 2}}, {"fps": 3}
        assert frames() == 4
        assert frames(media_io_kwargs=media) == 8
        assert frames(media_io_kwargs=media, mm_processor_kwargs=values) == 12
        assert frames({"fps": 4}, media_io_kwargs=media, mm_processor_kwargs=values) == 16


def test_defaults_of_a_processor_are_options_too(checkpoint, config):
    for name, message in (("num_frames", "num_frames is 0"), ("video_start", "video_start is -1")):
        refused(
            lambda name=name: Processor.from_checkpoint(
                checkpoint, config, defaults={name: -1 if "start" in name else 0}
            ),
            message,
        )
    assert read_options("image", {"video_start": 3, "fps": 2}, "", shared=True) == {}
