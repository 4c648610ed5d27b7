"""A NumPy machine runs the body of the GPU kernel for single queries. It tests logic, not races, without a GPU."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.sparse_attention.mosaic_gpu import decode, decode_float8
from tests.pallas_kernels.gpu.numpy_machine import NumpyTensorMachine

SCALE = 128**-0.5


def expected(q, kv, table, positions):
    """Attention and log-sum-exps of one query `[n, 128]`, in float64."""
    kv_heads, page_size = kv.shape[2] // 2, kv.shape[1]
    rows = kv[table[positions // page_size], positions % page_size].astype(np.float64)
    keys, values = (np.repeat(x, len(q) // kv_heads, 1) for x in np.split(rows, 2, 1))
    scores = np.einsum("nd,snd->ns", q.astype(np.float64), keys) * SCALE
    highest = scores.max(1, keepdims=True)
    weights = np.exp(scores - highest)
    total = weights.sum(1, keepdims=True)
    return np.einsum("ns,snd->nd", weights / total, values), (highest + np.log(total))[:, 0]


@pytest.mark.parametrize("kind", ["listed", "counted", "float8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "cluster", "page_size", "size"),
    [(8, 1, 1, 20, 600), (4, 2, 2, 64, 1300), (12, 1, 4, 16, 200), (16, 2, 8, 64, 2048), (8, 1, 16, 64, 700)],
)
def test_single_queries(heads, kv_heads, cluster, page_size, size, kind):
    rng, listed = np.random.default_rng(size), kind != "counted"
    sequences, length, pages = 2, 2, -(-size // page_size)
    kv = rng.standard_normal((sequences * pages + 3, page_size, 2 * kv_heads, 128)).astype(ml_dtypes.bfloat16)
    tables = rng.permutation(len(kv))[: sequences * pages].reshape(sequences, pages)
    q = (3 * rng.standard_normal((sequences * length, heads, 128))).astype(ml_dtypes.bfloat16)
    counts = np.array([pages * page_size, 1, size // 2, 0])
    entries = size if listed else pages * page_size
    lists = np.full((4, entries), -1)
    for own, count in zip(lists, counts, strict=True):
        own[rng.permutation(entries)[:count]] = rng.permutation(pages * page_size)[:count][:entries]
    # Rows that no query reads are NaN.
    read = np.zeros(kv.shape[:2], bool)
    positions = [own[own >= 0] if listed else np.arange(count) for own, count in zip(lists, counts, strict=True)]
    for query, own in enumerate(positions):
        read[tables[query // length, own // page_size], own % page_size] = True
    kv[~read] = np.nan
    scales = None
    if kind == "float8":
        kv, scales = kv.astype(ml_dtypes.float8_e4m3fn), 2.0 ** rng.integers(-9, 3, kv.shape[:3]).astype(np.float32)
        scales[~read] = np.nan
    shape = decode.DecodeShape(
        queries=sequences * length,
        queries_per_sequence=length,
        heads=heads,
        kv_heads=kv_heads,
        pages=pages,
        page_size=page_size,
        size=entries,
        listed=listed,
        scale=SCALE,
    )
    out, lse = np.full(q.shape, 7, ml_dtypes.bfloat16), np.full(q.shape[:2], 7, np.float32)
    body: Callable[..., None] = decode.decode_body if scales is None else decode_float8.float8_body
    arrays = [q, kv, *([] if scales is None else [scales])]
    arrays += [(lists if listed else counts).astype(np.uint32), tables.astype(np.uint32), out, lse]
    for block in range(shape.blocks):
        machine = NumpyTensorMachine(256, cluster, decode.WORDS, block)
        body(machine, *(x.view(np.uint32) for x in arrays), machine.word(block), machine.rank, shape=shape)
    if scales is not None:
        kv = kv.astype(np.float32) * scales[..., None]
    for query, own in enumerate(positions):
        if len(own):
            want, want_lse = expected(q[query], kv, tables[query // length], own)
            got = out[query].astype(np.float64)
            assert np.linalg.norm(got - want) < 5e-3 * np.linalg.norm(want)
            np.testing.assert_allclose(lse[query], want_lse, rtol=1e-5)
        else:
            assert (out[query] == 0).all()
            assert np.isneginf(lse[query]).all()


def test_every_float8_number_is_unpacked_exactly():
    numbers = np.arange(256, dtype=np.uint8)
    machine = NumpyTensorMachine(64, 1, 64)
    words = machine.load_global(machine.row(numbers.view(np.uint32), 0, 64), machine.thread)
    for first, pair in enumerate(decode_float8.unpack(machine, words)):
        got = pair.raw.view(ml_dtypes.bfloat16).astype(np.float32)
        want = numbers.reshape(64, 4)[:, first::2].reshape(-1).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(got, np.where(np.isnan(want), np.copysign(480, want), want))
