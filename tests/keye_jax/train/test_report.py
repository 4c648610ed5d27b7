"""What a run tells."""

import io
import json
import sys

import pytest

from keye_jax.errors import UserError
from keye_jax.train.report import MEASURES, Report

VALUES = {"language": 1.5, "accuracy": 0.25, "kl": 0.1, "recall": 0.9, "tokens": 100, "targets": 5}


def test_measures_are_lines_and_go_on_where_a_run_resumes(tmp_path):
    report = Report(tmp_path, steps=4, stream=io.StringIO())
    for step in (1, 2, 3):
        report.step(step, VALUES)
    report.close()
    with (tmp_path / "measures.jsonl").open("a") as file:
        file.write('{"step": 3, "ki')  # a process that was killed while it wrote
    report = Report(tmp_path, steps=4, begun=2, stream=io.StringIO())
    report.step(3, VALUES | {"language": 1.25})
    report.evaluation(3, VALUES)
    report.close()
    lines = [json.loads(line) for line in (tmp_path / "measures.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [
        (1, "train"),
        (2, "train"),
        (3, "train"),
        (3, "evaluation"),
    ]
    assert [line["language"] for line in lines] == [1.5, 1.5, 1.25, 1.5]
    assert lines[0]["tokens"] == 100 and lines[1]["tokens_per_second"] > 0 == lines[0]["tokens_per_second"]


def test_progress_names_what_counts(tmp_path):
    stream = io.StringIO()
    report = Report(tmp_path, steps=2, stream=stream)
    for step in (1, 2):
        report.step(step, VALUES | {"indexer_norm": 1.0}, epoch=0.5)
    report.close()
    first, last = stream.getvalue().splitlines()
    # The first step compiles, so it says nothing about the speed.
    assert first == "step 1/2, epoch 0.5, loss 1.5000, accuracy 0.250, KL 0.1000, recall 0.900"
    assert last.startswith(first.replace("1/2", "2/2") + ", ")
    assert "tokens/s" in last and last.endswith("left")


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="pip install tensorboardX"):
        Report(tmp_path, steps=1, tensorboard=tmp_path / "curves", stream=io.StringIO())


def test_a_damaged_line_of_an_earlier_run_is_shown(tmp_path):
    (tmp_path / MEASURES).write_text('{"step": 1, "language": NaN}\n{"step": \n')
    with pytest.raises(UserError, match=r"measures.jsonl has the line .*; each line must be an object with 'step'"):
        Report(tmp_path, steps=4, begun=1, stream=io.StringIO())
