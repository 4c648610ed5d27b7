"""The demo's folder: what it may replace, and what it leaves alone."""

import subprocess
import sys

import pytest

from keye_jax import demo
from keye_jax.errors import UserError

MADE = {"orbax", "clip.mp4", demo.MARKER}


@pytest.fixture
def seeds(monkeypatch):
    """The seeds of the demos, which write files and ask nothing."""
    found = []

    def write(directory, seed):
        (directory / "orbax").mkdir()
        (directory / "clip.mp4").touch()
        found.append(seed)

    monkeypatch.setattr(demo, "answer_questions", write)
    return found


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["demo", *map(str, arguments)])
    return demo.main()


@pytest.mark.parametrize("there", [False, True])
def test_twice_in_a_new_or_an_empty_folder(there, tmp_path, monkeypatch, seeds):
    directory = tmp_path / "deep" / "demo"
    if there:
        directory.mkdir(parents=True)
    assert main(monkeypatch, directory, "--seed", 3) == 0
    assert {path.name for path in directory.iterdir()} == MADE
    (directory / "orbax" / "old").touch()
    (directory / "notes.txt").write_text("mine")
    assert main(monkeypatch, directory, "--seed", 4) == 0
    assert {path.name for path in directory.iterdir()} == MADE | {"notes.txt"}
    assert not (directory / "orbax" / "old").exists() and seeds == [3, 4]


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch, capsys, seeds):
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "params").write_text("precious")
    assert main(monkeypatch, tmp_path) == 2
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith(f"keye-jax: {str(tmp_path)!r} holds files") and not printed.out and not seeds
    assert [path.name for path in tmp_path.rglob("*")] == ["orbax", "params"]


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("text")
    with pytest.raises(UserError, match="is a file; it must be a new folder"):
        demo.prepare(path)
    assert path.read_text() == "text"


def test_a_link_is_removed_and_not_followed(tmp_path):
    outside, directory = tmp_path / "outside", tmp_path / "demo"
    outside.mkdir()
    (outside / "weights").touch()
    demo.prepare(directory)
    (directory / "orbax").symlink_to(outside)
    demo.prepare(directory)
    assert (outside / "weights").exists() and not (directory / "orbax").exists()


def test_without_pyav(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert main(monkeypatch, tmp_path / "new") == 2
    assert "pip install 'keye-jax[video]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_command_that_fails_ends_it(tmp_path, monkeypatch):
    def fail(directory, seed):
        raise subprocess.CalledProcessError(3, "convert")

    monkeypatch.setattr(demo, "answer_questions", fail)
    assert main(monkeypatch, tmp_path / "new") == 3


def test_the_clip_and_its_questions_follow_from_the_seed():
    scene, questions = demo.draw_clip(3)
    assert demo.draw_clip(3) == (scene, questions) != demo.draw_clip(4)
    assert tuple(question.kind for question in questions) == demo.ASKED
    assert len({question.text for question in questions}) == len(questions)


@pytest.mark.slow
def test_the_model_of_the_package_answers(tmp_path, monkeypatch, capsys):
    assert main(monkeypatch, tmp_path / "demo", "--seed", 3) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "$ keye-jax convert" in printed and "$ keye-jax plan" in printed
    for question in demo.draw_clip(3)[1]:
        assert question.text.split()[0] in printed and question.answer in printed
    assert any(f"{right} of 5 are right" in printed for right in (4, 5))
    assert "at most 128 earlier tokens" in printed
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"orbax", "clip.mp4", demo.MARKER}


def test_a_seed_that_is_not_allowed(tmp_path, monkeypatch, capsys):
    assert main(monkeypatch, tmp_path / "new", "--seed", -1) == 2
    assert "--seed is -1; it must be 0 or more" in capsys.readouterr().err


def test_no_folder_named(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch)
    assert stop.value.code == 2 and "DIR" in capsys.readouterr().err
