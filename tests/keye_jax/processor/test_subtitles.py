"""Subtitles of all kinds, and where they stand in the prompt."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.processor.prompt import ChatTemplate, SafeTokenizer
from keye_jax.processor.settings import ProcessorSettings, read_template
from keye_jax.processor.subtitles import Cue, clip_cues, container_subtitles, read_subtitles

SRT = """1
00:00:01,000 --> 00:00:02,500
<i>Good</i> morning,
{\\an8}Tom &amp; Ann.

2
00:00:03,000 --> 00:00:04,000 X1:10 X2:20
a < b <|im_end|>
"""
VTT = """WEBVTT - a title

NOTE two
lines

STYLE
::cue { color: red }

intro
00:01.000 --> 00:02.500 align:start
<v Ann><c.yellow>Good</c> morning,
Tom <00:01.500>&amp; Ann.

00:00:03.000 --> 00:00:04.000
a &lt; b &lt;|im_end|&gt;
"""
CUES = (Cue(1.0, 2.5, "Good morning, Tom & Ann."), Cue(3.0, 4.0, "a < b <|im_end|>"))


def read(data, seen=None):
    return read_subtitles(data, "subtitles", [].append if seen is None else seen.append)


@pytest.mark.parametrize("text", [SRT, VTT, "".join(json.dumps(dataclasses.asdict(cue)) + "\n" for cue in CUES)])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("encoding", "word"), [("utf-8", "朝"), ("utf-8-sig", "朝"), ("utf-16", "朝"), ("latin-1", "matin déjà")]
)
def test_formats_and_encodings(text, end, encoding, word, tmp_path):
    expected = (dataclasses.replace(CUES[0], text=CUES[0].text.replace("morning", word)), CUES[1])
    data = text.replace("morning", word).replace("\n", end).encode(encoding)
    seen = []
    assert read(data, seen) == expected
    (tmp_path / "a.srt").write_bytes(data)
    assert read(tmp_path / "a.srt", seen) == expected
    assert not seen


def test_utf16_without_the_order_of_its_container():
    assert read(b"\xfe\xff" + SRT.encode("utf-16-be")) == CUES


def test_cues_are_sorted_and_need_no_empty_line():
    text = "2\n0:0:3,0 --> 0:0:4,0\nb\n1\n00:00:01,5 --> 00:00:02,000\na\n"
    assert read(text.encode()) == (Cue(1.5, 2.0, "a"), Cue(3.0, 4.0, "b"))


@pytest.mark.parametrize(
    "broken",
    [
        "3\n00:00:09,000 -> 00:00:10,000\nno arrow\n",
        "3\n00:00:10,000 --> 00:00:09,000\nends before it starts\n",
        "3\n00:00:0x,000 --> 00:00:09,000\nno number\n",
        "only text\n",
    ],
)
def test_broken_cues_are_left_out_and_counted(broken):
    seen = []
    assert read(f"{SRT}\n{broken}".encode(), seen) == CUES
    assert seen == ["subtitles has 1 broken of 3 subtitles; they are left out"]


@pytest.mark.parametrize(
    "line", ["{", '{"start": 1, "end": 2}', '{"start": "x", "end": 2, "text": "a"}', "[]", "1e999"]
)
def test_broken_lines_are_left_out_and_counted(line):
    seen = []
    assert read(f'{{"start": 1, "end": 2, "text": "a"}}\n{line}\n\n'.encode(), seen) == (Cue(1.0, 2.0, "a"),)
    assert seen == ["subtitles has 1 broken of 2 subtitles; they are left out"]


@pytest.mark.parametrize("data", [b"", b"hello", b"\0\1\2\3" * 50, b"WEBVTT\n\n", b"{}", b"\xff\xfe"])
def test_not_subtitles(data):
    with pytest.raises(UserError, match="subtitles holds no subtitles; it must be SRT, WebVTT, or JSON lines"):
        read(data)


def test_clip():
    cues = (Cue(0, 1, "a"), Cue(2, 3, "b"), Cue(4, 5, "c"))
    assert clip_cues(cues, None, None) == cues
    assert clip_cues(cues, 2.5, 4.0) == cues[1:2]
    assert clip_cues(cues, 3.5, None) == cues[2:]


def write_with_subtitles(path, clips, codec, texts):
    """A clip of 4 s with a stream of subtitles, (start, end, text)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = clips.width, clips.height, "yuv420p"
        subtitle = container.add_mux_stream(codec)
        for index in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(clips.picture(index), format="rgb24")))
        container.mux(stream.encode())
        for start, end, text in texts:
            packet = av.Packet(text)
            packet.stream, packet.time_base = subtitle, Fraction(1, 1000)
            packet.pts = packet.dts = round(start * 1000)
            packet.duration = round((end - start) * 1000)
            container.mux(packet)
    return path


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "subrip"), ("a.mp4", "mov_text"), ("a.mkv", "ass")])
def test_streams_of_a_container(clips, tmp_path, name, codec):
    lines = ["<i>One</i>", "two, and three"]
    packets = {
        "subrip": [line.encode() for line in lines],
        "mov_text": [len(line).to_bytes(2) + line.encode() for line in lines],
        "ass": [f"{i},0,Default,,0,0,0,,{{\\i1}}{line}".encode() for i, line in enumerate(lines)],
    }[codec]
    path = write_with_subtitles(tmp_path / name, clips, codec, [(0.5, 1.5, packets[0]), (2.0, 3.0, packets[1])])
    expected = (Cue(0.5, 1.5, "One"), Cue(2.0, 3.0, "two, and three"))
    for source in (path, path.read_bytes()):
        assert container_subtitles(source, "video") == expected


def test_a_container_without_subtitles(clip):
    with pytest.raises(UserError, match="video has no text subtitles; give them as a file, or leave subtitles out"):
        container_subtitles(clip, "video")
    with pytest.raises(UserError, match="video is not a file with subtitles that can be read"):
        container_subtitles(b"nothing", "video")


def make(checkpoint, config, **video):
    settings = ProcessorSettings.from_checkpoint(checkpoint, config.vision_config)
    settings = dataclasses.replace(settings, video=dataclasses.replace(settings.video, fps=1.0, **video))
    template = ChatTemplate(*read_template(checkpoint))
    return Processor(SafeTokenizer(checkpoint / "tokenizer.json"), template, config, settings)


def shown(processor, clip):
    plan = processor.plan([{"role": "user", "content": [{"type": "video", "video": str(clip)}]}])
    inputs = processor.process(plan)
    assert len(inputs.input_ids) == plan.num_tokens
    text = processor.detokenize(inputs.input_ids, skip_special_tokens=False)
    return text.replace("<|video_pad|>" * plan.videos[0].tokens_per_frame, "#"), inputs


def test_subtitles_stand_before_the_frames_at_their_times(checkpoint, config, clip, tmp_path):
    path = tmp_path / "a.srt"
    path.write_text(SRT + "\n3\n00:00:03,950 --> 00:00:05,000\nThe end.\n")
    processor = make(checkpoint, config, subtitles=str(path))
    text, inputs = shown(processor, clip)
    times = inputs.frame_times[0]
    np.testing.assert_allclose(times, [0, 1.3, 2.6, 3.9])
    assert (
        "<|vision_start|><|frame|>0.0#Good morning, Tom & Ann.\n<|frame|>1.3#<|frame|>2.6#a < b <|im_end|>\n"
        "<|frame|>3.9#The end.\n<|vision_end|>"
    ) in text
    assert inputs.input_ids.tolist().count(processor.token_id("<|im_end|>")) == 1  # the template's own
    text, _ = shown(make(checkpoint, config, subtitles=str(path), start=2.8, end=3.5), clip)
    assert "a < b" in text and "morning" not in text and "The end" not in text
    assert "morning" not in shown(make(checkpoint, config), clip)[0]


def test_warnings_about_subtitles_reach_the_inputs(checkpoint, config, clip, tmp_path):
    path = Path(tmp_path / "a.srt")
    path.write_text(f"{SRT}\nbroken\n")
    _, inputs = shown(make(checkpoint, config, subtitles=str(path)), clip)
    assert inputs.warnings == ("subtitles has 1 broken of 3 subtitles; they are left out",)


def test_subtitles_of_the_container_in_a_request(checkpoint, config, clips, tmp_path):
    path = write_with_subtitles(tmp_path / "a.mkv", clips, "subrip", [(0.5, 1.5, b"Hello."), (2.0, 3.0, b"Bye.")])
    text, _ = shown(make(checkpoint, config, subtitles="container"), path)
    assert "<|frame|>0.0#Hello.\n<|frame|>1.3#Bye.\n<|frame|>2.6#" in text
