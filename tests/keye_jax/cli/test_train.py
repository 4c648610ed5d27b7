"""`keye-jax train`: mistakes, and a stranger's own clips."""

import dataclasses
import importlib.util
import json
import sys

import numpy as np
import pytest

from convert import convert, load_params
from convert.synthetic import write_checkpoint
from keye_jax import presets
from keye_jax.cli import app, run
from keye_jax.config import KeyeConfig
from keye_jax.testing import write_clip, write_processor_files


def error(capsys, *arguments) -> str:
    assert run(app, ["train", *map(str, arguments)]) == 2
    return capsys.readouterr().err


class TestMistakes:
    def test_files_that_do_not_go_with_the_stage(self, capsys, tmp_path):
        there = tmp_path / "data.jsonl"
        there.write_text("{}")
        given = ("--config", "lora", "--output", tmp_path / "run")
        assert "--data is missing; the stage's data.source is 'jsonl'" in error(capsys, *given)
        given += ("--data", there)
        assert "--checkpoint is missing" in error(capsys, *given)
        given += ("--checkpoint", tmp_path)
        assert "--evaluation is given; the stage's evaluate_every is 0" in error(capsys, *given, "--evaluation", there)
        assert "is not a checkpoint" in error(capsys, *given)
        generated = ("--config", "shapes_cpu", "--output", tmp_path / "run")
        assert "--data is given; the stage's data.source is 'shapes'" in error(capsys, *generated, "--data", there)

    def test_values(self, capsys, tmp_path):
        given = ("--config", "shapes_cpu", "--output", tmp_path / "run")
        assert "--stop-after is 0.0; it must be a positive number" in error(capsys, *given, "--stop-after", 0)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").touch()
        assert "it must be a new folder or an empty one" in error(capsys, *given, "--export", tmp_path / "full")
        assert "--export is missing; --export-step is 'best'" in error(capsys, *given, "--export-step", "best")
        assert "one of the presets: indexer_warmup, lora" in error(capsys, "--config", "x", "--output", tmp_path)
        (tmp_path / "stage.yaml").write_text("train: 3\nstep: 4\n")
        assert "has 2 mistakes" in error(capsys, "--config", tmp_path / "stage.yaml", "--output", tmp_path / "run")


def test_only_files_of_samples_need_grain(capsys, tmp_path, monkeypatch):
    """A run without a folder ends by another mistake, after the packages are looked for."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "grain" else find(name, *rest))
    monkeypatch.setitem(sys.modules, "grain", None)
    given = ("--output", tmp_path / "run", "--export", tmp_path / "out", "--export-step", "last")
    assert "must be the folder of a run" in error(capsys, "--config", "shapes_cpu", *given)
    given += ("--data", tmp_path / "data.jsonl", "--checkpoint", tmp_path)
    assert "training needs grain: pip install" in error(capsys, "--config", "lora", *given)


@pytest.mark.slow
def test_a_strangers_clips(tmp_path, capsys):
    """Ten clips of their own, in ms-swift's form, and LoRA on a tiny model: it is better on those clips afterwards."""
    config = KeyeConfig.from_file(presets.TINY)
    sparse = dataclasses.replace(config.sa_config, topk=64)
    config = dataclasses.replace(config, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, sa_config=sparse)
    write_checkpoint(tmp_path / "hf", config, seed=0)
    write_processor_files(tmp_path / "hf", config)
    samples = []
    for number in range(10):
        write_clip(tmp_path / f"{number}.mp4", seconds=1 + number / 10, size=(160, 96))
        question = {"role": "user", "content": "<video>What rolls over the table?"}
        answer = {"role": "assistant", "content": f"A red ball, in clip {number}."}
        samples.append({"messages": [question, answer], "videos": [f"{number}.mp4"]})
    data = tmp_path / "clips.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in samples))
    (tmp_path / "stage.yaml").write_text(
        "lora: {targets: [decoder.layers.*.attention, decoder.layers.*.moe, '!*.router'], rank: 8}\n"
        "optimizer: {lr: 1.0e-2, warmup: 0.1}\n"
        "batch: {tokens: 1280, length: 256, images: {96: 24}}\n"
        "data: {media: {min_pixels: 784, max_pixels: 18816}}\n"
        "steps: 20\nevaluate_every: 10\n"
    )
    files = ["--data", data, "--evaluation", data, "--checkpoint", tmp_path / "hf"]
    where = ["--config", tmp_path / "stage.yaml", "--output", tmp_path / "run", "--export", tmp_path / "tuned"]
    assert run(app, ["train", *map(str, [*files, *where])]) == 0
    assert "20 steps, 0 of them done" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "measures.jsonl").read_text().splitlines()]
    first, last = lines[0], [line for line in lines if line["kind"] == "evaluation"][-1]
    assert last["language"] < 0.5 * first["language"]
    # What was written is a checkpoint, and the adapter gives the same one.
    assert run(app, ["inspect", str(tmp_path / "tuned")]) == 0
    convert(tmp_path / "hf", tmp_path / "merged", merge_lora=tmp_path / "run" / "adapter")
    layer = ("decoder", "layers", "0", "attention", "q_proj", "weight")
    arrays = [load_params(tmp_path / name, config) for name in ("tuned", "merged")]
    for key in layer:
        arrays = [each[key] for each in arrays]
    tuned, merged = arrays
    np.testing.assert_array_equal(tuned, merged)
