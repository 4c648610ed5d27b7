"""The router of the released size on a GPU, in bfloat16, against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.model.moe import MoE
from pallas_kernels import route


@pytest.fixture(scope="module")
def moe():
    """Of small experts: only the router is used."""
    released = KeyeConfig.from_file(presets.RELEASED)
    return MoE(dataclasses.replace(released, moe_intermediate_size=128), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("implementation", [None, "mosaic_gpu", "xla"])
@pytest.mark.parametrize("tokens", [1, 2, 8, 32, 64, 65])
def test_weights_are_those_of_the_chosen_experts(moe, tokens, implementation):
    """By the model's own router for None. XLA once ranked probabilities that it had rounded in two ways."""
    if implementation == "mosaic_gpu" and tokens > 64:
        pytest.skip("the kernel takes up to 64 tokens")
    router = moe.router.weight[...]
    norm = jnp.ones(router.shape[1], router.dtype)

    def choose(x):
        if implementation is None:
            return (x, *moe.route(x))
        how = {"top_k": moe.experts_per_token, "eps": 1e-6, "normalise": moe.normalise}
        out = route(x, jnp.zeros_like(x), norm, router, jnp.ones(tokens, bool), **how, implementation=implementation)
        return out.normed, out.experts, out.weights

    for seed in range(5):
        x = 3 * jax.random.normal(jax.random.key(seed), (tokens, router.shape[1]))
        given, experts, weights = map(np.asarray, jax.jit(choose)(x.astype(router.dtype)))
        logits = given.astype(np.float64) @ np.asarray(router, np.float64).T
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        expected, best = np.take_along_axis(probabilities, experts, axis=1), -np.sort(-probabilities, axis=1)
        np.testing.assert_allclose(expected, best[:, : experts.shape[1]], rtol=1e-3)
        if moe.normalise:
            expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(weights, expected, rtol=1e-3)
