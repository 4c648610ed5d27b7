"""Samples in the forms in which others write them."""

import json
from pathlib import Path

import pytest

from keye_jax.errors import UserError
from keye_jax.train.samples import Lines, read_conversation

FOLDER = Path("/data/clips")


def read(**values):
    return read_conversation(json.dumps(values).encode(), FOLDER)


def refused(**values) -> str:
    with pytest.raises(UserError) as error:
        read(**values)
    return str(error.value)


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


ANSWERED = [turn("user", "What?"), turn("assistant", "A ball.")]


class TestForms:
    def test_tags_become_parts(self):
        messages = [turn("user", "<image>See <video> and <video>: what?"), turn("assistant", "A <video> tag.")]
        sample = read(messages=messages, images=["a.png"], videos=["b.mp4", "https://host/c.mp4"])
        assert sample.messages[0]["content"] == [
            {"type": "image", "image": "/data/clips/a.png"},
            {"type": "text", "text": "See "},
            {"type": "video", "video": "/data/clips/b.mp4"},
            {"type": "text", "text": " and "},
            {"type": "video", "video": "https://host/c.mp4"},
            {"type": "text", "text": ": what?"},
        ]
        assert sample.messages[1]["content"] == "A <video> tag."
        assert sample.learn == [False, True]

    def test_without_tags_media_stand_before_the_question(self):
        sample = read(messages=[turn("system", "Be brief."), *ANSWERED], videos="/tmp/b.mp4")
        assert sample.messages[1]["content"] == [
            {"type": "video", "video": "/tmp/b.mp4"},
            {"type": "text", "text": "What?"},
        ]

    def test_tags_without_a_column_are_text(self):
        assert read(messages=[turn("user", "<video>"), ANSWERED[1]]).messages[0]["content"] == "<video>"

    def test_a_video_of_frames(self):
        sample = read(messages=ANSWERED, videos=[["1.png", "2.png"]])
        assert sample.messages[0]["content"][0]["video"] == ["/data/clips/1.png", "/data/clips/2.png"]

    def test_conversations(self):
        turns = [{"from": "human", "value": "<video>\nWhen?"}, {"from": "gpt", "value": "At 3 s."}]
        sample = read(video="b.mp4", conversations=turns, system="Be brief.", id=7)
        assert [message["role"] for message in sample.messages] == ["system", "user", "assistant"]
        assert sample.messages[1]["content"][0] == {"type": "video", "video": "/data/clips/b.mp4"}
        assert sample.learn == [False, False, True]
        assert sample.columns == {"id": 7}

    def test_loss_false_is_not_learnt(self):
        messages = [
            ANSWERED[0],
            turn("assistant", "Bad.", loss=False),
            ANSWERED[0],
            turn("assistant", "Good.", loss=True),
        ]
        sample = read(messages=messages, solution="Good.")
        assert sample.learn == [False, False, False, True]
        assert all("loss" not in message for message in sample.messages)
        assert sample.columns == {"solution": "Good."}

    def test_tools_may_be_text(self):
        tools = [{"type": "function", "function": {"name": "look"}}]
        assert read(messages=ANSWERED, tools=json.dumps(tools)).tools == read(messages=ANSWERED, tools=tools).tools

    def test_parts_are_left_as_they_are(self):
        parts = [{"type": "video", "video": "/tmp/b.mp4", "fps": 1}, {"type": "text", "text": "What?"}]
        assert read(messages=[turn("user", parts), ANSWERED[1]]).messages[0]["content"] == parts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "x"}, "messages is missing"),
        ({"messages": ["x"]}, "messages[0] is 'x'; it must be an object"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
        ({"messages": ANSWERED[:1]}, "messages holds nothing to learn"),
        (
            {"messages": [ANSWERED[0], turn("assistant", "x", loss="no")]},
            "messages[1].loss is 'no'; it must be true or",
        ),
        (
            {"messages": [turn("user", "<video><video>"), ANSWERED[1]], "videos": ["a"]},
            "videos has 1 file(s), but the messages have 2 <video> tag(s)",
        ),
    ],
)
def test_mistakes(values, message):
    assert message in refused(**values)


class TestLines:
    def test_empty_lines_are_left_out_and_numbers_are_those_of_the_file(self, tmp_path):
        (tmp_path / "x.jsonl").write_text("{}\n\n  \n[1]\n{2}")
        lines = Lines(tmp_path / "x.jsonl")
        assert [lines[index] for index in range(len(lines))] == [(1, b"{}\n"), (4, b"[1]\n"), (5, b"{2}")]

    def test_a_file_without_samples(self, tmp_path):
        (tmp_path / "x.jsonl").write_text("\n")
        with pytest.raises(UserError, match="it must hold at least one sample"):
            Lines(tmp_path / "x.jsonl")
        with pytest.raises(UserError, match="it must be a file that is there"):
            Lines(tmp_path / "y.jsonl")
