"""The formula of attention in float64, and random inputs, for the tests of every operation with attention."""

import jax.numpy as jnp
import numpy as np

SCALE = 0.2

FORMS = {"float32": (jnp.float32, 32, 1e-5), "bfloat16": (jnp.bfloat16, 128, 2e-2)}
"""By name: a dtype, a head dimension that the accelerated kernels take, and the tolerance of the output."""


def attention(q, k, v, visible):
    """Attention of q `[b, t, n, d]` to k, v `[b, s, k, d]` where `visible [b, t, s]`; output and log-sum-exp."""
    groups = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    logits = np.einsum("btnd,bsnd->btns", q, k, dtype=np.float64) * SCALE
    logits = np.where(visible[:, :, None], logits, -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(logits).sum(-1))
    weights = np.exp(logits - np.where(np.isfinite(lse), lse, 0)[..., None])
    return np.einsum("btns,bsnd->btnd", weights, v, optimize=True), lse


def random_inputs(rng, form=FORMS["float32"], *, batch=1, queries, length, heads=8, kv_heads=2, dim=None):
    """Random q `[b, t, n, d]`, k and v `[b, s, k, d]`: float32 numbers that the dtype of `form` holds exactly."""
    dim = dim or form[1]
    q = rng.normal(size=(batch, queries, heads, dim))
    k, v = rng.normal(size=(2, batch, length, kv_heads, dim))
    return [np.asarray(jnp.asarray(x, form[0]), np.float32) for x in (q, k, v)]


def assert_close(got, expected, atol):
    """Asserts that outputs and log-sum-exps are close. Log-sum-exps are float32 sums whatever the inputs' dtype is."""
    out, lse = (np.asarray(x, np.float64) for x in got)
    np.testing.assert_allclose(out, expected[0], atol=atol)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected[1]))
    finite = np.isfinite(expected[1])
    np.testing.assert_allclose(lse[finite], expected[1][finite], atol=min(atol, 1e-4))
