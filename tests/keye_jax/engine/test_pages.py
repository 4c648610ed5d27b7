"""Pages of the engine: prefixes that stay after their sequences, and who has to go when pages are short."""

from __future__ import annotations

import pytest

from keye_jax.engine.pages import BlockKey, PageManager
from keye_jax.page_allocator import PAGE_SIZE, OutOfPages


def keys(text: str, program: str = "large") -> list[BlockKey]:
    """One block for each beginning of a text."""
    return [(text[: end + 1].encode(), "small" if program == "small" else "large") for end in range(len(text))]


def read(manager: PageManager, text: str, home: int = 0, extra: int = 0) -> tuple[int, ...]:
    """Pages of a sequence that has read a text, and has `extra` pages for its answer."""
    each = manager.block_pages
    pages = manager.allocate(len(text) * each + extra, home)
    for index, key in enumerate(keys(text)):
        manager.add(key, home, pages[index * each : (index + 1) * each])
    return pages


def manager(pages: int, **options: int) -> PageManager:
    return PageManager(pages, **({"block_tokens": PAGE_SIZE} | options))


def test_a_prefix_is_shared_while_its_sequence_is_there():
    pages = manager(8)
    first = read(pages, "abc", extra=1)
    blocks = pages.match(keys("abx"))
    assert [block.pages for block in blocks] == [(first[0],), (first[1],)]
    second = pages.allocate(4, 0, prefix=blocks)
    assert second[:2] == first[:2] and not set(second[2:]) & set(first)
    assert (pages.free_pages, pages.cached_pages) == (2, 0)


def test_a_prefix_stays_after_its_sequence_and_comes_back():
    pages = manager(4)
    first = read(pages, "ab", extra=1)
    pages.release(first)
    # The page of the answer is free, those of the prompt are cached.
    assert (pages.free_pages, pages.cached_pages, pages.room(0)) == (2, 2, 4)
    again = pages.allocate(3, 0, prefix=pages.match(keys("ab")))
    assert again[:2] == first[:2] and pages.cached_pages == 0


def test_a_block_is_found_only_for_the_program_that_wrote_it():
    pages = manager(4)
    read(pages, "ab")
    assert len(pages.match(keys("ab"))) == 2 and not pages.match(keys("ab", "small"))


def test_a_block_that_is_written_twice_is_in_the_index_once():
    pages = manager(4)
    first, second = read(pages, "a"), read(pages, "a")
    assert pages.match(keys("a"))[0].pages == first
    pages.release(second)
    assert (pages.free_pages, pages.cached_pages) == (3, 0)


def test_the_longest_unheld_block_goes_first_and_the_end_of_a_prefix_before_its_beginning():
    pages = manager(6)
    old, new = read(pages, "abc"), read(pages, "xyz")
    pages.release(old)
    pages.release(new)
    pages.allocate(2, 0)
    assert len(pages.match(keys("abc"))) == 1 and len(pages.match(keys("xyz"))) == 3
    pages.allocate(2, 0)
    assert not pages.match(keys("abc")) and len(pages.match(keys("xyz"))) == 2


def test_a_prefix_that_is_used_again_counts_as_new():
    pages = manager(4)
    old, new = read(pages, "ab"), read(pages, "xy")
    pages.release(old)
    pages.release(new)
    pages.release(pages.allocate(2, 0, prefix=pages.match(keys("ab"))))
    pages.allocate(2, 0)
    assert len(pages.match(keys("ab"))) == 2 and not pages.match(keys("xy"))


def test_a_prefix_is_not_given_away_for_the_rest_of_its_own_sequence():
    pages = manager(4)
    pages.release(read(pages, "ab"))
    held = pages.allocate(1, 0)
    blocks = pages.match(keys("ab"))
    assert pages.fits(3, 0, prefix=blocks) and not pages.fits(4, 0, prefix=blocks)
    with pytest.raises(OutOfPages, match="4 pages were asked for on home 0; it has room for 3"):
        pages.allocate(4, 0, prefix=blocks)
    assert (pages.free_pages, pages.cached_pages) == (1, 2)
    pages.release(held)
    assert pages.allocate(4, 0, prefix=blocks)[:2] == blocks[0].pages + blocks[1].pages


def test_a_prefix_is_on_one_home():
    pages = manager(4, homes=2)
    read(pages, "ab", home=1)
    blocks = pages.match(keys("ab"))
    assert [block.home for block in blocks] == [1, 1]
    # Home 0 has written no block of "ab"; of "abc" it writes the last one alone.
    pages.add(keys("abc")[2], 0, pages.allocate(1, 0))
    assert len(pages.match(keys("abc"))) == 2


def test_homes_evict_only_their_own_prefixes():
    pages = manager(2, homes=2)
    pages.release(read(pages, "ab", home=0))
    pages.release(read(pages, "xy", home=1))
    pages.allocate(2, 1)
    assert len(pages.match(keys("ab"))) == 2 and not pages.match(keys("xy"))


def test_pages_take_turns_over_shards():
    pages = manager(3, turns=2)
    first = pages.allocate(3, 0)
    assert [page // 3 for page in first] == [0, 1, 0]
    assert pages.room(0) == 1
    # A sequence that has three pages goes on with the other shard.
    assert pages.fits(4, 0, first=3) and pages.fits(6, 0, first=3) and not pages.fits(7, 0, first=3)
    assert [page // 3 for page in pages.allocate(6, 0, first=3)] == [1, 0, 1]


def test_unheld_blocks_are_evicted_until_every_shard_has_enough():
    pages = manager(2, turns=2)
    pages.release(read(pages, "abcd"))
    # One page of the first shard is wanted. The end of the prefix, on the second shard, goes before.
    assert pages.allocate(1, 0)[0] // 2 == 0
    assert len(pages.match(keys("abcd"))) == 2 and (pages.free_pages, pages.cached_pages) == (1, 2)


def test_the_version_changes_with_the_index():
    pages = manager(2)
    before = pages.version
    held = pages.allocate(2, 0)
    assert pages.version == before
    pages.add(keys("a")[0], 0, held[:1])
    assert pages.version > before
    pages.release(held)
    before = pages.version
    pages.allocate(2, 0)
    assert pages.version > before
