"""Tokens of a decoder layer on two devices: `gather_tokens`, and `combine_experts` of experts on both."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import ArgumentError, combine_experts, dispatch, gather_tokens
from pallas_kernels.gpu.peers import peer_addresses

SIZE, EXPERTS, EPS = 512, 4, 1e-5

pytestmark = pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")


@pytest.fixture(
    params=[name for name in dispatch.OPERATIONS["gather_tokens"].implementations if name in dispatch.available()]
)
def named(request) -> str:
    return request.param


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:2]), ("x",))


@pytest.fixture
def addresses(mesh: Mesh, named: str) -> jax.Array | None:
    """For kernels, which this test is to run where there are two Hopper GPUs that reach each other."""
    return peer_addresses(mesh, ("x",)) if named == "mosaic_gpu" else None


def numbers(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def inputs(tokens: int, seed: int = 0) -> dict[str, Any]:
    """Of all devices; of the experts' rows and weights each device's."""
    rng = np.random.default_rng(tokens)
    return {
        "x": numbers(seed + 1, tokens, SIZE),
        "update": numbers(seed + 2, tokens, SIZE),
        "rows": numbers(seed + 3, 2, tokens * EXPERTS, SIZE),
        "weights": jnp.asarray(rng.uniform(0, 1, (2, tokens, EXPERTS)), jnp.float32),
        "row_of": jnp.asarray(rng.permutation(tokens * EXPERTS).reshape(tokens, EXPERTS), jnp.int32),
        "norm": 1 + numbers(seed + 4, SIZE) / 4,
    }


def run(mesh: Mesh, named: str, addresses: jax.Array | None, arrays: dict[str, Any], layers: int = 1) -> Any:
    """Everyone's tokens, and then the last results, after `layers` exchanges of each kind."""
    split, everywhere = PartitionSpec("x"), PartitionSpec()
    specs = {name: everywhere if name in ("row_of", "norm") else split for name in arrays}

    def body(arrays: dict[str, Any], addresses: jax.Array | None) -> Any:
        how: dict[str, Any] = {"axes": ("x",), "implementation": named}
        place = None if addresses is None else addresses[0]
        rows, weights, row_of, norm = arrays["rows"][0], arrays["weights"][0], arrays["row_of"], arrays["norm"]
        everyone, y, normed = None, arrays["x"], arrays["update"]
        for _ in range(layers):
            everyone = gather_tokens(y, normed, place, **how)
            y, normed = combine_experts(rows, row_of, weights, everyone, norm, place, eps=EPS, **how)
        return everyone, y, normed

    call = jax.shard_map(body, mesh=mesh, in_specs=(specs, split), out_specs=(split,) * 3, check_vma=False)
    return jax.jit(call)(arrays, addresses)


def alone(arrays: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """The tokens with what was added, and the sums with their norms, from single operations of NumPy."""
    wide = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    dtype = np.asarray(arrays["x"]).dtype
    everyone = (wide["x"] + wide["update"]).astype(dtype).astype(np.float32)
    mixed = np.zeros_like(everyone)
    for rows, weights in zip(wide["rows"], wide["weights"], strict=True):
        terms = weights[:, :, None] * rows[np.asarray(arrays["row_of"])]
        mixed += terms.sum(axis=1).astype(dtype).astype(np.float32)
    y = everyone + mixed.astype(dtype).astype(np.float32)
    normed = y / np.sqrt(np.mean(np.square(y), axis=1, keepdims=True) + EPS) * wide["norm"]
    return everyone, y, normed


@pytest.mark.parametrize("tokens", [2, 6, 64])
def test_matches_the_formula(mesh: Mesh, named: str, addresses: jax.Array | None, tokens: int):
    arrays = inputs(tokens)
    found = [np.asarray(x, np.float32) for x in run(mesh, named, addresses, arrays)]
    everyone, y, normed = alone(arrays)
    # Each device has the tokens of both.
    np.testing.assert_array_equal(found[0], np.concatenate([everyone] * 2))
    # Rounded three times, of numbers up to some 8.
    np.testing.assert_allclose(found[1], y, rtol=2**-7, atol=2**-5)
    np.testing.assert_allclose(found[2], normed, rtol=2**-6, atol=2**-5)


def test_one_layer_follows_the_other(mesh: Mesh, named: str, addresses: jax.Array | None):
    """Whatever was exchanged before: the same bits each time, with other numbers of tokens in between."""
    arrays, others = inputs(16), inputs(4, seed=9)
    first = run(mesh, named, addresses, arrays, layers=5)
    for _ in range(3):
        run(mesh, named, addresses, others, layers=2)
        for one, again in zip(first, run(mesh, named, addresses, arrays, layers=5), strict=True):
            np.testing.assert_array_equal(one, again)


def test_a_token_has_the_same_bits_in_a_smaller_batch(mesh: Mesh, named: str, addresses: jax.Array | None):
    arrays = inputs(16)
    few = {name: array[:2] for name, array in arrays.items() if name in ("x", "update")}
    few |= {"weights": arrays["weights"][:, :2], "row_of": jnp.arange(2 * EXPERTS, dtype=jnp.int32).reshape(2, EXPERTS)}
    few |= {"rows": arrays["rows"][:, arrays["row_of"][:2].reshape(-1)], "norm": arrays["norm"]}
    _, y, normed = run(mesh, named, addresses, arrays)
    _, few_y, few_normed = run(mesh, named, addresses, few)
    np.testing.assert_array_equal(np.asarray(few_y), np.asarray(y)[:2])
    np.testing.assert_array_equal(np.asarray(few_normed), np.asarray(normed)[:2])


def test_what_does_not_fit():
    x, addresses = numbers(0, 2, SIZE), jnp.zeros(5, jnp.int32)
    with pytest.raises(ArgumentError, match=r"gather_tokens: addresses has 5 numbers; it must .* be None if that is 1"):
        gather_tokens(x, x, addresses)
    arrays = {name: array[0] if name in ("rows", "weights") else array for name, array in inputs(2).items()}
    del arrays["update"]
    with pytest.raises(ArgumentError, match="combine_experts: addresses has 5 numbers"):
        combine_experts(**arrays, addresses=addresses, eps=EPS)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about CPUs")
def test_cpus_have_no_memory_of_their_own(mesh: Mesh):
    assert peer_addresses(mesh, ("x",)) is None
