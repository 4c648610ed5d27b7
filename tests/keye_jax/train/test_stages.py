"""Stages in turn: what is done stays done, and each begins with the model of the one before."""

import pytest

from keye_jax.errors import UserError
from keye_jax.train import stages
from keye_jax.train.checkpoints import RUN
from keye_jax.train.config import StageConfig
from keye_jax.train.loop import Ended
from keye_jax.train.stages import train_in_turn

THREE = [(f"configs/{name}.yaml", StageConfig(steps=2)) for name in ("one", "two", "three")]


@pytest.fixture
def sittings(monkeypatch):
    """Runs of stages, each of which takes a number of sittings that is left in a table; what each was given."""
    left, calls = {"one": 1, "two": 2, "three": 1}, []

    def train(stage, *, source, checkpoint, output, export, export_step, stop_after, **settings):
        calls.append((output.name, checkpoint, export))
        output.mkdir(parents=True, exist_ok=True)
        (output / RUN).touch()
        left[output.name] -= 1
        finished = not left[output.name]
        if finished or export_step:
            export.mkdir()
            (export / "of").write_text(output.name)
        return Ended(2, finished, None)

    monkeypatch.setattr(stages, "train", train)
    return calls


def test_each_begins_with_the_model_of_the_one_before(sittings, tmp_path):
    output, begin = tmp_path / "run", tmp_path / "begin"
    ended = train_in_turn(THREE, checkpoint=begin, output=output, export=tmp_path / "out")
    assert not ended.finished and not (tmp_path / "out").exists()
    models = [output / name / "model" for name in ("one", "two", "three")]
    assert sittings == [("one", begin, models[0]), ("two", models[0], models[1])]
    # The next sitting does not look at the first stage again, whose folder may be gone.
    sittings.clear()
    assert train_in_turn(THREE, checkpoint=begin, output=output, export=tmp_path / "out").finished
    assert sittings == [("two", models[0], models[1]), ("three", models[1], models[2])]
    assert (tmp_path / "out" / "of").read_text() == "three"
    sittings.clear()
    assert train_in_turn(THREE, checkpoint=begin, output=output).finished
    assert not sittings


def test_the_stage_that_was_reached_is_exported(sittings, tmp_path):
    given = {"checkpoint": None, "output": tmp_path / "run"}
    train_in_turn(THREE, **given)
    train_in_turn(THREE, **given, export=tmp_path / "out", export_step="last")
    assert (tmp_path / "out" / "of").read_text() == "two"


def test_a_sitting_that_is_over_begins_no_stage(sittings, tmp_path):
    ended = train_in_turn(THREE, checkpoint=None, output=tmp_path, stop_after=0.0)
    assert not ended.finished and not sittings


def test_stages_of_one_name(tmp_path):
    with pytest.raises(UserError, match="--config names the stages one, one; each must have a name of its own"):
        train_in_turn([THREE[0], THREE[0]], checkpoint=None, output=tmp_path)
