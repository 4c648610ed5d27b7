"""Grouped matmul against float64: ragged groups, NaN where nothing may be read, the released shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import xla
from pallas_kernels.grouped_matmul.mosaic_gpu import MatmulConfig, gate_up_silu, grouped_matmul


def normal(shape, seed, scale=1.0):
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(jnp.bfloat16)


def expected(lhs, rhs, sizes, fused=False):
    """The products in float64, on the CPU."""
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    out, start = np.zeros((lhs.shape[0], rhs.shape[2])), 0
    for group, size in enumerate(sizes):
        out[start : start + size] = lhs[start : start + size] @ rhs[group]
        start += size
    if fused:
        gate, up = np.split(out, 2, axis=1)
        out = gate / (1 + np.exp(-gate)) * up
    return out


def check_rows(out, want, valid, limit=5e-3):
    out, want = np.asarray(out, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(out).all()
    assert (out[valid:] == 0).all()
    norms = np.linalg.norm(want[:valid], axis=1)
    assert (np.linalg.norm(out[:valid] - want[:valid], axis=1) <= limit * norms + 1e-6).all()


RAGGED = {
    "ragged": (701, [3, 0, 130, 64, 1, 200, 0, 302]),
    "one group and rows behind it": (341, [0, 0, 0, 333, 0, 0, 0, 0]),
    "fewer rows than a box": (5, [1, 0, 0, 2, 0, 0, 0, 0]),
    "no rows in any group": (70, [0] * 8),
    "whole tiles": (1024, [128, 256, 64, 0, 192, 256, 128, 0]),
    "small groups": (61, [7, 8, 9, 1, 0, 15, 16, 5]),
}


@pytest.mark.parametrize("case", RAGGED)
@pytest.mark.parametrize("config", [MatmulConfig(2, 256), MatmulConfig(1, 128)])
@pytest.mark.parametrize("fused", [False, True])
def test_ragged(case, config, fused):
    rows, sizes = RAGGED[case]
    valid = sum(sizes)
    if fused:
        config = MatmulConfig(config.consumers, config.columns // 2)
    # Rows of no group and matrices of empty groups must not be used.
    lhs = normal((rows, 192), 0).at[valid:].set(jnp.nan)
    rhs = normal((8, 192, 512), 1, 0.1).at[np.flatnonzero(np.array(sizes) == 0)].set(jnp.nan)
    out = (gate_up_silu if fused else grouped_matmul)(lhs, rhs, jnp.asarray(sizes, jnp.int32), config=config)
    check_rows(out, expected(lhs, jnp.nan_to_num(rhs), sizes, fused), valid)


@pytest.mark.parametrize("groups", [1, 31, 32, 33, 200, 1024])
def test_number_of_groups(groups):
    sizes = np.random.default_rng(0).multinomial(900, np.ones(groups) / groups)
    lhs, rhs = normal((900, 64), 0), normal((groups, 64, 128), 1)
    check_rows(grouped_matmul(lhs, rhs, jnp.asarray(sizes, jnp.int32)), expected(lhs, rhs, sizes), 900)


def routing(tokens, kind):
    """Rows of each of 128 experts when every token goes to 8 distinct ones."""
    rng = np.random.default_rng(0)
    if kind == "one set":
        chosen = np.broadcast_to(rng.permutation(128)[:8], (tokens, 8))
    else:
        score = rng.gumbel(size=(tokens, 128)) - (np.log1p(rng.permutation(128)) if kind == "zipf" else 0)
        chosen = np.argpartition(-score, 8, axis=1)[:, :8]
    return np.bincount(chosen.ravel(), minlength=128).astype(np.int32)


@pytest.mark.parametrize(
    "tokens, kind", [(1, "uniform"), (64, "uniform"), (64, "one set"), (1024, "zipf"), (4096, "uniform")]
)
def test_model_shapes(tokens, kind):
    valid, sizes = tokens * 8, jnp.asarray(routing(tokens, kind))
    gate_up, down = normal((128, 2048, 1536), 1, 2048**-0.5), normal((128, 768, 2048), 2, 768**-0.5)
    lhs = normal((valid + 72, 2048), 0)
    want = xla.grouped_matmul(lhs, gate_up, sizes)
    check_rows(grouped_matmul(lhs, gate_up, sizes), want, valid)
    inner = gate_up_silu(lhs, gate_up, sizes)
    gate, up = jnp.split(want.astype(jnp.float32), 2, axis=1)
    check_rows(inner, jax.nn.silu(gate) * up, valid, 1e-2)  # The reference rounds gate and up to bf16.
    out = grouped_matmul(inner, down, sizes)
    check_rows(out, xla.grouped_matmul(inner, down, sizes), valid)
    assert (out == grouped_matmul(inner, down, sizes)).all()


def test_refuses_what_it_cannot_do():
    sizes = jnp.array([4, 4], jnp.int32)
    lhs, rhs = normal((8, 64), 0), normal((2, 64, 64), 1)
    for bad in (
        (lhs.astype(jnp.float32), rhs.astype(jnp.float32), sizes),
        (lhs[:, :32], rhs[:, :32], sizes),
        (lhs, rhs[:, :, :48], sizes),
        (lhs, rhs, sizes.astype(jnp.uint32)),
        (lhs[:0], rhs, sizes),
    ):
        with pytest.raises(NotImplementedError):
            grouped_matmul(*bad)
    with pytest.raises(NotImplementedError):
        gate_up_silu(lhs, rhs, sizes)
