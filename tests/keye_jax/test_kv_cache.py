"""Pages: their bytes, and writing to them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import PAGE_SIZE, BatchMetadata, PagePool, Pages, bytes_per_token
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
