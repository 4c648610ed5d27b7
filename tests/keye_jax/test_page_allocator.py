"""Who holds which pages."""

from __future__ import annotations

import pytest

from keye_jax.page_allocator import OutOfPages, PageAllocator, pages_for


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (64, 1), (65, 2)])
def test_pages_for_tokens(tokens: int, pages: int):
    assert pages_for(tokens) == pages


class TestPageAllocator:
    def test_one_device(self):
        pages = PageAllocator(4)
        first = pages.allocate(3)
        assert len(set(first)) == 3 and pages.free_pages() == 1
        pages.release(first[:1])
        assert pages.free_pages() == 2
        assert set(pages.allocate(2)).isdisjoint(first[1:])
        assert pages.free_pages() == 0

    def test_a_page_is_free_when_its_last_holder_releases_it(self):
        pages = PageAllocator(2)
        held = pages.allocate(2)
        pages.share(held)
        pages.release(held)
        assert pages.free_pages() == 0
        pages.release(held[:1])
        assert pages.free_pages() == 1 and pages.allocate(1) == held[:1]

    def test_too_few_pages_take_nothing(self):
        pages = PageAllocator(4)
        pages.allocate(2)
        with pytest.raises(OutOfPages, match=r"3 pages were asked for on home 0; 2 are free"):
            pages.allocate(3)
        assert pages.free_pages() == 2 and len(pages.allocate(2)) == 2

    def test_what_nobody_holds_can_be_neither_released_nor_shared(self):
        pages = PageAllocator(4)
        held = pages.allocate(1)
        pages.release(held)
        with pytest.raises(AssertionError):
            pages.release(held)
        with pytest.raises(AssertionError):
            pages.share(held)

    def test_each_shard_has_its_own_free_list(self):
        pages = PageAllocator(32, homes=2, turns=4)
        held = pages.allocate(6, home=1)
        assert (held // 4).tolist() == [4, 5, 6, 7, 4, 5]
        assert (pages.free_pages(0), pages.free_pages(1)) == (4, 2)
        # A sequence that has six pages goes on with the seventh, on the third shard of its home.
        assert (pages.allocate(3, home=1, first=6) // 4).tolist() == [6, 7, 4]
        assert pages.free_pages(1) == 1
        with pytest.raises(OutOfPages, match="on home 1"):
            pages.allocate(5, home=1)
        assert len(pages.allocate(16, home=0)) == 16

    def test_one_full_shard_is_enough_to_refuse(self):
        pages = PageAllocator(8, turns=4)
        pages.allocate(1)
        pages.allocate(1)
        assert pages.free_pages() == 0
        with pytest.raises(OutOfPages):
            pages.allocate(1)
        assert (pages.allocate(3, first=1) // 2).tolist() == [1, 2, 3]

    def test_a_pool_has_as_many_pages_on_each_shard(self):
        with pytest.raises(AssertionError, match="same number of pages on each shard"):
            PageAllocator(9, turns=4)
