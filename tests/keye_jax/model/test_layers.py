"""Gradients of a linear map in bfloat16."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from keye_jax.model.layers import Linear


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_gradients_are_rounded_once(dtype: Any):
    """Of whole numbers, whose products and sums are exact, in two dimensions to three."""
    rng = np.random.default_rng(0)
    linear = Linear({"a": 3, "b": 4}, {"c": 2, "d": 5}, bias=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))  # type: ignore
    x, d_out, weight = (rng.integers(-3, 4, shape) for shape in ((6, 3, 4), (6, 2, 5), (2, 5, 3, 4)))
    linear.weight.set_value(jnp.asarray(weight, jnp.bfloat16))
    graph, state = nnx.split(linear)
    _, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x, dtype=dtype), state, jnp.asarray(x, jnp.bfloat16))
    d_state, d_x = pull(jnp.asarray(d_out, dtype or jnp.bfloat16))
    assert d_x.dtype == d_state["weight"].get_value().dtype == jnp.bfloat16
    np.testing.assert_array_equal(d_x, np.einsum("tcd,cdab->tab", d_out, weight).astype(jnp.bfloat16))
    np.testing.assert_array_equal(
        d_state["weight"].get_value(), np.einsum("tcd,tab->cdab", d_out, x).astype(jnp.bfloat16)
    )
    np.testing.assert_array_equal(d_state["bias"].get_value(), d_out.sum(0).astype(jnp.bfloat16))
