"""Experts with gradients, in both ways, against each token's own experts in float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.train.experts import mix_all, mix_blocks

EXPERTS, EMBED, HIDDEN, TOKENS, K = 6, 8, 5, 90, 2
WAYS = {
    "all": mix_all,
    "blocks": functools.partial(mix_blocks, False),
    "blocks that are used": functools.partial(mix_blocks, True),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def arguments(busy: int) -> tuple[jax.Array, ...]:
    """Tokens that choose among the first `busy` experts; number `EXPERTS` is on another device."""
    rng = np.random.default_rng(busy)
    experts = np.stack([rng.permutation(busy)[:K] for _ in range(TOKENS)])
    shapes = (EXPERTS, EMBED, 2 * HIDDEN), (EXPERTS, HIDDEN, EMBED)
    x, weights = rng.normal(size=(TOKENS, EMBED)), rng.uniform(size=(TOKENS, K))
    return tuple(
        map(jnp.asarray, (x, experts.astype(np.int32), weights, *(rng.normal(size=shape) for shape in shapes)))
    )


def loss(way: Any, experts: jax.Array, x: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array) -> Any:
    out = way(x, experts, weights, gate_up, down)
    return jnp.sum(out * np.random.default_rng(0).normal(size=out.shape)), out


def of_each_token(
    x: jax.Array, experts: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    there = experts < EXPERTS
    own = jnp.where(there, experts, 0)
    gate, up = jnp.split(jnp.einsum("td,tkdf->tkf", x, gate_up[own]), 2, axis=-1)
    return jnp.einsum("tkf,tkfd,tk->td", jax.nn.silu(gate) * up, down[own], jnp.where(there, weights, 0))


@pytest.mark.parametrize("busy", [2, EXPERTS, EXPERTS + 1])
@pytest.mark.parametrize("way", WAYS)
def test_results_and_gradients(way: str, busy: int):
    """Some experts without a token, all with some, and some that are elsewhere."""
    x, experts, *others = arguments(busy)
    results = [
        jax.jit(jax.value_and_grad(functools.partial(loss, each, experts), argnums=(0, 1, 2, 3), has_aux=True))(
            x, *others
        )
        for each in (WAYS[way], of_each_token)
    ]
    for got, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
