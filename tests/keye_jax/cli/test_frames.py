"""`keye-jax frames`: the pictures it writes are those that the model sees."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keye_jax.cli import app, run
from keye_jax.config import KeyeConfig
from keye_jax.processor import Processor
from keye_jax.processor.image import patchify
from keye_jax.testing import write_clip, write_picture, write_processor_files

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("frames")
    write_clip(path / "a.mp4", seconds=3, fps=8, size=(160, 96))
    write_picture(path / "a.png")
    return path


@pytest.fixture(scope="module")
def checkpoint(folder):
    config = KeyeConfig.from_file(ROOT / "configs/model/tiny.json")
    write_processor_files(folder / "checkpoint", config)
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config.to_dict()))
    return folder / "checkpoint"


def frames(capsys, *arguments):
    assert run(app, ["frames", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_exactly_what_the_model_sees(folder, checkpoint, tmp_path, capsys, name, with_checkpoint):
    options = ["--checkpoint", checkpoint] if with_checkpoint else []
    found = frames(capsys, folder / name, "--out", tmp_path / "new" / "out", *options)
    kind = "image" if name == "a.png" else "video"
    config = KeyeConfig.from_file(checkpoint)
    processor = Processor.from_checkpoint(checkpoint, config)
    plan = processor.plan([{"role": "user", "content": [{"type": kind, kind: str(folder / name)}]}])
    inputs = processor.process(plan)
    names = [row["file"] for row in found["frames"]]
    written = [np.asarray(Image.open(tmp_path / "new" / "out" / name)) for name in names]
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == names
    patches = inputs.image_patches if kind == "image" else inputs.video_patches
    np.testing.assert_array_equal(np.concatenate([patchify(pixels, 14) for pixels in written]), patches)
    assert (found["kind"], found["width"], found["height"]) == (kind, written[0].shape[1], written[0].shape[0])
    assert found["warnings"] == []
    if kind == "video":
        np.testing.assert_allclose([row["time"] for row in found["frames"]], inputs.frame_times[0], atol=1e-3)
        if with_checkpoint:
            assert found["num_tokens"] == plan.video_tokens
            assert found["frame_format"] == "keye-1.5"
        else:
            assert found["num_tokens"] == plan.videos[0].tokens_per_frame * plan.num_frames
            assert "text_tokens" not in found["frames"][0]
    else:
        assert found["num_tokens"] == plan.image_tokens


def test_without_out_nothing_is_decoded(folder, capsys, monkeypatch):
    monkeypatch.setattr("keye_jax.processor.decode.VideoFile.read", None)
    found = frames(capsys, folder / "a.mp4", "--fps", 1, "--max-frames", 2)
    assert len(found["frames"]) == 2
    assert run(app, ["frames", str(folder / "a.mp4")]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["index", "time", "tokens"]
    assert "video: 6 frame(s) of" in printed


@pytest.mark.parametrize("full", ["folder", "file"])
def test_nothing_is_overwritten(folder, tmp_path, capsys, full):
    out = tmp_path / "out"
    if full == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        out.write_text("mine")
    assert run(app, ["frames", str(folder / "a.mp4"), "--out", str(out)]) == 2
    assert "it must be a new or an empty directory" in capsys.readouterr().err
    assert (out / "mine.txt" if full == "folder" else out).read_text() == "mine"


def test_nothing_is_left_half_written(folder, tmp_path, capsys):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    assert run(app, ["frames", str(tmp_path / "bad.mp4"), "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert run(app, ["frames", str(tmp_path / "none.mp4"), "--out", str(tmp_path / "out")]) == 2
    assert list((tmp_path / "out").iterdir()) == []


def test_an_animation_and_warnings(tmp_path, capsys):
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=500)
    found = frames(capsys, tmp_path / "a.gif", "--out", tmp_path / "out")
    assert [row["time"] for row in found["frames"]] == [0, 0.5, 1.0]
    Image.fromarray(np.random.default_rng(0).integers(1, 256, (99, 99, 3), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:3000])
    found = frames(capsys, tmp_path / "cut.jpg", "--out", tmp_path / "cut")
    assert "FILE is cut off or damaged" in found["warnings"][0]
    assert run(app, ["frames", str(tmp_path / "cut.jpg"), "--out", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().err.startswith("warning: FILE is cut off or damaged")


def test_needs_no_jax(folder):
    program = (
        "import sys; from keye_jax.cli import app, run; "
        f"code = run(app, ['frames', {str(folder / 'a.mp4')!r}]); "
        "sys.exit(code or bool({'jax', 'flax', 'orbax'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)


def test_inspect_prints_the_text_of_a_frame(checkpoint, capsys):
    assert run(app, ["inspect", str(checkpoint), "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["frame_text"]
    assert text["format"] == "keye-1.5" and not text["guessed"] and text["tokens_per_frame"] > 5
    (checkpoint / "preprocessor_config.json").rename(checkpoint / "aside.json")
    assert run(app, ["inspect", str(checkpoint)]) == 0
    assert "tokens (keye-1.5, a guess: no file says it)" in capsys.readouterr().out
    (checkpoint / "aside.json").rename(checkpoint / "preprocessor_config.json")
