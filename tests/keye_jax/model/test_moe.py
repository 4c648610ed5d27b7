"""Experts against every expert on every token, weighted by the router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.model.moe import MoE
from keye_jax.sharding import MeshRules, StepSharding
from pallas_kernels.grouped_matmul import sort_rows, take_rows

ONE = StepSharding.prefill(MeshRules.single_device())


@pytest.fixture(scope="module")
def config(golden):
    return KeyeConfig.from_dict(KeyeConfig.from_file(golden / "b").to_dict() | {"dtype": "float32"})


def run(moe: MoE, x: np.ndarray, valid: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The layer on tokens `[t, embed]` of one row, and their experts."""
    valid = np.ones(len(x), bool) if valid is None else valid
    out, experts = moe(jnp.asarray(x)[None], jnp.asarray(valid)[None], ONE, implementation=None)
    return np.asarray(out[0]), np.asarray(experts[0])


def oracle(moe, x):
    logits = x @ np.asarray(moe.router.weight[...]).T
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    out = np.zeros_like(x)
    for token, row in enumerate(probabilities):
        best = np.argsort(-row, kind="stable")[: moe.experts_per_token]
        for expert in best:
            gate, up = np.split(x[token] @ np.asarray(moe.gate_up_proj[expert]), 2)
            inner = gate / (1 + np.exp(-gate)) * up
            out[token] += row[expert] / row[best].sum() * (inner @ np.asarray(moe.down_proj[expert]))
    return out


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_each_token_goes_through_its_own_experts(config, tokens):
    moe = MoE(config, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(tokens, config.hidden_size)).astype(np.float32)
    got, _ = run(moe, x)
    np.testing.assert_allclose(got, oracle(moe, x), atol=1e-4)


def test_all_tokens_may_choose_the_same_experts(config):
    moe = MoE(config, rngs=nnx.Rngs(0))
    x = np.tile(np.random.default_rng(0).normal(size=(1, config.hidden_size)), (50, 1)).astype(np.float32)
    got, experts = run(moe, x)
    assert len(np.unique(experts)) == config.num_experts_per_tok
    np.testing.assert_allclose(np.asarray(got), oracle(moe, x), atol=1e-4)


def test_invalid_tokens_get_zeros(config):
    moe = MoE(config, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(20, config.hidden_size)).astype(np.float32)
    got, _ = run(moe, x, np.arange(20) % 3 > 0)
    expected = np.where((np.arange(20) % 3 > 0)[:, None], oracle(moe, x), 0.0)
    np.testing.assert_allclose(np.asarray(got), expected, atol=1e-4)


@pytest.mark.parametrize("size", [8, 512, 520])
def test_rows_are_sorted_stably(size):
    keys = np.random.default_rng(0).integers(0, 20, size)
    order, place = sort_rows(jnp.asarray(keys))
    np.testing.assert_array_equal(np.asarray(order), np.argsort(keys, kind="stable"))
    np.testing.assert_array_equal(np.asarray(order)[np.asarray(place)], np.arange(size))


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 6), ("bfloat16", 5), ("float32", 6), ("float8_e4m3fn", 8)])
def test_rows_are_taken_bit_for_bit(dtype, width):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, width)), dtype).at[0, 0].set(jnp.nan)
    rows = jnp.asarray([3, 0, 6, 3])
    np.testing.assert_array_equal(np.asarray(take_rows(x, rows), np.float32), np.asarray(x[rows], np.float32))


def test_work_grows_with_the_tokens_experts_not_with_all_experts(config):
    """Blocks of rows: at most one that is not full for each expert."""
    from pallas_kernels.grouped_matmul import grouped_matmul

    lhs, rhs = jnp.zeros((512, config.hidden_size)), jnp.zeros((config.num_experts, config.hidden_size, 96))
    compiled = jax.jit(grouped_matmul).lower(lhs, rhs, jnp.zeros(config.num_experts, jnp.int32)).compile()
    # The compiler counts a loop's body once: one block of rows against one expert's matrix.
    flops_of_all_experts = 2 * lhs.size * 96 * config.num_experts
    cost = compiled.cost_analysis()
    assert cost is not None and cost["flops"] < flops_of_all_experts / 50
