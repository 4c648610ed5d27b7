"""A NumPy machine runs the body of the GPU kernel for single queries. It tests logic, not races, without a GPU."""

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.sparse_attention.mosaic_gpu import decode
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


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "cluster", "page_size", "size"),
    [(8, 1, 1, 20, 600), (4, 2, 2, 64, 1300), (12, 1, 4, 16, 200), (16, 2, 8, 64, 2048), (8, 1, 16, 64, 700)],
)
def test_single_queries(heads, kv_heads, cluster, page_size, size, listed):
    rng = np.random.default_rng(size)
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
    for block in range(shape.blocks):
        machine = NumpyTensorMachine(256, cluster, decode.WORDS, block)
        decode.decode_body(
            machine,
            q.view(np.uint32),
            kv.view(np.uint32),
            (lists if listed else counts).astype(np.uint32),
            tables.astype(np.uint32),
            out.view(np.uint32),
            lse.view(np.uint32),
            machine.word(block),
            machine.rank,
            shape=shape,
        )
    for query, own in enumerate(positions):
        if len(own):
            want, want_lse = expected(q[query], kv, tables[query // length], own)
            got = out[query].astype(np.float64)
            assert np.linalg.norm(got - want) < 5e-3 * np.linalg.norm(want)
            np.testing.assert_allclose(lse[query], want_lse, rtol=1e-5)
        else:
            assert (out[query] == 0).all()
            assert np.isneginf(lse[query]).all()
