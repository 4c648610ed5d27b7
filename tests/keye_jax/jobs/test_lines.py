import io
import json

import pytest

from keye_jax.errors import UserError
from keye_jax.jobs import lines
from keye_jax.jobs.lines import BadLine, Line, Shard, encode, read_lines, result_key, video_lines
from tests.keye_jax.jobs.fake import line

WHOLE = Shard()


def read(content: bytes, shard: Shard = WHOLE):
    return list(read_lines(io.BytesIO(content), shard))


def test_a_line_is_read():
    [got] = read(line("a", "hi", n=2))
    assert got == Line(1, "a", {"messages": [{"role": "user", "content": "hi"}], "n": 2})


def test_blank_lines_are_skipped_and_counted():
    assert [got.number for got in read(b"\n" + line("a") + b"  \r\n" + line("b").rstrip(b"\n"))] == [2, 4]


def test_a_byte_order_mark_is_skipped():
    assert read(b"\xef\xbb\xbf" + line("a")) == read(line("a"))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "line 1 is '{'; it must be JSON"),
        (b"\xff\xfe\xfd", "it must be JSON"),
        (b'{"custom_id": "\xff"}', "it must be JSON"),
        (b"[1, 2]", "line 1 is '[1, 2]'; it must be an object with custom_id, method, url and body"),
        (b"null", "it must be an object"),
        (b'"text"', "it must be an object"),
        (b"[" * 100_000, "levels deep|it must be JSON"),
        (b'{"a":' * 100_000, "levels deep|it must be JSON"),
        (b'{"custom_id": ' + b"9" * 5000 + b"}", "5,000 digits"),
        (b"{}", "line 1: custom_id is None; it must be a string that is not empty"),
        (b'{"custom_id": 7}', "custom_id is 7"),
        (b'{"custom_id": ""}', "custom_id is ''"),
        (b'{"custom_id": ["a"]}', r"custom_id is \['a'\]"),
        (b"\0", "it must be JSON"),
    ],
)
def test_an_unusable_line_fails_alone(content, message):
    bad, good = read(content + b"\n" + line("a"))
    assert isinstance(bad, BadLine) and (bad.number, bad.custom_id, bad.code) == (1, None, "invalid_line")
    if "levels" in message:
        assert any(part in bad.message for part in message.split("|"))
    else:
        assert message.replace("\\", "") in bad.message
    assert "\n" not in bad.message and len(bad.message) < 400
    assert isinstance(good, Line)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "GET"}, "method is 'GET'; it must be 'POST'"),
        ({"url": "/v1/embeddings"}, "url is '/v1/embeddings'; it must be '/v1/chat/completions'"),
        ({"url": None}, "url is None; it must be '/v1/chat/completions'"),
    ],
)
def test_another_method_or_url_is_refused_by_name(change, message):
    [got] = read(json.dumps(json.loads(line("a")) | change).encode())
    assert got == BadLine(1, "a", "invalid", message)


def test_half_a_surrogate_pair_comes_through():
    [got] = read(b'{"custom_id": "\\ud800", "method": "POST", "url": "/v1/chat/completions", "body": {}}')
    assert got.custom_id == "\ud800"
    assert json.loads(encode({"custom_id": got.custom_id})) == {"custom_id": "\ud800"}
    assert result_key("\ud800", None) != result_key("\ud801", None)


def test_other_text_is_written_as_it_is():
    assert encode({"a": "快手"}) == '{"a":"快手"}\n'.encode()


def test_a_line_that_is_too_long_fails_alone(monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 10)
    for length in (1024, 1025, 5000, 1024 * 4):
        bad, good = read(b"x" * length + b"\n" + line("a"))
        assert isinstance(bad, BadLine) and isinstance(good, Line)
        assert ("is too long" in bad.message) == (length > 1024)
    [bad] = read(b"x" * 3000)
    assert isinstance(bad, BadLine)


class TestDuplicates:
    def test_the_second_and_later_ones_are_named(self):
        first, second, third = read(line("a", "x") + line("a", "y") + line("a", "z"))
        assert isinstance(first, Line)
        assert second == BadLine(2, None, "duplicate_custom_id", "line 2: custom_id is 'a'; line 1 has the same")
        assert isinstance(third, BadLine) and third.number == 3

    def test_also_in_another_shard(self):
        content = line("a") + line("a") + line("b")
        assert [type(got) for got in read(content, Shard(1, 2))] == [BadLine]
        assert [got.custom_id for got in read(content, Shard(0, 2))] == ["a", "b"]


class TestShard:
    def test_shards_share_the_lines(self):
        content = b"\n".join(line(str(index)) for index in range(11))
        parts = [[str(got.custom_id) for got in read(content, Shard(index, 3))] for index in range(3)]
        assert parts[0] == ["0", "3", "6", "9"]
        assert sorted(int(each) for part in parts for each in part) == list(range(11))
        assert [len(part) for part in parts] == [Shard(index, 3).size(11) for index in range(3)]

    def test_of_the_command_line(self):
        assert Shard.parse("3/8") == Shard(3, 8)
        for text in ("8/8", "3", "-1/8", "a/b", "1/0", "0/0", "٣/٨", ""):
            with pytest.raises(UserError, match="from 0 to n - 1"):
                Shard.parse(text)

    def test_of_kubernetes(self):
        assert Shard.from_environment({"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "8"}) == Shard(3, 8)
        with pytest.raises(UserError, match="JOB_COMPLETIONS is not set; it must be the number of parts"):
            Shard.from_environment({"JOB_COMPLETION_INDEX": "3"})
        with pytest.raises(UserError, match="say part 8 of 8"):
            Shard.from_environment({"JOB_COMPLETION_INDEX": "8", "JOB_COMPLETIONS": "8"})
        with pytest.raises(UserError, match="JOB_COMPLETION_INDEX is 'x'; it must be a number"):
            Shard.from_environment({"JOB_COMPLETION_INDEX": "x", "JOB_COMPLETIONS": "8"})

    def test_of_slurm(self):
        names = ("ID", "COUNT", "MIN", "STEP")

        def read(*values):
            return Shard.from_environment(
                {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in zip(names, values, strict=False)}
            )

        assert read(0, 4) == Shard(0, 4)
        assert read(4, 4, 1) == Shard(3, 4)
        assert read(14, 3, 10, 2) == Shard(2, 3)
        with pytest.raises(UserError, match="SLURM_ARRAY_TASK_COUNT is not set"):
            read(1)

    def test_without_either(self):
        assert Shard.from_environment({}) == Shard(0, 1)

    def test_the_output_has_it_in_its_name(self, tmp_path):
        assert Shard(3, 8).output(tmp_path / "out.jsonl") == tmp_path / "out.3-of-8.jsonl"
        assert Shard().output(tmp_path / "out.jsonl") == tmp_path / "out.jsonl"


class TestVideos:
    def test_of_a_folder(self, tmp_path):
        for name in ("b.mp4", "a.mp4", "c.txt", "._a.mp4", "sub/d.mp4", "[x].mp4"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        got = [json.loads(each) for each in video_lines(f"{tmp_path}/*.mp4", "What?")]
        assert [each["custom_id"] for each in got] == ["[x].mp4", "a.mp4", "b.mp4"]
        [message] = got[1]["body"]["messages"]
        assert message["content"][0] == {"type": "video_url", "video_url": {"url": str(tmp_path / "a.mp4")}}
        assert message["content"][1] == {"type": "text", "text": "What?"}
        deep = [json.loads(each)["custom_id"] for each in video_lines(f"{tmp_path}/**/*.mp4", "What?")]
        assert deep == ["[x].mp4", "a.mp4", "b.mp4", "sub/d.mp4"]
        assert [json.loads(each)["custom_id"] for each in video_lines(f"{tmp_path}/sub/d.mp4", "?")] == ["d.mp4"]

    def test_relative_to_the_current_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a.mp4").touch()
        [got] = map(json.loads, video_lines("*.mp4", "?"))
        assert got["body"]["messages"][0]["content"][0]["video_url"]["url"] == str(tmp_path / "a.mp4")

    @pytest.mark.parametrize("pattern", ["", "/", "none/*.mp4", "*.none", "**x"])
    def test_a_pattern_without_files_is_refused(self, pattern, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match="--videos is"):
            list(video_lines(pattern, "?"))

    def test_a_name_that_is_not_utf_8(self, tmp_path):
        name = b"\xff.mp4".decode("utf-8", "surrogateescape")
        (tmp_path / name).touch()
        [got] = map(json.loads, video_lines(f"{tmp_path}/*.mp4", "?"))
        assert got["custom_id"] == name
