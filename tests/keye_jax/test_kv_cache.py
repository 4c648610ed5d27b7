"""Pages: their bytes, and writing to them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax import kv_cache
from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import PAGE_SIZE, BatchMetadata, PagePool, Pages, bytes_per_token
from keye_jax.runtime.memory import index_row_bytes, kv_row_bytes
from keye_jax.sharding import MeshRules
from tests.keye_jax.golden_models import CONFIGS, float8


@pytest.fixture(scope="module")
def released() -> KeyeConfig:
    return KeyeConfig.from_file(CONFIGS / "model" / "keye_vl_2_30b_a3b.json")


FP8 = "float8_e4m3fn"


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ({}, 104_448),
        ({"indexer_dtype": FP8}, 101_568),
        ({"cache_dtype": FP8}, 56_832),
        ({"indexer_dtype": FP8, "cache_dtype": FP8}, 53_952),
    ],
)
def test_bytes_of_a_token(released, dtypes: dict[str, str], expected: int):
    assert bytes_per_token(released, jnp.bfloat16, **dtypes) == expected
    # As the plan of a job counts them.
    row = kv_row_bytes(released, MeshRules.single_device(), dtypes.get("cache_dtype"))
    assert 48 * (row + index_row_bytes(released, dtypes.get("indexer_dtype"))) == expected


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
    np.testing.assert_array_equal(np.asarray(layer.index_pages[..., 0], np.float32), written * 3.0)
    if layer.index_scales is not None:
        np.testing.assert_array_equal(np.asarray(layer.index_scales), written * 0.5)
    assert (layer.index_scales is not None) == (indexer_dtype is not None)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("dim", [16, 64])
def test_parts_of_rows_are_written_as_whole_rows_are(dim: int, dtype):
    """Neighbours that share a row, rows in any order, both parts of a row alone, and slots behind the pages."""
    rng = np.random.default_rng(0)
    stored = jnp.asarray(rng.normal(size=(3, PAGE_SIZE * dim // 128, 128)), dtype)
    new = jnp.asarray(rng.normal(size=(2, 6, dim)), dtype)
    slots = jnp.asarray([[4, 5, 6, 191, 192, 7], [64, 131, 192, 63, 0, 129]], jnp.int32)
    got = kv_cache._write_parts_of_rows(stored, slots, new)
    expected = np.asarray(stored, np.float32).reshape(-1, dim)
    here = np.asarray(slots) < 3 * PAGE_SIZE
    expected[np.asarray(slots)[here]] = np.asarray(new, np.float32)[here]
    np.testing.assert_array_equal(np.asarray(got, np.float32).reshape(-1, dim), expected)
    np.testing.assert_array_equal(np.asarray(kv_cache._write_rows(stored, slots, new), np.float32), got)


def test_the_released_models_index_keys_have_rows_of_128(released):
    pool = jax.eval_shape(lambda: PagePool.create(released, 5))
    assert pool.layers[0].index_keys.shape == (5, PAGE_SIZE // 2, 128)


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


def test_rows_in_float8_are_near_and_stay_what_they_are(golden):
    """Whatever the magnitude of a head's key or value, one step of float8 is 1/8 of a power of two above 1/64 of it."""
    config = KeyeConfig.from_file(golden / "a")
    rows = new_rows(config, (2, 40), scales=False)
    magnitudes = np.logspace(-3, 3, 2 * 40 * rows.kv.shape[2]).reshape(*rows.kv.shape[:3], 1)
    kv = (magnitudes * np.random.default_rng(0).normal(size=rows.kv.shape)).astype(np.float32)
    kv[0, 0, 0] = 0

    def stored(numbers: np.ndarray) -> tuple[Pages, np.ndarray]:
        made = dataclasses.replace(rows, kv=jnp.asarray(numbers)).in_cache_dtype(FP8)
        return made, np.asarray(made.kv, np.float32) * np.asarray(made.kv_scales)[..., None]

    with float8():
        made, numbers = stored(kv)
        again = stored(numbers)[1]
    assert made.kv.dtype == jnp.float8_e4m3fn and made.kv_scales is not None and made.kv_scales.shape == kv.shape[:3]
    limit = np.maximum(np.abs(kv), np.abs(kv).max(axis=-1, keepdims=True) / 2**6) / 16
    assert (np.abs(numbers - kv) <= limit).all() and not numbers[0, 0, 0].any()
    np.testing.assert_array_equal(again, numbers)
    assert rows.in_cache_dtype(None) is rows


def test_keys_and_values_in_float8_are_written_with_their_scales(golden):
    config = KeyeConfig.from_file(golden / "a")
    pool = PagePool.create(config, 2, jnp.dtype(jnp.float32), cache_dtype=FP8)
    batch = BatchMetadata(*(jnp.asarray(x, jnp.int32) for x in ([[1]], [5], [2])))
    with float8():
        rows = new_rows(config, (1, 2), scales=False).in_cache_dtype(FP8)
        layer = pool.layers[0].write(batch.slots(batch.page_table, 2, 2), rows)
        keys = PagePool((layer,)).keys(0, np.asarray([1]), MeshRules.single_device())
    assert layer.kv_scales is not None and layer.index_scales is None
    assert (np.asarray(layer.kv_scales)[1, 5:7] > 0).all() and np.count_nonzero(layer.kv_scales) == 2 * rows.kv.shape[2]
    expected = np.zeros((PAGE_SIZE, config.num_key_value_heads, config.head_dim))
    expected[5:7] = 1
    np.testing.assert_array_equal(np.asarray(keys), expected)
