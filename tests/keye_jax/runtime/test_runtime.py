"""Chunked prefill and decoding from the cache give what one prefill gives, beyond topk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_params
from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import Cache
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.runtime.runtime import Runner, round_up
from keye_jax.runtime.sampling import Sampling, sample

TOKENS = 96


@pytest.fixture(scope="module")
def model(golden):
    config = KeyeConfig.from_file(golden / "a")
    assert 3 * config.sa_config.topk < TOKENS
    return config, Keye.from_params(config, load_params(golden / "a", config))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 500, TOKENS).astype(np.int32)


def text_positions(count):
    return np.broadcast_to(np.arange(count, dtype=np.int32), (3, count))


def all_logits(runner, ids):
    """float32 `[t, vocab]` from one prefill."""
    embeds = jnp.zeros((0, runner.config.hidden_size))
    parts, start = [], 0
    for logits, _, _, done in runner.trace(ids, text_positions(len(ids)), embeds, runner.new_cache(len(ids))):
        parts.append(np.asarray(logits[0, : done - start]))
        start = done
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def reference(model, ids):
    config, keye = model
    return all_logits(Runner(keye, config), ids)


@pytest.mark.parametrize("chunk", [1, 13, 32, 95, 96])
def test_any_prefill_chunk_gives_the_same(model, ids, reference, chunk):
    config, keye = model
    got = all_logits(Runner(keye, config, prefill_chunk=chunk), ids)
    np.testing.assert_allclose(got, reference, atol=2e-4)


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_decoding_token_by_token_equals_one_prefill(model, ids, attention):
    config, keye = model
    runner = Runner(keye, config, options=AttentionOptions(attention))
    expected = all_logits(runner, ids)
    embeds, half = jnp.zeros((0, config.hidden_size)), 10
    logits, cache = runner.prefill(ids[:half], text_positions(half), embeds, runner.new_cache(TOKENS))
    np.testing.assert_allclose(np.asarray(logits[0]), expected[half - 1], atol=2e-4)
    for index in range(half, TOKENS):
        logits, cache = runner.decode(jnp.asarray(ids[index : index + 1]), jnp.zeros(1, jnp.int32), cache)
        np.testing.assert_allclose(np.asarray(logits[0]), expected[index], atol=2e-4)


def test_a_float8_indexer_selects_much_the_same_from_any_chunk_and_token_by_token(model, ids, reference):
    """A rounding that falls the other way may change a selection: a token now and then, not all that follow."""
    config, keye = model
    options = AttentionOptions(indexer_dtype="float8_e4m3fn")
    whole = all_logits(Runner(keye, config, options=options), ids)
    topk = config.sa_config.topk
    np.testing.assert_allclose(whole[:topk], reference[:topk], atol=2e-4)
    assert np.abs(whole - reference).max() > 0.5
    runner = Runner(keye, config, options=options, prefill_chunk=13)
    chunked = all_logits(runner, ids)
    logits, cache = runner.prefill(
        ids[:60], text_positions(60), jnp.zeros((0, config.hidden_size)), runner.new_cache(TOKENS)
    )
    assert cache.layers[0].index_keys.dtype == jnp.float8_e4m3fn
    decoded = [np.asarray(logits[0])]
    for index in range(60, TOKENS):
        logits, cache = runner.decode(jnp.asarray(ids[index : index + 1]), jnp.zeros(1, jnp.int32), cache)
        decoded.append(np.asarray(logits[0]))
    for got, expected in ((chunked, whole), (np.stack(decoded), whole[59:])):
        assert np.mean(np.abs(got - expected).max(axis=-1) < 2e-4) > 0.9


def test_sparse_and_dense_differ(model, ids, reference):
    config, keye = model
    dense = all_logits(Runner(keye, config, options=AttentionOptions("dense")), ids)
    topk = config.sa_config.topk
    np.testing.assert_allclose(dense[:topk], reference[:topk], atol=2e-4)
    assert np.abs(dense - reference).max() > 0.5


def test_sequences_of_a_batch_do_not_see_each_other(model, ids, reference):
    """Two sequences of different lengths, pages out of order, decoded together."""
    config, keye = model
    runner = Runner(keye, config)
    embeds, starts = jnp.zeros((0, config.hidden_size)), (60, 45)
    batch = Cache.create(config, 2, TOKENS, jnp.float32)
    table = np.random.default_rng(1).permutation(batch.page_table.size).reshape(batch.page_table.shape)
    layers = list(batch.layers)
    for row, start in enumerate(starts):
        _, one = runner.prefill(
            ids[:start], text_positions(start), embeds, Cache.create(config, 1, TOKENS, jnp.float32)
        )
        for index, layer in enumerate(one.layers):
            pages = jnp.asarray(table[row])
            layers[index] = dataclasses.replace(
                layers[index],
                kv=layers[index].kv.at[pages].set(layer.kv),
                index_keys=layers[index].index_keys.at[pages].set(layer.index_keys),
            )
    cache = Cache(tuple(layers), jnp.asarray(table, jnp.int32), jnp.asarray(starts, jnp.int32))
    for step in range(8):
        tokens = jnp.asarray([ids[start + step] for start in starts])
        logits, cache = runner.decode(tokens, jnp.zeros(2, jnp.int32), cache)
        for row, start in enumerate(starts):
            np.testing.assert_allclose(np.asarray(logits[row]), reference[start + step], atol=2e-4)


def test_writing_is_decoding_and_sampling(model, ids):
    config, keye = model
    runner, start, embeds = Runner(keye, config), 50, jnp.zeros((0, config.hidden_size))
    delta, seeds = jnp.zeros(1, jnp.int32), jnp.asarray([3], jnp.uint32)
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=1.0)):
        (_, cache), (_, own) = (
            runner.prefill(ids[:start], text_positions(start), embeds, runner.new_cache(100)) for _ in range(2)
        )
        token, written = jnp.asarray(ids[start : start + 1]), jnp.asarray(ids[start : start + 1])
        for _ in range(5):
            logits, cache = runner.decode(token, delta, cache)
            token = sample(logits, seeds, cache.lengths, sampling)
            written, own = runner.write(written, delta, own, seeds, sampling)
            assert written[0] == token[0]


def test_images_are_encoded_in_bounded_chunks(model, golden, monkeypatch):
    config, keye = model
    arrays = np.load(golden / "a" / "golden.npz")
    runner = Runner(keye, config)
    whole = runner.encode(arrays["pixels"], arrays["grids"])
    monkeypatch.setattr("keye_jax.runtime.runtime.ENCODE_PATCHES", 1)
    one_by_one = runner.encode(arrays["pixels"], arrays["grids"])
    np.testing.assert_allclose(np.asarray(one_by_one), np.asarray(whole), atol=1e-5)
    np.testing.assert_allclose(np.asarray(whole), arrays["vision_embeds"], atol=5e-4)


def test_uint8_patches_are_normalised_on_the_device(model):
    config, keye = model
    runner = Runner(keye, config)
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (24, 3, 14, 14)).astype(np.uint8)
    grids = np.array([[1, 4, 6]])
    scale, shift = np.float32([1 / 127.5, 1 / 100, 1 / 50]), np.float32([-1, -0.5, 0.25])
    normalised = patches * scale[:, None, None] + shift[:, None, None]
    np.testing.assert_allclose(
        np.asarray(runner.encode(patches, grids, scale=scale, shift=shift)),
        np.asarray(runner.encode(normalised.astype(np.float32), grids)),
        atol=1e-4,
    )


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 4097, 131_072, 200_001])
def test_sizes_are_rounded_up_a_little(size):
    rounded = round_up(size)
    assert size <= rounded <= size + max(64, size / 8)


def test_compiled_steps_are_those_that_run(model, ids, caplog):
    config, keye = model
    runner, places = Runner(keye, config, prefill_chunk=40), text_positions(TOKENS)
    runner.compile_prefill(TOKENS)
    runner.compile_write(1, TOKENS, Sampling(temperature=0.0))
    with jax.log_compiles():
        _, cache = runner.prefill(ids, places, jnp.zeros((0, config.hidden_size)), runner.new_cache(TOKENS))
        start = [runner.put(np.zeros(1, dtype)) for dtype in (np.int32, np.int32, np.uint32)]
        runner.write(*start[:2], cache, start[2], Sampling(temperature=0.0))
    compiled = [record.args[0] for record in caplog.records if record.msg.startswith("Compiling")]
    assert any("embed" in name for name in compiled)
    assert not any("read" in name or "write" in name for name in compiled)
