"""The optimiser: what has moments, groups, clipping, decay and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.train.config import OptimizerConfig
from keye_jax.train.optimizer import apply_gradients, gradient_norms, init_optimizer, make_optimizer, schedule

INDEXER = "decoder.layers.0.indexer.q_proj.weight"
QUERY = "decoder.layers.0.attention.q_proj.weight"
NORM = "decoder.layers.0.input_norm.weight"
VISION = "vision.layers.0.mlp.fc1.weight"


def weights(*paths: str, value: float = 1.0, dtype=jnp.float32):
    return {path: jnp.full(4, value, dtype) for path in paths}


def moved(config: OptimizerConfig, before, gradients, steps: int = 10):
    """How far one step moves each weight."""
    optimizer = make_optimizer(config, steps, list(before))
    after, _ = apply_gradients(optimizer, before, gradients, init_optimizer(optimizer, before))
    return {path: float((before[path] - after[path])[0]) for path in before}


class TestSteps:
    def test_groups_have_their_own_rates(self):
        config = OptimizerConfig(lr=1e-2, lr_of={"vision": 1e-3}, schedule="constant", warmup=0, clip=0)
        found = moved(config, weights(QUERY, VISION), weights(QUERY, VISION))
        # The first step of Adam is the learning rate in each number.
        np.testing.assert_allclose([found[QUERY], found[VISION]], [1e-2, 1e-3], rtol=1e-3)

    def test_norms_do_not_decay(self):
        config = OptimizerConfig(lr=1e-2, schedule="constant", warmup=0, weight_decay=0.5)
        found = moved(config, weights(QUERY, NORM), weights(QUERY, NORM, value=0.0))
        np.testing.assert_allclose([found[QUERY], found[NORM]], [5e-3, 0], atol=1e-7)

    def test_pairs_belong_to_the_group_of_their_weight(self):
        config = OptimizerConfig(lr=1e-2, lr_of={"vision": 1e-3}, schedule="constant", warmup=0)
        found = moved(config, weights(f"{VISION}.lora_a"), weights(f"{VISION}.lora_a"))
        np.testing.assert_allclose(found[f"{VISION}.lora_a"], 1e-3, rtol=1e-3)

    def test_the_indexer_is_clipped_apart(self):
        # Adam's first step hides the size of a gradient. Its moments do not.
        config = OptimizerConfig(clip=1.0, indexer_clip=0.5, betas=(0.0, 0.0))
        optimizer = make_optimizer(config, 10, [INDEXER, QUERY])
        before = weights(INDEXER, QUERY)
        _, state = apply_gradients(
            optimizer,
            before,
            weights(INDEXER, value=100.0) | weights(QUERY, value=0.125),
            init_optimizer(optimizer, before),
        )
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,)]
        found = sorted({round(float(leaf[0]), 6) for leaf in moments})
        # The indexer's norm of 200 became 0.5, which is 0.25 in each of four numbers. The other's norm of 0.25 stays.
        assert found == [0.125**2, 0.25**2, 0.125, 0.25]
        norms = gradient_norms({INDEXER: jnp.full(4, 3.0), QUERY: jnp.full(4, 1.0)})
        assert (float(norms["indexer_norm"]), float(norms["norm"])) == (6.0, 2.0)


class TestState:
    def test_moments_are_float32_and_only_of_what_trains(self):
        before = weights(QUERY, INDEXER, dtype=jnp.bfloat16)
        optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), 10, list(before))
        state = init_optimizer(optimizer, before)
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
        assert len(moments) == 4 and {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.float32)}
        after, _ = apply_gradients(optimizer, before, weights(QUERY, INDEXER, dtype=jnp.bfloat16), state)
        assert {value.dtype for value in after.values()} == {jnp.dtype(jnp.bfloat16)}


class TestSchedule:
    @pytest.mark.parametrize(
        ("kind", "middle", "last"), [("constant", 1, 1), ("cosine", 0.55, 0.1), ("linear", 0.55, 0.1)]
    )
    def test_shares(self, kind, middle, last):
        share = schedule(OptimizerConfig(schedule=kind, warmup=0.2, final=0.1), 100)
        np.testing.assert_allclose([share(0), share(9), share(19), share(20)], [0.05, 0.5, 1, 1], rtol=1e-5)
        np.testing.assert_allclose([share(60), share(100)], [middle, last], rtol=1e-5)

    def test_without_warm_up_the_first_step_is_the_peak(self):
        assert float(schedule(OptimizerConfig(warmup=0), 10)(0)) == 1.0
