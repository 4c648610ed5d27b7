"""The Hopper kernels for unions, lists, and selection with attention, against the portable implementations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import topk_attention
from pallas_kernels.flash_attention import xla as dense
from pallas_kernels.sparse_attention import xla
from pallas_kernels.sparse_attention.mosaic_gpu.decode import attend_all, attend_single
from pallas_kernels.sparse_attention.mosaic_gpu.gather import GROUP
from pallas_kernels.sparse_attention.mosaic_gpu.prefill import union_attention
from pallas_kernels.sparse_attention.mosaic_gpu.unions import build_unions
from tests.pallas_kernels.gpu.union_lists import CASES, in_parts, selections

SCALE = 128**-0.5


def pool_and_pages(key: jax.Array, context: int, kv_heads: int, page_size: int = 64, extra: int = 3):
    """Keys and values of one sequence and its page table. Pages are in random order, and some are unused."""
    pages = -(-context // page_size)
    data, order = jax.random.split(key)
    kv = jax.random.normal(data, (pages + extra, page_size, 2 * kv_heads, 128), jnp.bfloat16)
    return kv, jax.random.permutation(order, pages + extra)[:pages].astype(jnp.int32)


def unions_from_indices(
    indices: jax.Array, page_table: jax.Array, *, page_size: int, size: int, split: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Builds the inputs of `union_attention` from index lists. Slow.

    Args:
      indices: int32 `[t, top_k]`, the positions that a query attends to, each at most once; -1 is ignored.
      page_table: int32 `[m]` of the sequence.
      page_size: positions of one page.
      size: entries per group. A larger union loses its last keys.
      split: see `build_unions`.

    Returns:
      slots and members int32 `[ceil(t / 16), size]`, counts int32 `[ceil(t / 16), 3]`.
    """
    table, top_k = np.asarray(page_table), indices.shape[1]
    grouped = np.pad(np.asarray(indices), ((0, -len(indices) % GROUP), (0, 0)), constant_values=-1)
    grouped = grouped.reshape(-1, GROUP, top_k)
    slots, members = (np.zeros((len(grouped), size), np.int32) for _ in range(2))
    counts = np.zeros((len(grouped), 3), np.int32)
    for group, own in enumerate(grouped):
        positions, words, counts[group] = in_parts(own, len(table) * page_size, split=split)
        kept = min(size, len(positions))
        slots[group, :kept] = (table[positions // page_size] * page_size + positions % page_size)[:kept]
        members[group, :kept] = words[:kept]
    return jnp.asarray(slots), jnp.asarray(members), jnp.asarray(counts)


def relative_error(value, reference):
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert np.array_equal(np.isfinite(value), np.isfinite(reference))
    finite = np.isfinite(reference)
    return np.linalg.norm((value - reference)[finite]) / np.linalg.norm(reference[finite])


def make_indices(key, queries, context, top_k):
    """Random distinct positions. Each query has another number of them, and one has none."""
    keys = jax.random.split(key, queries)
    indices = jax.vmap(lambda k: jax.random.permutation(k, context)[:top_k])(keys).astype(jnp.int32)
    used = jax.random.randint(key, (queries, 1), 1, top_k + 1).at[queries // 2].set(0)
    return jnp.where(jnp.arange(top_k) < used, indices, -1)


def check_unions(indices, tables, *, page_size, split):
    """Of the selections `[b, t, top_k]`, with a limit that is enough and with one that is not."""
    limit = 16 * indices.shape[2]
    unions = jax.jit(build_unions, static_argnames=("page_size", "limit", "split"))
    result = unions(indices, tables, page_size=page_size, limit=limit, split=split)
    expected = [
        unions_from_indices(own, table, page_size=page_size, size=limit, split=split)
        for own, table in zip(indices, tables, strict=True)
    ]
    slots, members, counts = (np.concatenate(x) for x in zip(*expected, strict=True))
    np.testing.assert_array_equal(result[2], counts)
    used = np.arange(limit) < counts.sum(1)[:, None]
    for value, reference in zip(result[:2], (slots, members), strict=True):
        np.testing.assert_array_equal(np.where(used, value, 0), np.where(used, reference, 0))
    dropped = unions(indices, tables, page_size=page_size, limit=128, split=split)
    np.testing.assert_array_equal(dropped[2], counts)
    few = min(128, limit)
    np.testing.assert_array_equal((used * result[0])[:, :few], used[:, :few] * dropped[0][:, :few])


@pytest.mark.parametrize("split", [False, True], ids=["one part", "three parts"])
@pytest.mark.parametrize(
    ("batch", "queries", "pages", "page_size", "top_k"),
    [(1, 48, 600, 64, 2048), (2, 32, 300, 64, 500), (1, 16, 70, 20, 33), (1, 16, 4096, 64, 2048), (1, 16, 1, 64, 8)],
)
def test_unions(batch, queries, pages, page_size, top_k, split):
    key = jax.random.key(5)
    tables = jnp.stack([jax.random.permutation(k, pages + 3)[:pages] for k in jax.random.split(key, batch)])
    indices = make_indices(key, batch * queries, pages * page_size, top_k).reshape(batch, queries, top_k)
    check_unions(indices, tables, page_size=page_size, split=split)


def groups_of_all_cases(size):
    """A group of queries for each of `CASES`, `[t, 512]`."""
    rng = np.random.default_rng(6)
    return jnp.asarray(np.concatenate([selections(rng, sizes, size, 512) for sizes in CASES.values()]))


@pytest.mark.parametrize("pages", [64, 4096])
def test_parts_of_unions(pages):
    table = jax.random.permutation(jax.random.key(7), pages)
    check_unions(groups_of_all_cases(pages * 64)[None], table[None], page_size=64, split=True)


@pytest.mark.parametrize("short", [0, 5])
def test_parts_match_xla(short):
    """All cases of parts, also where the last group is short. Two runs have the same bits."""
    key = jax.random.key(8)
    kv, pages = pool_and_pages(key, 4000, 4)
    indices = groups_of_all_cases(4000)
    indices = indices[: len(indices) - short]
    q = jax.random.normal(key, (len(indices), 32, 128), jnp.bfloat16)
    lists = unions_from_indices(indices, pages, page_size=64, size=16 * 512, split=True)
    run = jax.jit(lambda *x: union_attention(*x, scale=SCALE))
    out, lse = run(q, kv, *lists)
    expected_out, expected_lse = xla.sparse_attention(q[None], kv, indices[None], pages[None], scale=SCALE)
    for group in range(-(-len(indices) // GROUP)):
        own = slice(group * GROUP, (group + 1) * GROUP)
        if np.isfinite(expected_lse[0, own]).any():
            assert relative_error(out[own], expected_out[0, own]) < 5e-3
            assert relative_error(lse[own], expected_lse[0, own]) < 1e-5
        else:
            assert np.all(np.asarray(out[own], np.float32) == 0)
            assert np.all(np.isneginf(lse[own]))
    for a, b in zip((out, lse), run(q, kv, *lists), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize(
    "queries,heads,kv_heads,context,top_k", [(41, 32, 4, 700, 200), (16, 32, 4, 64, 30), (100, 32, 4, 3000, 300)]
)
def test_union_matches_xla(queries, heads, kv_heads, context, top_k):
    key = jax.random.key(0)
    kv, pages = pool_and_pages(key, context, kv_heads)
    q = jax.random.normal(key, (queries, heads, 128), jnp.bfloat16)
    indices = make_indices(key, queries, context, top_k)
    lists = unions_from_indices(indices, pages, page_size=64, size=-(-context // 64) * 64)
    out, lse = jax.jit(lambda *x: union_attention(*x, scale=SCALE))(q, kv, *lists)
    expected_out, expected_lse = xla.sparse_attention(q[None], kv, indices[None], pages[None], scale=SCALE)
    assert relative_error(out, expected_out[0]) < 5e-3
    assert relative_error(lse, expected_lse[0]) < 1e-5
    assert np.all(np.asarray(out[queries // 2], np.float32) == 0)


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 2), (8, 2), (32, 2)])
def test_union_groups_of_heads(heads, kv_heads):
    key = jax.random.key(1)
    kv, pages = pool_and_pages(key, 400, kv_heads)
    q = jax.random.normal(key, (37, heads, 128), jnp.bfloat16)
    indices = make_indices(key, 37, 400, 150)
    lists = unions_from_indices(indices, pages, page_size=64, size=448)
    out, lse = union_attention(q, kv, *lists, scale=SCALE)
    expected_out, expected_lse = xla.sparse_attention(q[None], kv, indices[None], pages[None], scale=SCALE)
    assert relative_error(out, expected_out[0]) < 5e-3
    assert relative_error(lse, expected_lse[0]) < 1e-5


@pytest.mark.parametrize("split", [False, True], ids=["one part", "three parts"])
def test_union_reads_nothing_behind_count(split):
    """Entries from `counts` on are wild, and rows that are in no list hold NaN."""
    key = jax.random.key(2)
    kv, pages = pool_and_pages(key, 1024, 4)
    q = jax.random.normal(key, (32, 32, 128), jnp.bfloat16)
    indices = make_indices(key, 32, 500, 200)
    slots, members, counts = unions_from_indices(indices, pages, page_size=64, size=1024, split=split)
    expected = union_attention(q, kv, slots, members, counts, scale=SCALE)
    behind = jnp.arange(1024) >= counts.sum(1)[:, None]
    named = jnp.zeros(kv.shape[0] * 64, bool).at[jnp.where(behind, 2**30, slots)].set(True, mode="drop")
    poisoned = jnp.where(named.reshape(-1, 64, 1, 1), kv, jnp.nan)
    out = union_attention(
        q, poisoned, jnp.where(behind, 2**31 - 1, slots), jnp.where(behind, -1, members), counts, scale=SCALE
    )
    for a, b in zip(out, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize(
    "batch,length,heads,kv_heads,top_k,cluster",
    [
        (3, 1, 32, 4, 200, None),
        (2, 1, 32, 4, 2048, 8),
        (2, 5, 8, 2, 130, 1),
        (3, 2, 24, 2, 2048, 4),
        (70, 1, 8, 1, 500, 2),
    ],
)
def test_single_queries_match_xla(batch, length, heads, kv_heads, top_k, cluster):
    key = jax.random.key(3)
    kv, pages = pool_and_pages(key, 4096, kv_heads)
    q = jax.random.normal(key, (batch, length, heads, 128), jnp.bfloat16)
    tables = jnp.stack([jax.random.permutation(k, pages) for k in jax.random.split(key, batch)])
    indices = make_indices(key, batch * length, 4096, top_k).reshape(batch, length, top_k)
    run = jax.jit(functools.partial(attend_single, scale=SCALE, cluster=cluster))
    out, lse = run(q, kv, indices, tables)
    expected_out, expected_lse = jax.jit(functools.partial(xla.sparse_attention, scale=SCALE))(q, kv, indices, tables)
    assert relative_error(out, expected_out) < 5e-3
    assert relative_error(lse, expected_lse) < 1e-5
    for a, b in zip((out, lse), run(q, kv, indices, tables), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("batch,kv_heads,cluster", [(3, 4, None), (2, 2, 1), (70, 1, 2), (4, 4, 16)])
def test_dense_decode_matches_xla(batch, kv_heads, cluster):
    key = jax.random.key(5)
    kv, pages = pool_and_pages(key, 4096, kv_heads)
    q = jax.random.normal(key, (batch, 1, 8 * kv_heads, 128), jnp.bfloat16)
    tables = jnp.stack([jax.random.permutation(k, pages) for k in jax.random.split(key, batch)])
    start = jax.random.randint(key, (batch,), 0, 4096).at[0].set(4095).at[-1].set(0)
    run = jax.jit(functools.partial(attend_all, scale=SCALE, cluster=cluster))
    out, lse = run(q, kv, tables, start[:, None] + 1)
    expected_out, expected_lse = jax.jit(functools.partial(dense.paged_flash_attention, scale=SCALE))(
        q, kv, tables, start
    )
    assert relative_error(out, expected_out) < 5e-3
    assert relative_error(lse, expected_lse) < 1e-5


@pytest.mark.parametrize("q_per_kv", [9, 12, 20, 60])
def test_refuses_groups_that_fill_an_odd_number_of_warpgroups(q_per_kv):
    q, kv = jnp.zeros((16, q_per_kv, 128), jnp.bfloat16), jnp.zeros((1, 64, 2, 128), jnp.bfloat16)
    lists = jnp.zeros((1, 64), jnp.int32), jnp.zeros((1, 64), jnp.int32), jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(NotImplementedError):
        union_attention(q, kv, *lists, scale=SCALE)


def test_refuses():
    q, kv = jnp.zeros((16, 8, 64), jnp.bfloat16), jnp.zeros((1, 64, 4, 64), jnp.bfloat16)
    lists = jnp.zeros((1, 64), jnp.int32), jnp.zeros((1, 64), jnp.int32), jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(NotImplementedError):
        union_attention(q, kv, *lists, scale=SCALE)
    with pytest.raises(NotImplementedError):
        union_attention(
            jnp.zeros((16, 8, 128), jnp.float32), jnp.zeros((1, 64, 4, 128), jnp.float32), *lists, scale=SCALE
        )


@pytest.mark.parametrize(("batch", "queries", "top_k"), [(1, 40, 256), (2, 16, 64), (3, 1, 2048)])
def test_selection_with_attention_matches_portable(batch, queries, top_k):
    key = jax.random.key(4)
    kv, pages = pool_and_pages(key, 4096, 4)
    tables = jnp.stack([jax.random.permutation(k, pages) for k in jax.random.split(key, batch)])
    q = jax.random.normal(key, (batch, queries, 32, 128), jnp.bfloat16)
    scores = jnp.round(jax.random.normal(key, (batch, queries, 4096)) * 8)
    lengths = jax.random.randint(key, (batch, queries), 1, 4097)
    arguments = (q, scores, lengths, kv, tables)
    run = jax.jit(topk_attention, static_argnames=("top_k", "scale", "implementation"))
    out, lse = run(*arguments, top_k=top_k, scale=SCALE, implementation="mosaic_gpu")
    expected_out, expected_lse = run(*arguments, top_k=top_k, scale=SCALE, implementation="xla")
    assert relative_error(out, expected_out) < 5e-3
    assert relative_error(lse, expected_lse) < 1e-5
