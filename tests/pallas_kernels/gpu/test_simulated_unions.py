"""A NumPy machine runs the kernels that list unions of selections, and the order of attention's steps is checked."""

import functools

import numpy as np
import pytest

from pallas_kernels.sparse_attention.mosaic_gpu.attend import choose_step
from pallas_kernels.sparse_attention.mosaic_gpu.unions import BITS, bits_body, union_body
from tests.pallas_kernels.gpu.numpy_machine import NumpyMachine
from tests.pallas_kernels.gpu.union_lists import CASES, bitmaps, in_parts, selections

THREADS = 128


def check_unions(indices, tables, *, page_size, cluster, split, limit=None):
    """Of groups `[g, 16, top_k]` whose sequences have these page tables `[b, m]`, from lists and from bitmaps."""
    groups, _, top_k = indices.shape
    size, limit = tables.shape[1] * page_size, limit or 16 * top_k
    selected = np.zeros((groups * 16, size + 1), bool)
    np.put_along_axis(selected, indices.reshape(groups * 16, -1), True, axis=1)
    reach = indices.max((1, 2)) + 1
    bits = bitmaps(selected[:, :-1], np.repeat(reach, 16))
    lists = indices.astype(np.uint32).reshape(groups, -1)
    check_body(functools.partial(union_body, top_k=top_k), [lists], indices, tables, page_size, cluster, split, limit)
    bits_of = functools.partial(bits_body, width=bits.shape[1])
    arrays = bits, reach.astype(np.uint32)
    check_body(bits_of, arrays, indices, tables, page_size, cluster, split, limit)


def check_body(body, arrays, indices, tables, page_size, cluster, split, limit):
    groups, size = len(indices), tables.shape[1] * page_size
    slots, members = (np.full((groups, limit), 7, np.uint32) for _ in range(2))
    counts = np.full((groups, 3), 9, np.uint32)
    words = BITS + -(-size // (256 * cluster)) * 128
    for index in range(groups):
        machine = NumpyMachine(THREADS, cluster, words, index)
        body(
            machine,
            *arrays,
            tables.astype(np.uint32),
            slots,
            members,
            counts,
            machine.word(index),
            machine.rank,
            size=size,
            limit=limit,
            page_size=page_size,
            table_groups=groups // len(tables),
            split=split,
        )
        positions, words_of, lengths = in_parts(indices[index], size, split=split)
        np.testing.assert_array_equal(counts[index], lengths)
        table, kept = tables[index * len(tables) // groups], min(limit, len(positions))
        expected = table[positions // page_size] * page_size + positions % page_size
        np.testing.assert_array_equal(slots[index, :kept], expected[:kept])
        np.testing.assert_array_equal(members[index, :kept], words_of[:kept])
        assert (slots[index, kept:] == 7).all(), "nothing behind the list is written"


def page_tables(rng, sequences, pages):
    return np.stack([rng.permutation(pages + 3)[:pages] for _ in range(sequences)])


@pytest.mark.parametrize("split", [False, True], ids=["one part", "three parts"])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(("top_k", "page_size"), [(100, 64), (33, 20)])
def test_unions(cluster, top_k, page_size, split):
    rng = np.random.default_rng(top_k)
    groups, pages = 4, 5000 // page_size
    pool = rng.choice(pages * page_size, 900, replace=False)
    indices = np.stack([rng.permutation(pool)[:top_k] for _ in range(groups * 16)])
    indices[rng.random(indices.shape) < 0.1] = -1
    indices[17] = -1
    tables = page_tables(rng, 2, pages)
    check_unions(indices.reshape(groups, 16, top_k), tables, page_size=page_size, cluster=cluster, split=split)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("cluster", "page_size"), [(1, 64), (2, 20)])
def test_parts_of_unions(case, cluster, page_size):
    rng = np.random.default_rng(3)
    tables = page_tables(rng, 1, 4000 // page_size)
    indices = selections(rng, CASES[case], tables.shape[1] * page_size, 512)
    sizes = [len(set(rows.ravel()) - {-1}) for rows in (indices[:8], indices[8:], indices)]
    assert (sizes[2] - sizes[1], sizes[2] - sizes[0]) == CASES[case][:2], "the case is what it says"
    check_unions(indices[None], tables, page_size=page_size, cluster=cluster, split=True)


def test_keys_of_many_queries_at_one_place():
    """All positions of a chunk of 256 are selected, by one half, by the other and by both. The last begins a word."""
    rng = np.random.default_rng(4)
    indices = np.full((16, 1024), -1)
    indices[3, :256], indices[12, :256] = np.arange(256), np.arange(256, 512)
    indices[[0, 15], :256] = np.arange(512, 768)
    indices[7, 0] = 768
    check_unions(indices[None], page_tables(rng, 1, 16), page_size=64, cluster=1, split=True)


@pytest.mark.parametrize("limit", [1, 128, 300, 1024])
def test_lists_that_are_too_long_lose_their_end(limit):
    rng = np.random.default_rng(5)
    indices = selections(rng, CASES["all three"], 3200, 512)
    check_unions(indices[None], page_tables(rng, 1, 50), page_size=64, cluster=1, split=True, limit=limit)


@pytest.mark.parametrize("steps", [(0, 0, 0), (0, 0, 9), (4, 4, 0), (6, 6, 51), (17, 18, 26), (9, 2, 3), (0, 7, 30)])
def test_order_of_steps(steps):
    first, other, both = steps
    done, order = (np.int32(0), np.int32(0)), []
    for step in range(sum(steps)):
        in_list, takers, *done = (int(x) for x in choose_step(np.int32(step), *done, *steps))
        order.append((takers, in_list))
    wanted = [(1, i) for i in range(first)]
    wanted += [(2, first + i) for i in range(other)]
    wanted += [(3, first + other + i) for i in range(both)]
    assert sorted(order) == wanted
    for takers in (1, 2, 3):
        own = [in_list for found, in_list in order if found == takers]
        assert own == sorted(own), "each part's steps are in their order"
    found = [takers for takers, _ in order]
    for at, takers in enumerate(found):
        if takers == 1 and found[:at].count(1) < other:
            assert found[at + 1] == 2, "steps of halves are pairs"
    pairs, shared = max(first, other), 0
    for at, takers in enumerate(found):
        shared += takers == 3
        begun = max(found[: at + 1].count(1), found[: at + 1].count(2))
        if pairs and both:
            assert abs(begun / pairs - shared / both) <= 1 / pairs + 1 / both, "pairs are evenly spread"
