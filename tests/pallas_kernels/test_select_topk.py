"""Selection against a sort."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.select_topk import select_topk
from tests.pallas_kernels.selection_oracle import selection


def check(scores, lengths, k, implementation):
    scores, lengths = np.asarray(scores, np.float32), np.asarray(lengths, np.int32)
    arrays = jnp.asarray(scores), jnp.asarray(lengths)
    got = np.asarray(select_topk(*arrays, k, implementation=implementation))
    np.testing.assert_array_equal(got, selection(scores, lengths, k))
    again = np.asarray(select_topk(*arrays, k, implementation=implementation))
    np.testing.assert_array_equal(got, again)


class TestSelectTopk:
    @pytest.mark.parametrize("k", [1, 16, 64, 2048])
    def test_random(self, rng, k, implementation):
        check(rng.normal(size=(5, 5000)), rng.integers(0, 5001, 5), k, implementation)

    @pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 300])
    def test_lengths_about_k(self, rng, length, implementation):
        check(rng.normal(size=(2, 300)), [length, length], 64, implementation)

    def test_more_wanted_than_there_is(self, rng, implementation):
        check(rng.normal(size=(2, 10)), [10, 3], 64, implementation)

    def test_many_ties(self, rng, implementation):
        check(rng.integers(0, 3, (4, 2000)), [2000, 1999, 777, 65], 64, implementation)

    def test_rows_of_equal_scores(self, implementation):
        check(np.full((2, 500), -1.5), [500, 100], 64, implementation)

    def test_zeros_of_both_signs_are_equal(self, rng, implementation):
        check(np.where(rng.random((3, 500)) < 0.5, 0.0, -0.0), [500, 400, 64], 64, implementation)

    def test_scores_that_share_their_leading_bits(self, rng, implementation):
        """Thousands of scores are next to the threshold, as in clustered index scores."""
        check(1 + rng.integers(0, 4000, (2, 8000)) * np.finfo(np.float32).eps, [8000, 8000], 2048, implementation)

    def test_what_lies_behind_the_length_is_ignored(self, rng, implementation):
        scores = rng.normal(size=(3, 400))
        scores[:, 200:] = [[np.inf], [np.nan], [1e30]]
        check(scores, [200, 200, 200], 64, implementation)

    def test_infinities(self, rng, implementation):
        scores = rng.normal(size=(2, 400))
        scores[0, ::2], scores[1, 5:] = -np.inf, -np.inf
        scores[1, 3] = np.inf
        check(scores, [400, 390], 64, implementation)

    def test_leading_axes(self, rng, implementation):
        check(rng.normal(size=(2, 3, 200)), rng.integers(0, 201, (2, 3)), 16, implementation)

    @pytest.mark.parametrize("kind", ["random", "close", "ties", "zeros", "equal", "infinities", "blocks", "front"])
    def test_long_rows(self, rng, kind, implementation):
        """More scores than a kernel holds at once, and lengths about k."""
        shape = (8, 40_000)
        scores = rng.normal(size=shape)
        match kind:
            case "close":
                scores = 1 + scores * 2**-12
            case "ties":
                scores = np.round(scores * 4) / 4
            case "zeros":
                scores = np.where(rng.random(shape) < 0.99, np.where(rng.random(shape) < 0.5, 0.0, -0.0), scores)
            case "equal":
                scores = np.full(shape, -3.5)
            case "infinities":
                scores = np.where(rng.random(shape) < 0.99, -np.inf, np.where(scores > 2, np.inf, scores))
            case "blocks":
                scores = 0.1 * scores + np.repeat(rng.normal(size=(8, 625)), 64, axis=1)
            case "front":
                scores = 1e-3 * scores + 50 * (np.arange(shape[1]) < 2000)
        check(scores, [40_000, 39_999, 2049, 2048, 2047, 1, 0, 20_001], 2048, implementation)
