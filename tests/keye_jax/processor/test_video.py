"""Videos: the frames that a file holds, and that the decoded frames are the wanted ones."""

import sys
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from keye_jax.errors import UserError
from keye_jax.processor import decode
from keye_jax.processor.decode import VideoFile
from keye_jax.processor.image import patchify
from keye_jax.processor.video import frame_indices


def numbers(clips, video, indices):
    """(index used, number that the pixels show) of each frame read."""
    return [(index, clips.number(pixels)) for index, pixels in video.read(np.asarray(indices))]


def pairs(indices):
    return [(index, index) for index in np.asarray(indices).tolist()]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("a.mp4", {}),
        ("sound.mp4", {"audio": True}),
        ("no_count.mkv", {}),
        ("a.webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}}),
        ("a.ts", {}),
        ("b_frames.avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
        ("h264.avi", {}),
        ("ntsc.mkv", {"rate": Fraction(30000, 1001)}),
    ],
)
def test_containers(clips, tmp_path, name, given):
    video = VideoFile(clips.write(tmp_path / name, **given), "video")
    rate = float(given.get("rate", 10))
    assert video.info.num_frames == 40
    assert (video.info.height, video.info.width) == (48, 128)
    assert video.info.native_fps == pytest.approx(rate)
    np.testing.assert_allclose(video.info.times, np.arange(40) / rate)
    for wanted in ([0, 13, 26, 39], range(40), [39], [17, 18]):
        assert numbers(clips, video, wanted) == pairs(wanted)


def test_matroska_has_no_frame_count(clips, tmp_path):
    with av.open(str(clips.write(tmp_path / "a.mkv"))) as container:
        assert container.streams.video[0].frames == 0


def test_raw_stream_without_times(clips, tmp_path):
    video = VideoFile(clips.write(tmp_path / "a.h264"), "video")
    assert numbers(clips, video, [0, 5, 39]) == pairs([0, 5, 39])


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_variable_frame_rate_keeps_the_files_times(clips, tmp_path, name):
    stamps = np.cumsum(np.random.default_rng(0).integers(20, 300, 40)) + 500
    video = VideoFile(clips.write(tmp_path / name, milliseconds=stamps), "video")
    times = (stamps - stamps[0]) / 1000
    np.testing.assert_allclose(video.info.times, times, atol=1.1e-3)
    assert video.info.native_fps == pytest.approx(40 / times[-1], rel=0.05)
    indices = frame_indices(video.info.num_frames, video.info.native_fps)
    assert numbers(clips, video, indices) == pairs(indices)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation(clips, tmp_path, degrees):
    video = VideoFile(clips.write(tmp_path / "a.mp4", frames=6, rotation=degrees), "video")
    assert (video.info.height, video.info.width) == ((48, 128) if degrees == 180 else (128, 48))
    for index, pixels in video.read(np.array([1, 5])):
        assert pixels.shape == (video.info.height, video.info.width, 3)
        # The display matrix turns counter-clockwise.
        assert clips.number(np.rot90(pixels, -degrees // 90)) == index


def test_mirrored(clips, tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = clips.width, clips.height, "yuv420p"
        stream.set_display_rotation(0, hflip=True)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(clips.picture(1), format="rgb24")))
        container.mux(stream.encode())
    _, pixels = next(VideoFile(tmp_path / "a.mp4", "video").read(np.array([0])))
    assert clips.number(pixels) == 1 << 15


@pytest.mark.parametrize("interval", [1000, 50])
def test_long_file_decodes_what_is_needed_in_bounded_memory(clips, tmp_path, monkeypatch, interval):
    options = {"preset": "ultrafast", "g": str(interval), "keyint_min": str(interval), "sc_threshold": "0", "bf": "2"}
    path = clips.write(tmp_path / "long.mp4", 3000, rate=25, options=options)
    video = VideoFile(path, "video")
    decoded = 0
    index = decode._Decoder._index

    def counting(self, frame):
        nonlocal decoded
        decoded += 1
        return index(self, frame)

    monkeypatch.setattr(decode._Decoder, "_index", counting)
    wanted = np.array([3, 700, 1555, 1556, 2999])
    tracemalloc.start()
    assert numbers(clips, video, wanted) == pairs(wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert decoded <= (200 if interval == 50 else 2600)
    assert peak < 2 << 20
    many = frame_indices(3000, 25.0)
    assert numbers(clips, video, many) == pairs(many)


def test_bytes_are_read_like_a_file(clips, clip):
    video = VideoFile(clip.read_bytes(), "video")
    assert numbers(clips, video, [2, 30]) == pairs([2, 30])


def test_truncated_file(clips, tmp_path):
    whole = clips.write(tmp_path / "a.mkv", 60).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    video = VideoFile(tmp_path / "cut.mkv", "video")
    assert 20 < video.info.num_frames < 60
    indices = frame_indices(video.info.num_frames, video.info.native_fps)
    # Incomplete frames may come before the last complete one. So the time, not the index, identifies a frame.
    for index, number in numbers(clips, video, indices):
        assert video.info.times[index] == pytest.approx(number / 10)


def test_damaged_frames_are_replaced_by_the_nearest_with_its_own_time(clips, tmp_path):
    video = VideoFile(clips.write_damaged(tmp_path / "a.mp4", 1, 2), "video")
    assert video.info.num_frames == 40
    assert numbers(clips, video, [5, 12, 18, 25]) == [(5, 5), (9, 9), (20, 20), (25, 25)]


def test_one_frame(clips, tmp_path):
    video = VideoFile(clips.write(tmp_path / "a.mp4", 1), "video")
    assert video.info.times.tolist() == [0.0]
    assert numbers(clips, video, [0]) == [(0, 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no video at all", "video is not a video that can be read .15 bytes.: Invalid data"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "video is not a video that can be read"),
        (b"ffconcat version 1.0\nfile a.mp4\n", "video is not a video that can be read"),
    ],
)
def test_not_a_video(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        VideoFile(content, "video")
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(UserError, match="video is not a video that can be read"):
        VideoFile(tmp_path / "a.mp4", "video")


def test_truncated_index(clip, tmp_path):
    (tmp_path / "a.mp4").write_bytes(clip.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"video has no index .*a\.mp4"):
        VideoFile(tmp_path / "a.mp4", "video")


def test_only_sound(sound):
    with pytest.raises(UserError, match=r"video holds no video stream .*; it must be a video, not only sound"):
        VideoFile(sound, "video")


def test_without_pyav(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"video is a video, which needs PyAV: pip install 'keye-jax\[video\]'"):
        VideoFile(clip, "video")


def test_frames_shown_are_bilinear(processor, clip):
    part = {"type": "video", "video": str(clip), "fps": 1}
    plan = processor.plan([{"role": "user", "content": [part]}])
    inputs = processor.process(plan)
    (video,) = plan.videos
    expected = [
        patchify(np.asarray(Image.fromarray(pixels).resize((video.width, video.height), Image.Resampling.BILINEAR)), 14)
        for _, pixels in video.source.read(video.indices)
    ]
    # The decoder's library scales brightness and colour before it makes RGB of them.
    difference = np.abs(inputs.video_patches.astype(int) - np.concatenate(expected))
    assert difference.mean() < 1 and difference.max() < 24
