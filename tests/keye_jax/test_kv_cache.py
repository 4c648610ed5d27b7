from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import PAGE_SIZE, Cache, bytes_per_token


@pytest.fixture(scope="module")
def released():
    return KeyeConfig.from_file(Path(__file__).parents[2] / "configs" / "model" / "keye_vl_2_30b_a3b.json")


@pytest.mark.parametrize(("indexer_dtype", "index_bytes"), [(None, 128), ("float8_e4m3fn", 68)])
def test_bytes_of_a_token(released, indexer_dtype, index_bytes):
    kv_bytes = 2 * 4 * 128 * 2
    assert bytes_per_token(released, jnp.bfloat16, indexer_dtype=indexer_dtype) == 48 * (kv_bytes + index_bytes)


@pytest.mark.parametrize("indexer_dtype", [None, "float8_e4m3fn"])
def test_new_tokens_go_to_their_pages_and_others_stay(golden, indexer_dtype):
    config = KeyeConfig.from_file(golden / "a")
    heads, dim = config.num_key_value_heads, config.head_dim
    cache = Cache.create(config, 2, 2 * PAGE_SIZE, jnp.float32, indexer_dtype=indexer_dtype)
    table = jnp.asarray([[3, 0], [1, 2]], jnp.int32)
    start, count = jnp.asarray([PAGE_SIZE - 1, 5], jnp.int32), jnp.asarray([2, 1], jnp.int32)
    k, v = jnp.ones((2, 3, heads, dim)), 2 * jnp.ones((2, 3, heads, dim))
    keys = jnp.full((2, 3, config.sa_config.indexer_head_dim), 3.0)
    scales = jnp.full((2, 3), 0.5) if indexer_dtype else None
    layer = cache.layers[0].append(table, start, count, jnp.concatenate([k, v], axis=2), keys, scales)
    written = np.zeros((4, PAGE_SIZE), bool)
    written[3, PAGE_SIZE - 1] = written[0, 0] = written[1, 5] = True
    np.testing.assert_array_equal(np.asarray(layer.kv[..., 0, 0]), written * 1.0)
    np.testing.assert_array_equal(np.asarray(layer.kv[..., -1, -1]), written * 2.0)
    np.testing.assert_array_equal(np.asarray(layer.index_keys[..., 0], np.float32), written * 3.0)
    if indexer_dtype:
        np.testing.assert_array_equal(np.asarray(layer.index_scales), written * 0.5)
    else:
        assert layer.index_scales is None
