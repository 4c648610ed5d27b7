import errno
import json
import os

import pytest

from keye_jax.errors import UserError
from keye_jax.jobs.journal import JobStoppedError, Journal, checkpoint_hash, write_whole
from keye_jax.jobs.lines import encode, error_record, response_record, result_key

KEY = {"input": "a" * 64, "checkpoint": "b" * 64, "options": {"seed": 0, "fps": None}}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def begun(output):
    """An output with three results."""
    with Journal(output, KEY) as journal:
        journal.append([response_record("a", {"x": "快"}), error_record("b", "media", "broken")])
        journal.append([error_record(None, "invalid_line", "line 7 is bad", 7)])
    return output


def test_results_are_known_when_it_opens_again(begun):
    with Journal(begun, KEY) as journal:
        assert journal.finished == {result_key("a", None), result_key("b", None), result_key(None, 7)}
        assert (journal.succeeded, dict(journal.failures)) == (1, {"media": 1, "invalid_line": 1})


def test_a_torn_line_is_cut_off_wherever_it_ends(begun):
    whole = begun.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole)):
        begun.write_bytes(whole[:end])
        with Journal(begun, KEY) as journal:
            assert len(journal.finished) == 2
            assert begun.read_bytes() == whole[:start]
            journal.append([error_record("c", "media", "broken")])
        assert begun.read_bytes().startswith(whole[:start]) and begun.read_bytes().endswith(b"}\n")


def test_zeros_that_a_power_cut_leaves_are_cut_off(begun):
    whole = begun.read_bytes()
    begun.write_bytes(whole + b"\0" * 100 + b"\n" + b"\0" * 4000)
    with Journal(begun, KEY) as journal:
        assert len(journal.finished) == 3
    assert begun.read_bytes() == whole


def test_damage_before_a_result_is_refused(begun):
    first, rest = begun.read_bytes().split(b"\n", 1)
    begun.write_bytes(first[:-5] + b"\n" + rest)
    with pytest.raises(UserError, match="whose line 1 is no result"):
        Journal(begun, KEY)
    assert begun.read_bytes() == first[:-5] + b"\n" + rest


@pytest.mark.parametrize("text", [b"[]", b"7", b"{}", b'{"custom_id": 7, "error": 7}', b"{" * 100_000])
def test_what_is_no_result_is_none(begun, text):
    whole = begun.read_bytes()
    begun.write_bytes(whole + text + b"\n")
    with Journal(begun, KEY):
        assert begun.read_bytes() == whole


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": "c" * 64}, r"begun with another input \(SHA-256 aaaaaaaa..., now cccccccc...\); give the same"),
        ({"checkpoint": "c" * 64}, r"begun with another checkpoint \(SHA-256 bbbbbbbb..., now cccccccc...\)"),
        ({"options": {"seed": 1, "fps": None}}, r"begun with seed 0 \(now 1\); give the same, or another --output"),
        ({"options": {"seed": 0, "fps": 2.0}}, r"begun with fps null \(now 2.0\)"),
        ({"options": {"seed": 0}}, None),
    ],
)
def test_another_input_checkpoint_or_option_is_refused(begun, change, message):
    before = begun.read_bytes()
    if message is None:
        Journal(begun, KEY | change).__exit__()
    else:
        with pytest.raises(UserError, match=message):
            Journal(begun, KEY | change)
    assert begun.read_bytes() == before


def test_an_empty_output_takes_another_key(output):
    with Journal(output, KEY):
        pass
    with Journal(output, KEY | {"input": "c" * 64}) as journal:
        journal.append([error_record("a", "media", "broken")])
    with pytest.raises(UserError, match="another input"):
        Journal(output, KEY)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"input": 1, "checkpoint": 2, "options": 3}'])
def test_content_of_no_known_job_is_refused(begun, content):
    sidecar = begun.with_name("out.jsonl.journal.json")
    sidecar.unlink() if content is None else sidecar.write_bytes(content)
    with pytest.raises(UserError, match=r"does not say from which job|begun with"):
        Journal(begun, KEY)


def test_two_jobs_cannot_write_one_output(begun):
    with Journal(begun, KEY), pytest.raises(UserError, match="another job is writing it"):
        Journal(begun, KEY)
    Journal(begun, KEY).__exit__()


def test_an_output_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="it must be a regular file"):
        Journal(tmp_path / "pipe", KEY)
    with pytest.raises(JobStoppedError, match="cannot be written"):
        Journal(tmp_path, KEY)


class FullDisk:
    """`os.write` of a disk with some bytes left."""

    def __init__(self, left):
        self.left, self._write = left, os.write

    def __call__(self, file, data):
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(file, data[: self.left])
        self.left -= written
        return written


def test_a_full_disk_leaves_nothing_half_written(begun, monkeypatch):
    before = begun.read_bytes()
    records = [error_record("c", "media", "broken"), error_record("d", "media", "broken")]
    size = len(b"".join(map(encode, records)))
    for left in (0, 1, size // 2, size - 1):
        with Journal(begun, KEY) as journal, monkeypatch.context() as patch:
            patch.setattr(os, "write", FullDisk(left))
            with pytest.raises(JobStoppedError, match=r"out.jsonl cannot be written \(No space left on device\)"):
                journal.append(records)
        assert begun.read_bytes() == before
    with Journal(begun, KEY) as journal:
        journal.append(records)
    assert len(begun.read_bytes()) == len(before) + size


def test_results_that_may_not_be_on_the_disk_are_taken_back(begun, monkeypatch):
    before = begun.read_bytes()

    def fail(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Journal(begun, KEY) as journal:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(JobStoppedError, match="Input/output error"):
            journal.append([error_record("c", "media", "broken")])
    assert begun.read_bytes() == before


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def parts():
        yield b"new"
        raise OSError(errno.ENOSPC, "full")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError):
        write_whole(path, parts())
    assert path.read_bytes() == b"old"
    write_whole(path, [b"a", b"b"])
    assert path.read_bytes() == b"ab"
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_are_told_apart(tmp_path):
    folder = tmp_path / "a"
    (folder / ".cache").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_bytes(bytes(5 << 20))
    first = checkpoint_hash(folder)
    (folder / ".cache" / "lock").touch()
    os.utime(folder / "weights", (0, 0))
    assert checkpoint_hash(folder.rename(tmp_path / "b")) == first
    (tmp_path / "b" / "config.json").write_text("[]")
    second = checkpoint_hash(tmp_path / "b")
    with (tmp_path / "b" / "weights").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert len({first, second, checkpoint_hash(tmp_path / "b")}) == 3
    json.dumps(first)
