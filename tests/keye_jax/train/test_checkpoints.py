"""Checkpoints of a run: what stays, what is restored, and who may resume."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from keye_jax.errors import UserError
from keye_jax.train.checkpoints import RunCheckpoints, fingerprint
from keye_jax.train.config import StageConfig

STAGE = StageConfig.from_dict({"train": ["projector"], "steps": 9, "optimizer": {"lr_of": {"vision": 1e-6}}})
RUN = {"stage": STAGE.to_dict(), "data": "abc"}


def state(value: float):
    weights = {"a.weight": jnp.full((3, 2), value), "b": jnp.full(4, value, jnp.bfloat16)}
    moments = optax.adam(1.0).init(weights)
    return weights, jax.tree.map(lambda x: x + jnp.asarray(value, x.dtype), moments)


@pytest.fixture
def opened(tmp_path):
    """Opens the checkpoints of a run."""
    made = []

    def open_(run=RUN, keep=2) -> RunCheckpoints:
        made.append(RunCheckpoints(tmp_path / "run", run, keep=keep))
        return made[-1]

    yield open_
    for each in made:
        each.close()


class TestSaved:
    def test_there_and_back(self, opened):
        opened().save(5, state(3.0), {"next": 7, "waiting": [1]})
        found = opened().restore(state(0.0))
        assert found is not None
        step, restored, position = found
        assert (step, position) == (5, {"next": 7, "waiting": [1]})
        assert jax.tree.structure(restored) == jax.tree.structure(state(3.0))
        for got, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state(3.0)), strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)

    def test_a_new_run_has_none(self, opened):
        assert opened().restore(state(0.0)) is None

    def test_the_last_and_the_best_stay(self, opened):
        checkpoints = opened()
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5)):
            checkpoints.save(step, state(step), {}, loss)
        assert checkpoints.steps == [2, 4, 5]

    def test_weights_of_the_last_of_the_best_and_of_a_step(self, opened):
        checkpoints = opened(keep=1)
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            checkpoints.save(step, state(step), {}, loss)
        for reopened in (checkpoints, opened(keep=1)):
            for which, step in (("last", 3), ("best", 2), ("2", 2), ("3", 3)):
                found, weights = reopened.restore_weights(state(0.0)[0], which)
                assert found == step and weights.keys() == state(0.0)[0].keys()
                np.testing.assert_array_equal(weights["a.weight"], np.full((3, 2), step))
            with pytest.raises(UserError, match="--export-step is '1'; it must be one of: 2, 3, last, best"):
                reopened.restore_weights(state(0.0)[0], "1")

    def test_none_is_the_best_without_an_evaluation(self, opened):
        with pytest.raises(UserError, match="nothing yet, since the run has no checkpoint"):
            opened().restore_weights(state(0.0)[0], "last")
        opened().save(4, state(1.0), {})
        with pytest.raises(UserError, match="it must be one of: 4, last"):
            opened().restore_weights(state(0.0)[0], "best")

    def test_small_checkpoints_are_small_files(self, opened, tmp_path):
        large = {"a": jnp.asarray(np.random.default_rng(0).standard_normal((6, 1 << 20)), jnp.float32)}
        opened().save(1, large, {})
        sizes = [file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file()]
        assert sum(sizes) > 20 << 20 and max(sizes) <= 16 << 20


class TestRuns:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"steps": 10}, "steps is 10; the run in .* was started with 9"),
            ({"optimizer": {"lr": 1}}, "optimizer.lr is 1.0; the run in .* was started with 1e-05"),
            ({"train": ["vision"]}, "train is .*vision"),
            ({"lora": {"targets": ["vision"]}}, "lora"),
        ],
    )
    def test_another_stage_is_refused_by_the_field(self, opened, values, message):
        opened()
        given = {"train": ["projector"], "steps": 9, "optimizer": {"lr_of": {"vision": 1e-6}}}
        given["optimizer"] |= values.pop("optimizer", {})
        with pytest.raises(UserError, match=message):
            opened(RUN | {"stage": StageConfig.from_dict(given | values).to_dict()})

    def test_other_data_are_refused(self, opened):
        opened()
        with pytest.raises(UserError, match="data is 'abd'"):
            opened(RUN | {"data": "abd"})

    def test_intervals_may_change(self, opened):
        opened()
        given = {"train": ["projector"], "steps": 9, "checkpoint_every": 1, "optimizer": {"lr_of": {"vision": 1e-6}}}
        opened(RUN | {"stage": StageConfig.from_dict(given | {"data": {"workers": 5}}).to_dict()})

    def test_a_folder_of_others_is_refused(self, tmp_path):
        (tmp_path / "notes.txt").write_text("x")
        with pytest.raises(UserError, match="it must be a new folder"):
            RunCheckpoints(tmp_path, RUN, keep=1)


def test_fingerprints_tell_contents_apart(tmp_path):
    (tmp_path / "x").write_bytes(b"a" * 300_000)
    first, folder = fingerprint(tmp_path / "x"), fingerprint(tmp_path)
    (tmp_path / "x").write_bytes(b"a" * 299_999 + b"b")
    assert fingerprint(tmp_path / "x") != first and fingerprint(tmp_path) != folder
