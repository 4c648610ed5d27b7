"""What sparse attention selects in place of the indexer's choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.kv_cache import PAGE_SIZE, Pages
from keye_jax.model.attention import AttentionInputs, AttentionOptions, attend_sparse
from keye_jax.model.context import Keys

TOKENS, TOP_K = 2 * PAGE_SIZE, 16


def selected(selection, seed=0):
    """The positions that each of `TOKENS` queries selects, int [TOKENS, TOP_K], -1 behind; scores have many ties."""
    keys = iter(jax.random.split(jax.random.key(seed), 6))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    inputs = AttentionInputs(
        normal(1, TOKENS, 2, 8), normal(1, TOKENS, 1, 8), normal(1, TOKENS, 1, 8),
        normal(1, TOKENS, 1, 8), jnp.ones((1, TOKENS, 1)), normal(1, TOKENS, 8), None,
    )  # fmt: skip
    pages = Pages(inputs.rows.kv.reshape(2, PAGE_SIZE, 2, 8), inputs.index_keys.reshape(2, PAGE_SIZE, 8), None)
    options = AttentionOptions(implementation="xla", intermediates=True, selection=selection)
    found = attend_sparse(
        inputs,
        Keys(pages, jnp.array([[0, 1]]), jnp.array([0])),
        **{"top_k": TOP_K, "scale": 1.0, "index_scale": 1.0},
        options=options,
    )
    assert found.selected is not None
    return np.asarray(found.selected[0])


def test_the_most_recent_keys():
    for query, chosen in enumerate(selected("recent")):
        count = min(query + 1, TOP_K)
        assert chosen[:count].tolist() == list(range(query + 1 - count, query + 1))
        assert (chosen[count:] == -1).all()


def test_random_keys_are_visible_ones_spread_evenly():
    chosen = selected("random")
    for query, row in enumerate(chosen):
        count = min(query + 1, TOP_K)
        assert len(set(row[:count])) == count and row[:count].min() >= 0 and row[:count].max() <= query
    # Of the queries that see all of the first half, each selects a key of it with equal probability.
    times = np.bincount(chosen[PAGE_SIZE:].ravel(), minlength=TOKENS)[:PAGE_SIZE]
    expected = sum(TOP_K / (query + 1) for query in range(PAGE_SIZE, TOKENS))
    assert times.min() > 0 and times.max() < 3 * expected
    assert abs(times.mean() / expected - 1) < 0.1


@pytest.mark.parametrize("selection", ["random", "recent"])
def test_other_selections_are_not_the_indexers(selection):
    assert (selected(selection) != selected("indexer")).any()


def test_random_keys_differ_where_index_scores_do():
    assert (selected("random") == selected("random")).all()
    assert (selected("random") != selected("random", seed=1)).any()


def test_an_idle_row_of_a_step_of_decode_sees_no_key():
    """What the other row gives is the same as with both."""
    keys = iter(jax.random.split(jax.random.key(1), 6))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    inputs = AttentionInputs(
        normal(2, 1, 2, 8), normal(2, 1, 1, 8), normal(2, 1, 1, 8),
        normal(2, 1, 1, 8), jnp.ones((2, 1, 1)), normal(2, 1, 8), None,
    )  # fmt: skip
    pages = Pages(jnp.ones((2, PAGE_SIZE, 2, 8)), jnp.ones((2, PAGE_SIZE, 8)), None)
    scales = {"top_k": TOP_K, "scale": 1.0, "index_scale": 1.0}
    options = AttentionOptions(implementation="xla", selections=True)
    both, one = (
        attend_sparse(
            inputs, Keys(pages, jnp.array([[0], [1]]), jnp.array(start), count=jnp.array(count)), **scales,
            options=options,
        )
        for start, count in (([40, 9], [1, 1]), ([40, 0], [1, 0]))
    )  # fmt: skip
    for found, wanted in zip(jax.tree.leaves(one), jax.tree.leaves(both), strict=True):
        np.testing.assert_array_equal(np.asarray(found[0]), np.asarray(wanted[0]))
    assert one.selected is not None
    assert (np.asarray(one.selected[1]) == -1).all()
    assert not np.asarray(one.out[1]).any()
    assert np.isneginf(np.asarray(one.lse[1])).all()
    assert np.isfinite(np.asarray(both.lse)).all()
