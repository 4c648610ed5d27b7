"""Attention to float8 keys and values with scales, against attention to the numbers that they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_flash_attention, portable, sparse_attention
from pallas_kernels.dispatch import available
from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.sparse_attention import mosaic_gpu
from tests.pallas_kernels.attention_oracle import FORMS, SCALE, assert_close, attention, random_inputs
from tests.pallas_kernels.paged import to_pages

LENGTH, QUERIES = 300, 9


@pytest.fixture(params=["float32", "bfloat16"])
def case(request, rng):
    """Queries, pages, their scales, a page table, and the numbers of keys and values in their order."""
    form = FORMS[request.param]
    q, k, v = random_inputs(rng, form, batch=2, queries=QUERIES, length=LENGTH)
    kv, scales = np.concatenate([k, v], axis=2), 2.0 ** rng.integers(-4, 1, (2, LENGTH, 4)).astype(np.float32)
    values = np.asarray(jnp.asarray(kv, jnp.float8_e4m3fn), np.float32)
    pages, table = to_pages(np.random.default_rng(1), np.concatenate([values, values * 0 + scales[..., None]], 3), 64)
    stored, factors = np.split(np.nan_to_num(pages), 2, axis=3)
    pages = jnp.asarray(stored, jnp.float8_e4m3fn), jnp.asarray(factors[..., 0])
    return form, jnp.asarray(q, form[0]), *pages, table, np.split(values * scales[..., None], 2, axis=2)


def compiled(operation, scales, implementation=None):
    """A program of its own: one that was traced for another platform is not taken again."""
    return jax.jit(functools.partial(operation, scale=SCALE, kv_scales=scales, implementation=implementation))


HOPPER = pytest.mark.skipif("mosaic_gpu" not in available(), reason="needs a Hopper GPU")


@pytest.mark.parametrize("platform", ["gpu", "elsewhere", pytest.param("mosaic_gpu", marks=HOPPER)])
@pytest.mark.parametrize("queries", [QUERIES, 2 * QUERIES])
@pytest.mark.parametrize("top_k", [40, 250])
def test_sparse(case, rng, monkeypatch, platform, queries, top_k):
    """What GPUs run, too: there many selected positions of few are attended to under a mask."""
    monkeypatch.setattr(portable, "on_gpus", lambda gpu, other, *x: (gpu if platform == "gpu" else other)(*x))
    form, q, kv, scales, table, (k, v) = case
    q = jnp.tile(q, (1, queries // QUERIES, 1, 1))
    indices = np.argsort(rng.random((2, queries, LENGTH)), axis=-1)[..., :top_k].astype(np.int32)
    indices[:, 1, 3:] = -1
    visible = np.zeros((2, queries, LENGTH + 1), bool)
    np.put_along_axis(visible, indices, True, axis=-1)
    implementation = "mosaic_gpu" if platform == "mosaic_gpu" else None
    got = compiled(sparse_attention, scales, implementation)(q, kv, indices, table)
    assert_close(got, attention(np.asarray(q, np.float32), k, v, visible[..., :-1]), form[2])


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_unions_of_hopper_gpus_read_copies(rng, monkeypatch, copies):
    """Contexts are copied a number of sequences at a time; attention to the copies is computed by "xla" here."""
    q, k, v = random_inputs(rng, FORMS["bfloat16"], batch=4, queries=16, length=LENGTH)
    values = jnp.asarray(np.concatenate([k, v], axis=2), jnp.float8_e4m3fn)
    stored = np.concatenate([np.asarray(values, np.float32), 2.0 ** rng.integers(-4, 1, (4, LENGTH, 4, 1))], axis=3)
    pages, table = to_pages(rng, stored, 64)
    kv = jnp.asarray(np.nan_to_num(pages[..., :-1]), jnp.float8_e4m3fn)
    scales = jnp.asarray(np.nan_to_num(pages[..., -1]), jnp.float32)
    indices = jnp.asarray(np.argsort(rng.random((4, 16, LENGTH)), axis=-1)[..., :40], jnp.int32)
    q = jnp.asarray(q, jnp.bfloat16)

    batches = []

    def attend(q, kv, indices, table, *, scale):
        assert kv.dtype == q.dtype
        batches.append(len(q))
        return sparse_attention(q, kv, indices, table, scale=scale, implementation="xla")

    monkeypatch.setattr(mosaic_gpu, "sparse_prefill", attend)
    monkeypatch.setattr(mosaic_gpu, "_COPY_BYTES", copies * table.shape[1] * kv[0].size * 2)
    found = mosaic_gpu.sparse_attention(q, kv, indices, table, scales, scale=SCALE)
    assert set(batches) == {copies}
    wanted = sparse_attention(q, kv, indices, table, scale=SCALE, kv_scales=scales, implementation="xla")
    for some, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(some, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("platform", ["gpu", "elsewhere"])
def test_dense(case, monkeypatch, platform):
    monkeypatch.setattr(portable, "on_gpus", lambda gpu, other, *x: (gpu if platform == "gpu" else other)(*x))
    form, q, kv, scales, table, (k, v) = case
    start = np.asarray([0, LENGTH - QUERIES], np.int32)
    got = compiled(paged_flash_attention, scales)(q, kv, table, start)
    visible = np.arange(LENGTH) <= (start[:, None] + np.arange(QUERIES))[..., None]
    assert_close(got, attention(np.asarray(q, np.float32), k, v, visible), form[2])


def test_scales_that_do_not_fit_and_kernels_without_them_are_refused(case):
    _, q, kv, scales, table, _ = case
    start, indices = jnp.zeros(2, jnp.int32), jnp.zeros((2, QUERIES, 1), jnp.int32)
    with pytest.raises(ArgumentError, match="kv_scales has shape"):
        paged_flash_attention(q, kv, table, start, scale=SCALE, kv_scales=scales[..., :1])
    for name in ("mosaic_gpu", "mosaic_tpu", "cudnn"):
        with pytest.raises(UnsupportedError, match="have scales"):
            paged_flash_attention(q, kv, table, start, scale=SCALE, kv_scales=scales, implementation=name)
    with pytest.raises(UnsupportedError, match="have scales"):
        sparse_attention(q, kv, indices, table, scale=SCALE, kv_scales=scales, implementation="mosaic_tpu")
