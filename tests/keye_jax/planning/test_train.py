"""Plans of training: bytes are those of the arrays there would be."""

import json

import jax
import numpy as np
import pytest

from keye_jax import presets
from keye_jax.cli import app, run
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.model.keye import Keye
from keye_jax.planning.hardware import Platform
from keye_jax.planning.train import plan_train
from keye_jax.sharding import ShardingConfig
from keye_jax.train.config import StageConfig

TINY = KeyeConfig.from_file(presets.TINY)
TRAIN = ShardingConfig.from_file(presets.sharding_file("train"))
H200 = Platform.parse("h200:1")
ONE = ShardingConfig.from_file(presets.sharding_file("one_device"))


def stage(**values) -> StageConfig:
    return StageConfig.from_dict({"train": ["*"], "loss": {"kl": 1}, "steps": 1} | values)


def test_bytes_are_those_of_the_arrays():
    count = Keye.parameter_count(TINY)
    found = plan_train(TINY, stage(batch={"accumulation": 2}), ONE, H200)
    # bfloat16 weights beside float32 ones, float32 gradients that are added up, and two float32 moments.
    assert (found.trained, found.total) == (count, count)
    assert (found.frozen, found.weights, found.gradients, found.moments) == (0, 6 * count, 4 * count, 8 * count)
    assert found.fits and found.needed == 1


def test_frozen_weights_have_neither_gradients_nor_moments():
    found = plan_train(TINY, stage(train=["projector"], loss={}), ONE, H200)
    projector = sum(leaf.size for leaf in jax.tree.leaves(Keye.abstract(TINY).projector) if hasattr(leaf, "size"))
    assert found.trained == projector and found.moments == 8 * projector
    assert found.frozen == 2 * (found.total - projector)


def test_moments_are_shared_out_over_devices():
    one, four = (plan_train(TINY, stage(), TRAIN, Platform.parse(f"h200:{count}")) for count in (1, 4))
    assert one.moments / 4 <= four.moments <= 1.1 * one.moments / 4
    assert four.activations * 4 == one.activations


def test_less_is_kept_where_more_is_computed_again():
    kept = [plan_train(TINY, stage(remat=remat), ONE, H200).activations for remat in ("layer", "attention", "none")]
    assert kept == sorted(kept) and len(set(kept)) == 3


def test_pairs_count_as_they_are():
    lora = {"targets": ["decoder.layers.*.attention.q_proj"], "rank": 4}
    found = plan_train(TINY, stage(train=[], loss={}, lora=lora), ONE, H200)
    each = 4 * (TINY.hidden_size + TINY.num_attention_heads * TINY.head_dim)
    assert found.trained == TINY.num_hidden_layers * each and found.moments == 8 * found.trained


def test_generated_clips_count_with_the_longest_of_them():
    long = {"share": 0.5, "length": 512, "shapes": {"frames": 40}}
    given = {"batch": {"tokens": 512, "length": 256, "row": 256}, "remat": "none", "loss": {}, "train": ["vision"]}
    short, both = (
        plan_train(TINY, stage(data={"source": "shapes", "shapes": {"frames": 8}} | extra, **given), ONE, H200)
        for extra in ({}, {"long": long})
    )
    images = stage(**given | {"batch": given["batch"] | {"images": {144: 16}}})
    # Two clips of 8 frames of 12 x 12 patches.
    assert short.activations == plan_train(TINY, images, ONE, H200).activations
    assert both.activations > short.activations


@pytest.mark.parametrize("name", ["lora", "sft", "indexer_warmup"])
def test_the_released_model(name, capsys):
    arguments = ["plan", "--train", name, "--platform", "h200:8", "--json"]
    code = run(app, arguments)
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["fits"] and found["devices"] == 8
    parts = ("frozen", "weights", "gradients", "moments", "activations", "workspace")
    assert found["peak"] == sum(found[part] for part in parts)
    assert np.isclose(found["total"], 31.08e9, rtol=1e-3)


def test_more_devices_are_named_where_too_few_are_given(capsys):
    assert run(app, ["plan", "--train", "sft", "--platform", "h100:4"]) == 1
    assert "it does NOT fit; the least power of two that fits is" in capsys.readouterr().out


def test_what_a_run_refuses_is_refused(capsys):
    assert run(app, ["plan", "--train", "sft", "--platform", "h100:16"]) == 2
    assert "--platform is 'h100:16', which is 2 hosts; it must be one" in capsys.readouterr().err
    mesh = {"mesh": {"x": 2}, "rules": {"expert_hidden": "x"}}
    with pytest.raises(UserError, match="training needs a sharding without it"):
        plan_train(TINY, stage(), ShardingConfig.from_dict(mesh), Platform.parse("h200:2"))
    mesh = {"mesh": {"x": 2}, "rules": {"batch": "x", "query_sequence": "x"}}
    batch = {"tokens": 512, "length": 512, "row": 512}
    with pytest.raises(UserError, match=r"batch.tokens is 512; it must be a multiple of 2 rows"):
        plan_train(TINY, stage(batch=batch), ShardingConfig.from_dict(mesh), Platform.parse("h200:2"))


def test_a_job_or_a_stage(capsys):
    assert run(app, ["plan", "--platform", "h200:1"]) == 2
    assert run(app, ["plan", "--platform", "h200:1", "--train", "nothing"]) == 2
    errors = capsys.readouterr().err
    assert "give either --context" in errors and "one of the presets: indexer_warmup, lora" in errors
