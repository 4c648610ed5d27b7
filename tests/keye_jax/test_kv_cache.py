"""Pages: their bytes, writing to them, and who holds them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import (
    PAGE_SIZE,
    BatchMetadata,
    OutOfPages,
    PageAllocator,
    PagePool,
    Pages,
    bytes_per_token,
    pages_for,
)
from keye_jax.sharding import MeshRules, ShardingConfig
from tests.keye_jax.golden_models import CONFIGS


@pytest.fixture(scope="module")
def released() -> KeyeConfig:
    return KeyeConfig.from_file(CONFIGS / "model" / "keye_vl_2_30b_a3b.json")


@pytest.mark.parametrize(("indexer_dtype", "index_bytes"), [(None, 128), ("float8_e4m3fn", 68)])
def test_bytes_of_a_token(released, indexer_dtype: str | None, index_bytes: int):
    kv_bytes = 2 * 4 * 128 * 2
    assert bytes_per_token(released, jnp.bfloat16, indexer_dtype=indexer_dtype) == 48 * (kv_bytes + index_bytes)


def new_rows(config: KeyeConfig, shape: tuple[int, int], *, scales: bool) -> Pages:
    """Rows of new tokens: keys of 1, values of 2, index keys of 3, scales of 0.5."""
    k = jnp.ones((*shape, config.num_key_value_heads, config.head_dim))
    index_keys = jnp.full((*shape, config.sa_config.indexer_head_dim), 3.0)
    return Pages(jnp.concatenate([k, 2 * k], axis=2), index_keys, jnp.full(shape, 0.5) if scales else None)


@pytest.mark.parametrize("indexer_dtype", [None, "float8_e4m3fn"])
def test_new_tokens_go_to_their_pages_and_others_stay(golden, indexer_dtype: str | None):
    config = KeyeConfig.from_file(golden / "a")
    pool = PagePool.create(config, 4, jnp.dtype(jnp.float32), indexer_dtype=indexer_dtype)
    batch = BatchMetadata(
        page_table=jnp.asarray([[3, 0], [1, 2]], jnp.int32),
        start=jnp.asarray([PAGE_SIZE - 1, 5], jnp.int32),
        count=jnp.asarray([2, 1], jnp.int32),
    )
    rows = new_rows(config, (2, 3), scales=indexer_dtype is not None)
    layer = pool.layers[0].write(batch.slots(batch.page_table, pool.page_count, 3), rows)
    written = np.zeros((4, PAGE_SIZE), bool)
    written[3, PAGE_SIZE - 1] = written[0, 0] = written[1, 5] = True
    np.testing.assert_array_equal(np.asarray(layer.kv[..., 0, 0]), written * 1.0)
    np.testing.assert_array_equal(np.asarray(layer.kv[..., -1, -1]), written * 2.0)
    np.testing.assert_array_equal(np.asarray(layer.index_keys[..., 0], np.float32), written * 3.0)
    if layer.index_scales is not None:
        np.testing.assert_array_equal(np.asarray(layer.index_scales), written * 0.5)
    assert (layer.index_scales is not None) == (indexer_dtype is not None)


def test_rows_name_their_sequences_and_what_is_elsewhere_is_dropped(golden):
    """Two rows of one sequence; pages that are not here, positions behind the table, and an idle row."""
    config = KeyeConfig.from_file(golden / "a")
    pool = PagePool.create(config, 3, jnp.dtype(jnp.float32))
    batch = BatchMetadata(
        page_table=jnp.asarray([[2, -1], [0, 3]], jnp.int32),
        start=jnp.asarray([10, PAGE_SIZE - 1, 2 * PAGE_SIZE - 1, 20], jnp.int32),
        count=jnp.asarray([1, 2, 2, 0], jnp.int32),
        sequence=jnp.asarray([1, 0, 1, 1], jnp.int32),
    )
    layer = pool.layers[0].write(
        batch.slots(batch.page_table, pool.page_count, 2), new_rows(config, (4, 2), scales=False)
    )
    written = np.zeros((3, PAGE_SIZE), bool)
    written[0, 10] = written[2, PAGE_SIZE - 1] = True
    np.testing.assert_array_equal(np.asarray(layer.kv[..., 0, 0]), written * 1.0)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (64, 1), (65, 2)])
def test_pages_for_tokens(tokens: int, pages: int):
    assert pages_for(tokens) == pages


class TestPageAllocator:
    @staticmethod
    def rules(mesh: dict[str, int], rules: dict[str, str | list[str]], devices: int, released) -> MeshRules:
        return MeshRules.abstract(ShardingConfig.from_dict({"mesh": mesh, "rules": rules}), released, devices, "cpu")

    def test_one_device(self):
        pages = PageAllocator(4, MeshRules.single_device())
        first = pages.allocate(3)
        assert len(set(first)) == 3 and pages.free_pages() == 1
        pages.release(first[:1])
        assert pages.free_pages() == 2
        assert set(pages.allocate(2)).isdisjoint(first[1:])
        assert pages.free_pages() == 0

    def test_a_page_is_free_when_its_last_holder_releases_it(self):
        pages = PageAllocator(2, MeshRules.single_device())
        held = pages.allocate(2)
        pages.share(held)
        pages.release(held)
        assert pages.free_pages() == 0
        pages.release(held[:1])
        assert pages.free_pages() == 1 and pages.allocate(1) == held[:1]

    def test_too_few_pages_take_nothing(self):
        pages = PageAllocator(4, MeshRules.single_device())
        pages.allocate(2)
        with pytest.raises(OutOfPages, match=r"3 pages were asked for on home 0; 2 are free"):
            pages.allocate(3)
        assert pages.free_pages() == 2 and len(pages.allocate(2)) == 2

    def test_what_nobody_holds_can_be_neither_released_nor_shared(self):
        pages = PageAllocator(4, MeshRules.single_device())
        held = pages.allocate(1)
        pages.release(held)
        with pytest.raises(AssertionError):
            pages.release(held)
        with pytest.raises(AssertionError):
            pages.share(held)

    def test_each_shard_has_its_own_free_list(self, released):
        """Homes along x; along y the pages of a sequence take turns."""
        over = self.rules({"x": 2, "y": 4}, {"batch": "x", "cache_sequence": "y"}, 8, released)
        pages = PageAllocator(32, over)
        held = pages.allocate(6, home=1)
        assert (held // 4).tolist() == [4, 5, 6, 7, 4, 5]
        assert (pages.free_pages(0), pages.free_pages(1)) == (4, 2)
        # A sequence that has six pages goes on with the seventh, on the third shard of its home.
        assert (pages.allocate(3, home=1, first=6) // 4).tolist() == [6, 7, 4]
        assert pages.free_pages(1) == 1
        with pytest.raises(OutOfPages, match="on home 1"):
            pages.allocate(5, home=1)
        assert len(pages.allocate(16, home=0)) == 16

    def test_one_full_shard_is_enough_to_refuse(self, released):
        over = self.rules({"y": 4}, {"cache_sequence": "y"}, 4, released)
        pages = PageAllocator(8, over)
        pages.allocate(1)
        pages.allocate(1)
        assert pages.free_pages() == 0
        with pytest.raises(OutOfPages):
            pages.allocate(1)
        assert (pages.allocate(3, first=1) // 2).tolist() == [1, 2, 3]

    def test_a_pool_has_as_many_pages_on_each_shard(self, released):
        with pytest.raises(AssertionError, match="same number of pages on each shard"):
            PageAllocator(9, self.rules({"y": 4}, {"cache_sequence": "y"}, 4, released))
