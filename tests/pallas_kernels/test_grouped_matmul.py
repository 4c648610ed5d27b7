import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul


class TestGroupedMatmul:
    @pytest.mark.parametrize(
        "sizes",
        [
            [5, 0, 130, 1, 64],
            [0, 0, 0, 0, 200],
            [200, 0, 0, 0, 0],
            [0, 0, 0, 0, 0],
            [40, 40, 40, 40, 40],
        ],
    )
    def test_group_sizes(self, rng, sizes, implementation):
        self.check(rng, sizes, 200, implementation)

    def test_rows_that_belong_to_no_group(self, rng, implementation):
        self.check(rng, [3, 50, 0], 100, implementation)

    def test_decode_of_one_token(self, rng, implementation):
        sizes = np.zeros(128, np.int64)
        sizes[rng.choice(128, 8, replace=False)] = 1
        self.check(rng, sizes, 8, implementation)

    @staticmethod
    def check(rng, sizes, rows, implementation):
        lhs = rng.normal(size=(rows, 24)).astype(np.float32)
        rhs = rng.normal(size=(len(sizes), 24, 40)).astype(np.float32)
        got = np.asarray(grouped_matmul(lhs, rhs, np.asarray(sizes, np.int32), implementation=implementation))
        group = np.repeat(np.arange(len(sizes)), sizes)
        expected = np.einsum("mk,mkn->mn", lhs[: len(group)], rhs[group], dtype=np.float64)
        np.testing.assert_allclose(got[: len(group)], expected, atol=1e-4)
        assert got.shape == (rows, 40)
        assert np.isfinite(got).all()
