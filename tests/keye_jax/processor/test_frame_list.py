"""Videos that are lists of frames or animated pictures."""

import io

import numpy as np
import pytest
from PIL import Image

from keye_jax.errors import UserError
from keye_jax.processor.frame_list import AnimatedImage, FrameList

WHITE = [255, 255, 255]


def numbers(clips, video, indices):
    """(index used, number that the pixels show) of each frame read."""
    return [(index, clips.number(pixels)) for index, pixels in video.read(np.asarray(indices))]


def plan(processor, part):
    return processor.plan([{"role": "user", "content": [part]}])


def animation(frames, form, **options):
    file = io.BytesIO()
    if form == "WEBP":
        options |= {"lossless": True}
    frames[0].save(file, form, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


def test_frames_as_an_array_or_as_images(clips, tmp_path):
    array = np.stack([clips.picture(index) for index in range(5)])
    Image.fromarray(array[0]).save(tmp_path / "0.png")
    for frames in (array, list(array), [tmp_path / "0.png", *map(Image.fromarray, array[1:])]):
        video = FrameList(frames, 2.0, "video")
        assert video.info.times.tolist() == [0, 0.5, 1, 1.5, 2]
        assert numbers(clips, video, [0, 2, 4]) == [(0, 0), (2, 2), (4, 4)]
        assert video.warnings == []


def test_bad_arrays():
    with pytest.raises(UserError, match=r"video is an array float32\[2, 4, 4, 3\]; it must be uint8 \[F, H, W, 3\]"):
        FrameList(np.zeros((2, 4, 4, 3), np.float32), 2.0, "video")
    with pytest.raises(UserError, match="video is an empty list"):
        FrameList([], 2.0, "video")


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({"fps": 4}, np.arange(8) / 4),
        ({"fps": 1}, np.arange(8)),
        ({"fps": 0.7}, np.arange(8) / 0.7),
        ({}, np.arange(8) / 2),
        ({"fps": 4, "max_frames": 3}, [0, 1, 1.75]),
        ({"sample_fps": 8}, np.arange(8) / 8),
        ({"native_fps": 8, "fps": 4}, np.array([0, 2, 5, 7]) / 8),
    ],
)
def test_rate_of_a_list_is_that_at_which_it_was_taken(processor, clips, options, times):
    frames = [clips.picture(index) for index in range(8)]
    for value in (frames, np.stack(frames), {"url": frames}):
        inputs = processor.process(plan(processor, {"type": "video", "video": value, **options}))
        np.testing.assert_allclose(inputs.frame_times[0], times)


@pytest.mark.parametrize("rate", [0.1, 0.7, 1 / 3, 2.9, 23.976, 59.94])
def test_no_frame_of_a_list_is_lost_by_rounding(processor, rate):
    for count in (1, 2, 7, 29, 58):
        video = np.zeros((count, 28, 28, 3), np.uint8)
        (planned,) = plan(processor, {"type": "video", "video": video, "fps": rate}).videos
        assert planned.indices.tolist() == list(range(count))


def test_frames_of_several_sizes_and_turned_ones(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (200, 400), "red").save(tmp_path / "turned.jpg", exif=exif)
    frames = [Image.new("RGB", (400, 200), "blue"), str(tmp_path / "turned.jpg"), Image.new("RGB", (90, 100), "lime")]
    inputs = processor.process(plan(processor, {"type": "video", "video": frames[:2]}))
    assert inputs.warnings == ()
    inputs = processor.process(plan(processor, {"type": "video", "video": frames}))
    assert len({tuple(grid) for grid in inputs.video_grids.tolist()}) == 1
    (warning,) = inputs.warnings
    assert "video has frames of several sizes; all are resized as the first, 400x200" in warning


def test_a_frame_that_is_cut_off(processor):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(1, 256, (64, 64, 3), np.uint8)).save(file, "JPEG")
    frames = [np.zeros((64, 64, 3), np.uint8), file.getvalue()[:-1500]]
    (warning,) = processor.process(plan(processor, {"type": "video", "video": frames})).warnings
    assert "video[1] is cut off or damaged" in warning


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "AVIF"])
def test_animations(clips, form, tmp_path):
    frames = [Image.fromarray(clips.picture(index)) for index in range(5)]
    data = animation(frames, form, duration=[200, 50, 100, 400, 250])
    (tmp_path / "a").write_bytes(data)
    for source in (data, tmp_path / "a"):
        video = AnimatedImage(source, "video")
        assert (video.info.height, video.info.width) == (clips.height, clips.width)
        np.testing.assert_allclose(video.info.times, [0, 0.2, 0.25, 0.35, 0.75])
        assert video.info.duration == pytest.approx(1.0)
        assert numbers(clips, video, range(5)) == [(index, index) for index in range(5)]
        assert numbers(clips, video, [1, 4]) == [(1, 1), (4, 4)]
        assert video.warnings == []


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_frames_without_a_duration_last_as_in_browsers(form):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    video = AnimatedImage(animation(frames, form, duration=[0, 10, 20]), "video")
    np.testing.assert_allclose(video.info.times, [0, 0.1, 0.2])
    assert video.info.duration == pytest.approx(0.22)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "AVIF"])
def test_animations_lie_over_white(form):
    frames = []
    for column in (0, 1):
        pixels = np.zeros((32, 64, 4), np.uint8)
        pixels[:, column * 32 : column * 32 + 32] = 255, 0, 0, 255
        pixels[:4] = pixels[:, :4] = pixels[-4:, -4:] = 0
        frames.append(Image.fromarray(pixels))
    video = AnimatedImage(animation(frames, form, duration=100, disposal=2), "video")
    for (_, pixels), column in zip(video.read(np.arange(2)), (0, 1), strict=True):
        np.testing.assert_allclose(pixels[16, 16 + 32 * column].astype(int), [255, 0, 0], atol=8)
        np.testing.assert_allclose(pixels[16, 48 - 32 * column].astype(int), WHITE, atol=8)


def test_default_image_of_an_apng_is_not_a_frame(clips):
    frames = [Image.fromarray(clips.picture(index)) for index in range(4)]
    data = animation(frames, "PNG", duration=100, default_image=True)
    assert numbers(clips, AnimatedImage(data, "video"), range(3)) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("form", ["GIF", "PNG"])
def test_an_animation_that_is_cut_off(form):
    random = np.random.default_rng(0)
    frames = [Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(6)]
    data = animation(frames, form, duration=100)
    video = AnimatedImage(data[: len(data) * 6 // 10], "video")
    assert video.info.num_frames in (3, 4)
    assert video.warnings == [f"video is cut off or damaged; it is shown up to frame {video.info.num_frames}"]
    assert len(list(video.read(np.arange(video.info.num_frames)))) == video.info.num_frames
    with pytest.raises(UserError, match="video"):
        AnimatedImage(data[:40], "video")


def test_an_animation_in_a_request(processor, clips):
    frames = [Image.fromarray(clips.picture(index)) for index in range(6)]
    inputs = processor.process(
        plan(processor, {"type": "video", "video": animation(frames, "WEBP", duration=500), "fps": 2})
    )
    np.testing.assert_allclose(inputs.frame_times[0], np.arange(6) / 2)
    assert inputs.warnings == ()
