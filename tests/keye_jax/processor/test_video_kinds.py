"""Videos as people have them: joined, cut short, turned, with several streams, interlaced, transparent, in HDR."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from keye_jax.errors import UserError
from keye_jax.processor import hdr
from keye_jax.processor.decode import VideoFile
from keye_jax.processor.pixels import Picture

SMALL = {"preset": "veryfast", "g": "10"}


def numbers(clips, video, indices):
    """(index used, number that the pixels show) of each frame read."""
    return [(index, clips.number(pixels)) for index, pixels in video.read(np.asarray(indices))]


def pairs(indices):
    return [(index, index) for index in np.asarray(indices).tolist()]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.ts", "libx264"), ("a.mpg", "mpeg2video"), ("a.ts", "mpeg2video"), ("a.m2v", "mpeg2video")],
)
def test_time_lines_that_begin_again_go_on(clips, tmp_path, name, codec):
    path, content = tmp_path / name, b""
    for part in range(3):
        options = {"libx264": SMALL, "mpeg2video": {"bf": "2", "b": "2000000"}}.get(codec, {"deadline": "realtime"})
        clips.write(path, 50, first=50 * part, codec=codec, rate=25, options=options)
        content += path.read_bytes()
    path.write_bytes(content)
    video = VideoFile(path, "video")
    assert video.info.num_frames == 150
    assert video.info.native_fps == pytest.approx(25)
    np.testing.assert_allclose(video.info.times, np.arange(150) / 25, atol=1e-3)
    for wanted in ([0, 49, 50, 99, 100, 149], [120], range(0, 150, 13)):
        assert numbers(clips, video, wanted) == pairs(wanted)


@pytest.mark.parametrize("later", [90_000, -90_000])
def test_a_time_line_may_begin_again_anywhere(clips, tmp_path, later):
    offsets = (max(0, -later), max(0, later))
    path, content = tmp_path / "a.ts", b""
    for part, offset in enumerate(offsets):
        clips.write(path, 50, first=50 * part, rate=25, muxer={"output_ts_offset": str(offset)})
        content += path.read_bytes()
    path.write_bytes(content)
    video = VideoFile(path, "video")
    assert video.info.num_frames == 150 - 50
    np.testing.assert_allclose(video.info.times, np.arange(100) / 25, atol=1e-3)
    assert numbers(clips, video, [0, 60, 99]) == pairs([0, 60, 99])


def test_a_pause_of_a_recording_is_none_in_a_file_of_its_own(clips, tmp_path):
    stamps = np.concatenate([np.arange(20) * 100, 30_000 + np.arange(20) * 100])
    video = VideoFile(clips.write(tmp_path / "a.mp4", milliseconds=stamps), "video")
    np.testing.assert_allclose(video.info.times, stamps / 1000, atol=1e-3)
    assert not video.info.constant


@pytest.mark.parametrize(("name", "codec"), [("a.h264", "libx264"), ("a.m4v", "mpeg4"), ("a.m2v", "mpeg2video")])
def test_raw_streams_have_the_rate_of_their_codec(clips, tmp_path, name, codec):
    video = VideoFile(clips.write(tmp_path / name, 60, codec=codec, rate=30, options={"b": "2000000"}), "video")
    assert (video.info.num_frames, video.info.native_fps) == (60, 30.0)
    assert video.info.duration == 2.0
    assert numbers(clips, video, [0, 31, 59]) == pairs([0, 31, 59])


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *(
            ("a.mpg", "mpeg2video"),
            ("a.mpg", "mpeg1video"),
            ("a.asf", "mpeg4"),
            ("a.wmv", "wmv2"),
            ("a.flv", "libx264"),
        ),
        *(("a.ogv", "libvpx"), ("a.nut", "libx264"), ("a.ts", "libx264"), ("a.mxf", "mpeg2video"), ("a.ivf", "libvpx")),
    ],
)
def test_a_seek_leads_to_the_frame(clips, tmp_path, name, codec):
    options = {"g": "10", "b": "2000000"} | ({"bf": "2"} if codec.startswith(("mpeg", "libx")) else {})
    form = "ogg" if name == "a.ogv" else None
    video = VideoFile(clips.write(tmp_path / name, 200, codec=codec, rate=25, options=options, form=form), "video")
    assert video.info.num_frames == 200
    for wanted in ([150], [3, 100, 101, 199], range(7, 200, 31), [199]):
        assert numbers(clips, video, wanted) == pairs(wanted)


def test_open_groups_of_pictures(clips, tmp_path):
    options = {"x265-params": "log-level=none:open-gop=1:keyint=20:bframes=3", "preset": "ultrafast"}
    path = clips.write(tmp_path / "a.mkv", 100, codec="libx265", rate=25, options=options)
    video = VideoFile(path, "video")
    for wanted in ([58], [59], [61], range(100)):
        assert numbers(clips, video, wanted) == pairs(wanted)


def cut(path, part):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    return VideoFile(path, "video")


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.flv", "a.wmv", "faststart.mp4", "fragmented.mp4"])
def test_a_file_that_is_cut_short_says_so(clips, tmp_path, name):
    muxer = {
        "faststart.mp4": {"movflags": "faststart"},
        "fragmented.mp4": {"movflags": "frag_keyframe+delay_moov"},
    }.get(name)
    codec = "wmv2" if name == "a.wmv" else "libx264"
    options = {"g": "10", "b": "200000"}
    path = clips.write(tmp_path / name, 200, codec=codec, rate=25, options=options, muxer=muxer)
    assert VideoFile(path, "video").warnings == []
    video = cut(path, 0.6)
    (warning,) = video.warnings
    assert warning.startswith("video is cut short")
    assert 50 < video.info.num_frames < 190
    assert numbers(clips, video, [0, 40]) == pairs([0, 40])


def test_a_file_without_its_index_says_so(clips, tmp_path):
    path = clips.write(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"video has no index .*a\.mp4.*; the file is cut short"):
        cut(path, 0.5)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_in_every_container_that_has_it(clips, tmp_path, name, degrees):
    video = VideoFile(clips.write(tmp_path / name, 6, rotation=degrees), "video")
    assert (video.info.height, video.info.width) == ((48, 128) if degrees == 180 else (128, 48))
    for index, pixels in video.read(np.array([1, 5]), (video.info.height, video.info.width)):
        assert clips.number(np.rot90(pixels, -degrees // 90)) == index


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.avi", "mpeg4")]
)
@pytest.mark.parametrize("ratio", [Fraction(8, 9), Fraction(64, 45)])
def test_pixels_that_are_not_square(clips, tmp_path, name, codec, ratio):
    video = VideoFile(clips.write(tmp_path / name, 6, codec=codec, ratio=ratio), "video")
    assert (video.info.height, video.info.width) == (48, round(128 * ratio))
    ((_, pixels),) = video.read(np.array([3]))
    assert pixels.shape == (48, round(128 * ratio), 3)


def test_narrow_pixels_of_a_turned_video(clips, tmp_path):
    video = VideoFile(clips.write(tmp_path / "a.mp4", 3, ratio=Fraction(1, 2), rotation=90), "video")
    assert (video.info.height, video.info.width) == (64, 48)


def write_streams(path, streams, pictures=()):
    """Writes streams of one colour each: rows (height, width, colour, whether it is the default one)."""
    with av.open(str(path), "w") as container:
        rows = []
        for height, width, colour, default in streams:
            stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.disposition = type(stream.disposition).default if default else type(stream.disposition)(0)
            rows.append((stream, np.full((height, width, 3), colour, np.uint8)))
        for height, width, colour in pictures:
            stream = container.add_stream("mjpeg", rate=1)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuvj420p"
            stream.disposition = type(stream.disposition).attached_pic
            rows.insert(0, (stream, np.full((height, width, 3), colour, np.uint8)))
        for stream, picture in rows:
            attached = stream.disposition & type(stream.disposition).attached_pic
            for _ in range(1 if attached else 5):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "streams", "pictures", "size"),
    [
        ("a.mkv", [(48, 64, 0, False), (96, 128, 255, False), (64, 64, 90, False)], [], (96, 128)),
        ("a.mkv", [(48, 64, 0, True), (96, 128, 255, False)], [], (48, 64)),
        ("a.ts", [(48, 64, 0, False), (96, 128, 255, False)], [], (96, 128)),
        ("a.mp4", [(48, 64, 0, True)], [(480, 640, 255)], (48, 64)),
    ],
)
def test_the_film_among_several_streams(tmp_path, name, streams, pictures, size):
    info = VideoFile(write_streams(tmp_path / name, streams, pictures), "video").info
    assert (info.height, info.width, info.num_frames) == (*size, 5)


def test_fields_become_whole_frames(tmp_path):
    """A bar moves to the right by 8 pixels from field to field."""
    path = tmp_path / "a.mp4"

    def field(number):
        picture = np.zeros((96, 256, 3), np.uint8)
        picture[:, 8 * number : 8 * number + 32] = 255
        return picture

    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "flags": "+ilme+ildct", "x264-params": "interlaced=1:tff=1"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 96, 256, "yuv420p"
        for number in range(10):
            picture = field(2 * number)
            picture[1::2] = field(2 * number + 1)[1::2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    video = VideoFile(path, "video")
    for indices in ([4], [0, 3, 9], range(10)):
        for index, pixels in video.read(np.asarray(indices)):
            bar = pixels[10:-10, :, 1].astype(int)
            # The lines of a comb differ from those above and below them by as much as the bar is bright.
            assert np.abs(bar[1:] - bar[:-1]).max() < 60
            assert abs(np.flatnonzero(bar.mean(0) > 128).mean() - (16 * index + 15.5)) < 9


@pytest.mark.parametrize(
    ("name", "codec", "form"),
    [
        *(
            ("a.webm", "libvpx-vp9", "yuva420p"),
            ("a.webm", "libvpx", "yuva420p"),
            ("a.mov", "prores_ks", "yuva444p10le"),
        ),
        *(("a.mov", "qtrle", "argb"), ("a.mkv", "ffv1", "bgra"), ("a.mov", "png", "rgba"), ("a.apng", "apng", "rgba")),
    ],
)
def test_transparency_is_over_white(tmp_path, name, codec, form):
    """The left half is green, and the right half transparent green."""
    picture = np.zeros((48, 64, 4), np.uint8)
    picture[..., 1], picture[:, :32, 3] = 255, 255
    with av.open(str(tmp_path / name), "w") as container:
        options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, form
        if name == "a.webm":
            stream.metadata["alpha_mode"] = "1"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        container.mux(stream.encode())
    for size in (None, (24, 32)):
        for _, pixels in VideoFile(tmp_path / name, "video").read(np.array([0, 2]), size):
            left, right = pixels[:, : pixels.shape[1] // 4], pixels[:, -pixels.shape[1] // 4 :]
            np.testing.assert_allclose(left.mean((0, 1)), [0, 255, 0], atol=12)
            np.testing.assert_allclose(right.mean((0, 1)), [255, 255, 255], atol=4)


def write_hdr(path, signal, transfer):
    """Writes RGB of BT.2020 in the transfer function given, four columns; signals from 0 to 1."""
    picture = np.repeat(np.asarray(signal, float) * 65535, 32, axis=0)[None].repeat(64, 0).astype(np.uint16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=10, options={"x265-params": "log-level=none"})
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, transfer, 9, 1
        frame = av.VideoFrame.from_ndarray(picture, format="rgb48le").reformat(
            format="yuv420p10le", dst_colorspace=9, dst_color_range=1
        )
        for number in range(3):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def pq(light):
    power = (np.asarray(light) / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


@pytest.mark.parametrize("transfer", [hdr.PQ, hdr.HLG])
def test_hdr_is_shown_as_the_same_scene_in_sdr(tmp_path, transfer):
    """Grey of 18% of white, white of 141 cd/m2, highlights of 1,000 cd/m2, and red."""
    if transfer == hdr.PQ:
        signal = [[pq(36.5)] * 3, [pq(141)] * 3, [pq(1000)] * 3, pq([127.4, 14.0, 3.3])]
        expected = [[125] * 3, [219] * 3, [255] * 3, [242, 0, 0]]
    else:
        signal = [[0.38] * 3, [0.75] * 3, [1.0] * 3, [0.75, 0.34, 0.18]]
        expected = [[109] * 3, [242] * 3, [255] * 3, [247, 53, 33]]
    video = VideoFile(write_hdr(tmp_path / "a.mp4", signal, transfer), "video")
    for size in (None, (32, 64)):
        ((_, pixels),) = video.read(np.array([1]), size)
        width = pixels.shape[1] // 4
        shown = [pixels[4:-4, width * column + 4 : width * column + width - 4].mean((0, 1)) for column in range(4)]
        np.testing.assert_allclose(shown, expected, atol=16)


def test_the_curve_of_hdr_rises_and_keeps_dark_tones():
    values = np.arange(0, 65536, 64, dtype=np.uint16)[None, :, None].repeat(3, 2)
    shown = hdr.to_sdr(values, hdr.PQ, 1)[0, :, 0].astype(int)
    assert (np.diff(shown) >= 0).all() and shown[0] == 0 and shown[-1] == 255
    light = hdr._pq_table()[values[0, :, 0]] / hdr.REFERENCE_WHITE
    dark = light < 0.75
    np.testing.assert_allclose(shown[dark], 255 * light[dark] ** (1 / 2.4), atol=3)


def test_animated_webp_is_a_video(clips, tmp_path):
    first, *others = [Image.fromarray(clips.picture(number)) for number in range(10)]
    first.save(tmp_path / "a.webp", save_all=True, append_images=others, duration=100, lossless=True)
    for source in (tmp_path / "a.webp", (tmp_path / "a.webp").read_bytes()):
        video = VideoFile(source, "video")
        assert (video.info.num_frames, video.info.native_fps) == (10, 10.0)
        assert numbers(clips, video, [0, 4, 9]) == pairs([0, 4, 9])


def test_motion_jpeg_without_a_container(clips, tmp_path):
    with (tmp_path / "a.mjpeg").open("wb") as file:
        for number in range(30):
            Image.fromarray(clips.picture(number)).save(file, "JPEG")
    video = VideoFile(tmp_path / "a.mjpeg", "video")
    assert (video.info.num_frames, video.info.native_fps) == (30, 25.0)
    assert numbers(clips, video, [0, 11, 29]) == pairs([0, 11, 29])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF"])
def test_a_picture_is_no_video(tmp_path, form):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a", form)
    with pytest.raises(UserError, match="video is a picture; use --image, or a part of type image"):
        VideoFile(tmp_path / "a", "video")


def test_frames_that_cannot_be_decoded_are_counted(clips, processor, tmp_path):
    path = clips.write_damaged(tmp_path / "a.mp4", 1, 2)
    inputs = processor.process(processor.plan([{"role": "user", "content": [{"type": "video", "video": str(path)}]}]))
    (times,) = inputs.undecodable_times
    assert ((times >= 1) & (times < 2)).all() and len(times) == 2
    (warning,) = [warning for warning in inputs.warnings if "decoded" in warning]
    assert "2 of 8 frames cannot be decoded, from 1.1 to 1.7 s" in warning


def test_what_the_container_cuts_off_is_not_shown():
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    for orientation, shown in (((1, 0, 0, 1), picture[8:60, :64]), ((0, 1, -1, 0), np.rot90(picture[8:60, :64], -1))):
        look = Picture(size=shown.shape[:2], crop=(8, 4, 0, 32), orientation=orientation)
        np.testing.assert_array_equal(look.pixels(frame, look.size), shown)
