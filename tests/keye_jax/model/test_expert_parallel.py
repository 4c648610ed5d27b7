"""Experts on different devices against one device, for any routing, however the tokens get there."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.model import expert_parallel
from keye_jax.model.moe import MoE
from keye_jax.model.params import shard_params
from keye_jax.quantization.schemes import FORMATS, Quantization, standard
from keye_jax.sharding import MeshRules, ShardingConfig, StepSharding

ROWS, TOKENS = 8, 4
ONE = StepSharding.prefill(MeshRules.single_device())


@pytest.fixture(scope="module")
def config(golden):
    return dataclasses.replace(KeyeConfig.from_file(golden / "b"), dtype="float32")


def step_of(config, exchange, rules):
    values = {"mesh": {"x": 2, "y": 2, "z": 2}, "rules": rules, "exchange": {"experts": exchange}}
    return StepSharding.prefill(MeshRules.create(ShardingConfig.from_dict(values), config))


def steered(config, favourites):
    """Experts whose router prefers some of them, by far, for tokens whose first number is 1."""
    moe = MoE(config, rngs=nnx.Rngs(0))
    router = np.array(moe.router.weight[...])
    router[:, 0] = 0
    router[favourites, 0] = 100.0 + np.arange(len(favourites))
    moe.router.weight.set_value(jnp.asarray(router))
    return moe


def tokens(config, seed=0):
    x = np.random.default_rng(seed).normal(size=(ROWS, TOKENS, config.hidden_size)).astype(np.float32)
    x[..., 0] = 1
    return jnp.asarray(x)


@pytest.fixture(scope="module", autouse=True)
def _turns_of_a_few_rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_parallel, "_FEW_ROWS", 8)
        yield


@functools.partial(jax.jit, static_argnames="step")
def run(moe, x, valid, step):
    return placed(moe, step)(x, valid, step, implementation=None)


@pytest.mark.parametrize("format", FORMATS)
def test_experts_of_fewer_bits(config, format):
    """Their blocks are cut where devices part them: the hidden dimension of 48 is split in 8 in all."""
    config = dataclasses.replace(config, quantization=Quantization(standard(format)))
    moe, x, valid = MoE(config, rngs=nnx.Rngs(0)), tokens(config), jnp.ones((ROWS, TOKENS), bool)
    scales = np.random.default_rng(2)
    for weight in (moe.gate_up_proj, moe.down_proj):
        value = weight.get_value()
        random = jnp.asarray(scales.uniform(0.5, 1.5, value.scales.shape), value.scales.dtype)
        weight.set_value(dataclasses.replace(value, scales=value.scales * random))
    step = step_of(config, "all_gather", {"batch": "x", "experts": "y", "expert_hidden": ["x", "z"]})
    expected, chosen = moe(x, valid, ONE, implementation=None)
    holder: Any = nnx.Module()
    decoder: Any = nnx.Module()
    layer: Any = nnx.Module()
    layer.moe, decoder.layers, holder.decoder = moe, nnx.List([layer]), decoder
    got, experts = jax.jit(lambda moe, x, valid: moe(x, valid, step, implementation=None))(
        shard_params(holder, step.rules).decoder.layers[0].moe, x, valid
    )
    np.testing.assert_array_equal(np.asarray(experts), np.asarray(chosen))
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=1e-5 * np.abs(expected).max())


EVERYWHERE = {"batch": "x", "query_sequence": ["y", "z"], "experts": ["z", "x", "y"]}
SOME_AXES = {"batch": "x", "query_sequence": "y", "experts": ["z", "y"], "expert_hidden": "x"}


@pytest.mark.parametrize("rules", [EVERYWHERE, SOME_AXES], ids=["all axes", "some axes"])
@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
@pytest.mark.parametrize(
    "favourites", [(), (3, 5, 9, 14), (0, 1, 2, 3), (12, 13, 14, 15)], ids=["any", "four", "first", "last"]
)
def test_any_routing(config, favourites, exchange, rules):
    """Experts that get every token, devices whose experts get none, and turns of a few rows each."""
    moe, step = steered(config, list(favourites)), step_of(config, exchange, rules)
    x = tokens(config)
    valid = jnp.asarray(np.random.default_rng(1).random((ROWS, TOKENS)) < 0.8)
    expected, chosen = moe(x, valid, ONE, implementation=None)
    if favourites:
        assert set(np.unique(chosen)) == set(favourites)
    got, got_chosen = run(moe, x, valid, step)
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=1e-4)
    np.testing.assert_array_equal(np.asarray(got_chosen), np.asarray(chosen))
    assert not np.asarray(got)[~np.asarray(valid)].any()


def placed(moe, step):
    """The experts with their columns in as many parts as devices split them into."""
    parts = step.size(step.expert_hidden)
    graph, state = nnx.split(moe)
    moe = nnx.merge(graph, state)
    columns = moe.gate_up_proj[...]
    apart = columns.reshape(*columns.shape[:2], 2, parts, -1).swapaxes(2, 3)
    moe.gate_up_proj.set_value(apart.reshape(columns.shape))
    moe.hidden_parts = parts
    return moe


def test_without_a_valid_token_there_is_nothing_to_do(config):
    moe, step = steered(config, []), step_of(config, "all_to_all", EVERYWHERE)
    nothing = jnp.zeros((ROWS, TOKENS), bool)
    got, _ = run(moe, tokens(config), nothing, step)
    assert not np.asarray(got).any()


def test_parameters_placed_by_other_rules_are_refused(config):
    moe, step = steered(config, []), step_of(config, "all_gather", SOME_AXES)
    with pytest.raises(AssertionError, match="not placed"):
        moe(tokens(config), jnp.ones((ROWS, TOKENS), bool), step, implementation=None)
