"""The nucleus of each row against sorted logits in float64, in every implementation that this machine runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ArgumentError, dispatch, nucleus
from tests.pallas_kernels.nucleus_oracle import CASES, assert_nucleus, logits_of

LIMITS, SHARES = np.asarray([0, 1, 20, 700], np.int32), np.asarray([0.97, 1, 0.5, 0.9], np.float32)


@pytest.fixture(
    params=[name for name in dispatch.OPERATIONS["nucleus"].implementations if name in dispatch.available()]
)
def named(request) -> str:
    return request.param


@pytest.mark.parametrize("kind", CASES)
def test_nucleus(named, kind):
    logits = logits_of(kind, 4, 2048)
    for limits, shares in ((LIMITS, SHARES), (LIMITS[::-1], SHARES)):
        found = nucleus(logits, limits, shares, np.ones(4, np.int32), implementation=named)
        assert_nucleus(logits, limits, shares, *map(np.asarray, found))


def test_more_tokens_than_candidates(named):
    """Sizes at which a search has to go on behind the candidates, and rows of several blocks of a kernel."""
    logits = logits_of("normal", 4, 20_000)
    limits, shares = np.asarray([0, 20, 2048, 0], np.int32), np.asarray([0.3, 0.95, 0.99, 1], np.float32)
    found = nucleus(logits, limits, shares, np.ones(4, np.int32), implementation=named)
    assert_nucleus(logits, limits, shares, *map(np.asarray, found))


def test_rows_that_are_not_active_change_nothing(named):
    logits = logits_of("normal", 4, 2048)
    run = jax.jit(nucleus, static_argnames="implementation")
    active = np.asarray([1, 0, 1, 0], np.int32)
    together = run(logits, LIMITS, SHARES, np.ones(4, np.int32), implementation=named)
    some = run(logits, LIMITS, SHARES, active, implementation=named)
    for one, other in zip(together, some, strict=True):
        np.testing.assert_array_equal(np.asarray(one)[::2], np.asarray(other)[::2])


def test_mistakes_and_nothing_to_do():
    arrays = jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32), jnp.ones(2), jnp.ones(2, jnp.int32)
    with pytest.raises(ArgumentError, match=r"nucleus: top_k has shape \[3\]"):
        nucleus(arrays[0], jnp.zeros(3, jnp.int32), *arrays[2:])
    with pytest.raises(ArgumentError, match="nucleus: logits is bfloat16"):
        nucleus(arrays[0].astype(jnp.bfloat16), *arrays[1:])
    assert [x.shape for x in nucleus(*(x[:0] for x in arrays))] == [(0,), (0,)]
