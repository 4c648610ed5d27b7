import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import expert_mlp, grouped_matmul

FORMS = {"float32": (jnp.float32, 24, 40, 1e-5), "bfloat16": (jnp.bfloat16, 192, 256, 1e-2)}
"""By name: a dtype, sizes (in, out) that the accelerated kernels take, and the tolerance relative to a row's norm."""

SIZES = {
    "ragged": (200, [5, 0, 130, 1, 64]),
    "the last group": (200, [0, 0, 0, 0, 200]),
    "the first group": (200, [200, 0, 0, 0, 0]),
    "no rows in any group": (200, [0, 0, 0, 0, 0]),
    "equal groups": (200, [40, 40, 40, 40, 40]),
    "rows that belong to no group": (100, [3, 50, 0]),
    "fewer rows than a tile": (5, [1, 0, 0, 2, 0, 0, 0, 0]),
    "whole tiles": (704, [128, 256, 64, 0, 192, 0, 64, 0]),
    "small groups": (61, [7, 8, 9, 1, 0, 15, 16, 5]),
    "one group": (77, [70]),
}


run_product, run_mlp = (
    jax.jit(function, static_argnames="implementation") for function in (grouped_matmul, expert_mlp)
)


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def random(rng, form, *shape):
    return jnp.asarray(rng.normal(size=shape), form[0])


def by_group(lhs, rhs, sizes):
    """The products in float64 of the rows that have a group."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    lhs, rhs = np.asarray(lhs, np.float64)[: len(group)], np.asarray(rhs, np.float64)
    return np.stack([row @ rhs[i] for row, i in zip(lhs, group, strict=True)] or [np.zeros(rhs.shape[2])])[: len(group)]


def check(got, expected, rows, tolerance):
    got = np.asarray(got, np.float64)
    assert got.shape == (rows, expected.shape[1])
    assert np.isfinite(got).all()
    error = np.linalg.norm(got[: len(expected)] - expected, axis=1)
    assert (error <= tolerance * np.linalg.norm(expected, axis=1) + 1e-6).all()


class TestGroupedMatmul:
    @pytest.mark.parametrize("case", SIZES)
    def test_group_sizes(self, rng, case, form, implementation):
        self.check(rng, *SIZES[case], form, implementation)

    @pytest.mark.parametrize("tokens", [1, 2, 16, 64])
    def test_decode(self, rng, tokens, form, implementation):
        """Each token goes to 8 of 128 experts."""
        chosen = np.argsort(rng.random((tokens, 128)), axis=1)[:, :8]
        self.check(rng, tokens * 8, np.bincount(chosen.ravel(), minlength=128), form, implementation)

    @staticmethod
    def check(rng, rows, sizes, form, implementation):
        _, inner, outer, tolerance = form
        lhs, rhs = random(rng, form, rows, inner), random(rng, form, len(sizes), inner, outer)
        got = run_product(lhs, rhs, np.asarray(sizes, np.int32), implementation=implementation)
        check(got, by_group(lhs, rhs, sizes), rows, tolerance)


class TestExpertMlp:
    @pytest.mark.parametrize("case", SIZES)
    def test_group_sizes(self, rng, case, form, implementation):
        (rows, sizes), (_, inner, outer, tolerance) = SIZES[case], form
        lhs, gate_up = random(rng, form, rows, inner), random(rng, form, len(sizes), inner, 2 * outer)
        gate_up /= inner**0.5
        down = random(rng, form, len(sizes), outer, inner)
        got = run_mlp(lhs, gate_up, down, np.asarray(sizes, np.int32), implementation=implementation)
        gate, up = np.split(by_group(lhs, gate_up, sizes), 2, axis=1)
        check(got, by_group(gate / (1 + np.exp(-gate)) * up, down, sizes), rows, 2 * tolerance)
