"""Unions of neighbouring queries on TPUs, interpreted: lists against sets, and attention against float64."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# JAX has no public name for the races that its interpreter found.
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.topk_attention.mosaic_tpu import attention as attention_kernel
from pallas_kernels.topk_attention.mosaic_tpu.attention import union_attention
from pallas_kernels.topk_attention.mosaic_tpu.unions import Unions, select_unions
from tests.pallas_kernels.attention_oracle import SCALE, assert_close, attention, random_inputs
from tests.pallas_kernels.paged import to_pages
from tests.pallas_kernels.selection_oracle import selection

QUERIES, LENGTH, TOP_K, PAGE = 40, 1280, 16, 64


def shapes(rng):
    """Scores `[3, t, s]` and lengths `[3, t]` of each kind of union."""
    scores = rng.normal(size=(3, QUERIES, LENGTH))
    lengths = np.full((3, QUERIES), LENGTH)
    # Nothing shared: each query has 16 positions of its own. Everything shared: all have the same.
    scores[0] += 100 * (np.arange(LENGTH) // TOP_K == np.arange(QUERIES)[:, None])
    scores[1] = np.round(scores[1, :1] * 2)
    # As at the start of a chunk: queries that see nothing, one position, or about as many as they may select.
    lengths[2] = rng.integers(0, 200, QUERIES)
    lengths[2, :5], lengths[2, 32:] = (0, 1, TOP_K, TOP_K + 1, 127), 0
    return scores.astype(np.float32), lengths.astype(np.int32)


@pytest.fixture(scope="module")
def case():
    """Scores, lengths, page table, and which positions each query selects, bool `[3, t, s]`."""
    rng = np.random.default_rng(0)
    scores, lengths = shapes(rng)
    visible = np.zeros((3, QUERIES, LENGTH + 1), bool)
    np.put_along_axis(visible, selection(scores, lengths, TOP_K), True, axis=-1)
    return scores, lengths, visible[..., :-1]


@pytest.fixture(scope="module")
def pages():
    """Queries, keys and values, and the pages of these."""
    rng = np.random.default_rng(1)
    form = jnp.float32, 128, 1e-5
    q, k, v = random_inputs(rng, form, batch=3, queries=QUERIES, length=LENGTH)
    return q, k, v, *to_pages(rng, np.concatenate([k, v], axis=2), PAGE)


@contextlib.contextmanager
def interpreted():
    """Interprets kernels, and fails if two of their accesses to memory race."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert interpreter.races is not None
    assert not interpreter.races.races_found


@pytest.fixture(scope="module")
def unions(case, pages):
    scores, lengths, _ = case
    with interpreted():
        found = jax.jit(select_unions, static_argnums=3, static_argnames="page_size")(
            scores, lengths, pages[-1], TOP_K, page_size=PAGE
        )
        return jax.block_until_ready(found)


@pytest.mark.slow
def test_a_block_that_selects_most_positions_walks_the_pages(monkeypatch):
    """In rows of scores that are so long that the kernel takes eight at a time."""
    rng, top_k, seen, size = np.random.default_rng(2), 100, 300, 33_000
    scores, lengths = rng.normal(size=(1, 32, size)).astype(np.float32), np.full((1, 32), seen, np.int32)
    q, k, v = random_inputs(rng, (jnp.float32, 128, 1e-5), queries=32, length=320)
    kv, table = to_pages(rng, np.concatenate([k, v], axis=2), PAGE)
    table = jnp.asarray(np.pad(table, ((0, 0), (0, size // PAGE + 1 - table.shape[1]))))
    monkeypatch.setattr(attention_kernel, "_CHUNK", 128)
    with interpreted():
        unions = select_unions(jnp.asarray(scores), jnp.asarray(lengths), table, top_k, page_size=PAGE)
        got = jax.block_until_ready(union_attention(jnp.asarray(q), jnp.asarray(kv), table, unions, scale=SCALE))
    assert unions.dense[0]
    visible = np.zeros((1, 32, 321), bool)
    np.put_along_axis(visible, selection(scores, lengths, top_k), True, axis=-1)
    assert_close(got, attention(q, k, v, visible[..., :-1]), 1e-5)


def members(unions):
    """Which queries of a block selected an entry, bool `[g, block, entries]`."""
    words = np.asarray(unions.words).swapaxes(1, 2).reshape(len(unions.words), 8, -1)
    query = np.arange(unions.block)
    return (words[:, query % 8] >> (query // 8)[:, None]) & 1 != 0


@pytest.mark.slow
def test_lists_are_the_unions(case, pages, unions):
    found, listed = members(unions), np.asarray(unions.rows).reshape(len(unions.rows), -1)
    for g, visible in enumerate(case[2]):
        positions = np.flatnonzero(visible.any(axis=0))
        entries = int(unions.entries[g])
        assert not unions.dense[g]
        assert entries == len(positions)
        rows = pages[-1][g, positions // PAGE] * PAGE + positions % PAGE
        np.testing.assert_array_equal(listed[g, :entries], rows)
        np.testing.assert_array_equal(found[g, :QUERIES, :entries], visible[:, positions])
        # What pads a list to whole turns can be copied, and is masked.
        padded = -(-max(entries, 1) // 1024) * 1024
        assert not found[g, :, entries:padded].any()
        assert not listed[g, entries:padded].any()


@pytest.mark.slow
def test_attention_to_the_unions(case, pages, unions, monkeypatch):
    """Several turns of copies, a union of nothing, and queries that select nothing."""
    q, k, v, kv, table = pages
    monkeypatch.setattr(attention_kernel, "_CHUNK", 128)
    with interpreted():
        got = union_attention(jnp.asarray(q), jnp.asarray(kv), jnp.asarray(table), unions, scale=SCALE)
        jax.block_until_ready(got)
    assert_close(got, attention(q, k, v, case[2]), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("in_products", [False, True])
def test_masks_of_a_whole_block(in_products, monkeypatch):
    """256 queries that share little, and some that select nothing. Matrix units of 256 x 256 add the mask."""
    rng, queries, length = np.random.default_rng(3), 256, 512
    selects = rng.random((1, queries, length)) < 0.02
    selects[0, [0, 127, 128, 255]] = False
    positions = np.flatnonzero(selects.any(axis=(0, 1)))
    entries = len(positions)
    q, k, v = random_inputs(rng, (jnp.float32, 128, 1e-5), queries=queries, length=length, heads=4)
    kv, table = to_pages(rng, np.concatenate([k, v], axis=2), PAGE)
    listed = np.zeros(1024, np.int32)
    listed[:entries] = table[0, positions // PAGE] * PAGE + positions % PAGE
    words = np.zeros((8, 1024), np.uint32)
    for query in range(queries):
        words[query % 8, :entries] |= selects[0, query, positions].astype(np.uint32) << np.uint32(query // 8)
    words = words.view(np.int32).reshape(8, 8, 128).swapaxes(0, 1)[None]
    unions = Unions(
        jnp.asarray(words), jnp.asarray(listed.reshape(1, 8, 128)), jnp.asarray([entries]), jnp.zeros(1, int), queries
    )
    monkeypatch.setattr(attention_kernel, "_CHUNK", 128)
    monkeypatch.setattr(attention_kernel, "_mask_in_products", lambda: in_products)
    with interpreted():
        got = union_attention(jnp.asarray(q), jnp.asarray(kv), jnp.asarray(table), unions, scale=SCALE)
        jax.block_until_ready(got)
    assert_close(got, attention(q, k, v, selects), 1e-5)
