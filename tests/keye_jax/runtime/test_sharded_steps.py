"""Steps over eight virtual devices: batches, float8 keys, ties, images, and what travels."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import PAGE_SIZE, Cache
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.runtime.runtime import Runner
from tests.keye_jax.runtime.sharded_helpers import (
    ATOL,
    GREEDY,
    ONE_AXIS,
    TOKENS,
    golden_model,
    layout_of,
    read_and_write,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def filled(cache, sequences, lengths, parallel):
    """The cache with keys and values `[l, b, s, 2 * kv_heads, d]` and index keys `[l, b, s, di]` in its pages."""
    table, parts = np.asarray(cache.page_table), parallel.size(parallel.kv_heads) if parallel else 1
    kv, index_keys = sequences
    # On several devices a row holds the keys and values of the first one's heads, then of the second one's.
    kv = kv.reshape(*kv.shape[:3], 2, parts, -1, kv.shape[-1]).swapaxes(3, 4).reshape(kv.shape)
    layers = []
    for number, layer in enumerate(cache.layers):
        pages, index_pages = np.zeros(layer.kv.shape, np.float32), np.zeros(layer.index_keys.shape, np.float32)
        for row, sequence in enumerate(table):
            pages[sequence] = kv[number, row].reshape(-1, *pages.shape[1:])
            index_pages[sequence] = index_keys[number, row].reshape(-1, *index_pages.shape[1:])
        layers.append(dataclasses.replace(layer, kv=jnp.asarray(pages), index_keys=jnp.asarray(index_pages)))
    filled = Cache(tuple(layers), cache.page_table, jnp.asarray(lengths, jnp.int32))
    return jax.device_put(filled, cache.shardings(parallel)) if parallel else filled


TENSOR = {"heads": "y", "kv_heads": "y", "experts": ["z", "x"], "vocab": "y"}


@pytest.mark.parametrize(
    ("batch", "mesh", "rules", "attention"),
    [
        (4, {"x": 2, "y": 4}, {"batch": "x", "cache_sequence": "y", "experts": ["x", "y"], "vocab": "y"}, "sparse"),
        (3, {"x": 2, "y": 2, "z": 2}, ONE_AXIS | TENSOR, "sparse"),
        (3, {"x": 2, "y": 2, "z": 2}, ONE_AXIS | TENSOR, "dense"),
        (4, {"x": 4}, ONE_AXIS, "sparse"),
    ],
    ids=["data and positions", "a batch that cannot be shared out", "the same, dense", "one axis for all"],
)
def test_batches_of_different_lengths_decode_alike(batch, mesh, rules, attention):
    """One sequence is empty, and one ends where a device's positions do."""
    model, config = golden_model("b", 2)
    options, rng, size = AttentionOptions(attention), np.random.default_rng(0), 4 * PAGE_SIZE
    kv = rng.normal(
        size=(config.num_hidden_layers, batch, size, 2 * config.num_key_value_heads, config.head_dim)
    ).astype(np.float32)
    index_keys = rng.normal(size=(config.num_hidden_layers, batch, size, config.sa_config.indexer_head_dim)).astype(
        np.float32
    )
    lengths = [0, size - 10, PAGE_SIZE, 97][:batch]
    results = []
    for layout in (None, layout_of(config, mesh, rules)):
        runner = Runner(model, config, options=options, layout=layout)
        empty = runner.new_cache(size, batch)
        assert empty.capacity == size
        cache = filled(empty, (kv, index_keys), lengths, runner.parallel(batch, 1))
        tokens, rows = np.arange(batch, dtype=np.int32), []
        for _ in range(3):
            logits, cache = runner.decode(runner.put(tokens), runner.put(np.zeros(batch, np.int32)), cache)
            tokens = np.asarray(logits).argmax(axis=-1).astype(np.int32)
            rows.append(np.asarray(logits))
        results.append(np.stack(rows))
        assert np.asarray(cache.lengths).tolist() == [length + 3 for length in lengths]
    np.testing.assert_allclose(results[1], results[0], atol=ATOL)


def test_float8_index_keys_and_their_scales_travel_too():
    """A rounding that falls the other way may change a selection: of a token now and then, not of all that follow."""
    model, config = golden_model("a", 1)
    options, results = AttentionOptions(indexer_dtype="float8_e4m3fn"), []
    for layout in (None, layout_of(config, {"x": 4}, ONE_AXIS)):
        runner = Runner(model, config, options=options, layout=layout)
        assert runner.new_cache(64).layers[0].index_scales is not None
        results.append(read_and_write(runner)[0])
    assert np.mean(np.abs(results[1] - results[0]).max(axis=-1) < ATOL) > 0.9


def test_of_equal_scores_the_lower_positions_win_on_any_device():
    """Index queries of zeros: all scores are equal, and the first positions are selected, more than one device has."""
    model, config = golden_model("a", 1)
    top_k = PAGE_SIZE + 26
    config = dataclasses.replace(config, sa_config=dataclasses.replace(config.sa_config, topk=top_k))
    blind = Keye.from_params(config, nnx.to_pure_dict(nnx.state(model)))
    for layer in blind.decoder.layers:
        layer.indexer.q_proj.weight.set_value(jnp.zeros_like(layer.indexer.q_proj.weight[...]))
    layout = layout_of(config, {"x": 4}, ONE_AXIS)
    (one, *_), (many, selected, _) = (read_and_write(Runner(blind, config, layout=each)) for each in (None, layout))
    np.testing.assert_array_equal(selected[0, top_k:], np.tile(np.arange(top_k), (TOKENS + GREEDY - top_k, 1)))
    np.testing.assert_allclose(many, one, atol=ATOL)


@pytest.mark.parametrize("devices", [{"x": 8}, {"x": 3}, {"x": 2, "y": 2}])
def test_images_are_shared_out_whatever_their_number(golden, devices):
    model, config = golden_model("a", 2)
    arrays = np.load(golden / "a" / "golden.npz")
    layout = layout_of(config, devices, {"vision_patches": list(devices)})
    embeds = Runner(model, config, layout=layout).encode(arrays["pixels"], arrays["grids"])
    np.testing.assert_allclose(np.asarray(embeds), arrays["vision_embeds"], atol=ATOL)


def test_a_decoding_step_moves_what_it_must_and_no_weights():
    """A layer: candidates, parts of the attention, and sums of the experts. The model: embeddings and logits."""
    model, config = golden_model("a", 2)
    runner = Runner(model, config, layout=layout_of(config, {"x": 4}, ONE_AXIS))
    program = runner.decode_program(1, 4096).lower().compile().as_text()
    moved = re.findall(
        r"= (\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", program
    )
    assert len(moved) == 3 * config.num_hidden_layers + 2, moved
    sizes = [np.prod([int(n) for n in re.findall(r"\d+", shape.split("]")[0].split("[")[1])]) for shape, _ in moved]
    candidates = 4 * min(config.sa_config.topk, 1024)
    assert max(sizes) <= max(candidates, config.vocab_size, 4 * config.num_attention_heads * (config.head_dim + 1))


def test_the_order_of_a_chunk_is_undone():
    _, config = golden_model("a", 2)
    runner = Runner(Keye.abstract(config), config, layout=layout_of(config, {"x": 4}, ONE_AXIS))
    parallel = runner.parallel(1, 2048)
    order = parallel.token_order(2048)
    assert order[:257].tolist() == [*range(256), 1024]
    np.testing.assert_array_equal(np.asarray(parallel.in_order(jnp.asarray(order)[None])[0]), np.arange(2048))


@pytest.mark.parametrize("step", ["read", "decode"])
def test_hopper_kernels_are_lowered_inside_a_layout(step):
    """One layer of the released size, the cache's positions, the experts and eight heads a device on four devices."""
    released = KeyeConfig.from_file(Path(__file__).parents[3] / "configs" / "model" / "keye_vl_2_30b_a3b.json")
    config = dataclasses.replace(released, num_hidden_layers=1)
    layout = layout_of(config, {"x": 2, "y": 2, "z": 2}, ONE_AXIS | TENSOR)
    options = AttentionOptions(implementation="mosaic_gpu", dense_below=0)
    runner = Runner(Keye.abstract(config), config, layout=layout, options=options, prefill_chunk=2048)
    (program,) = runner.prefill_programs(32_768) if step == "read" else [runner.decode_program(1, 32_768)]
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    # Reading: scores, selection, unions, attention. Decoding: scores, two selections, attention. And the experts' two.
    assert text.count("custom_call @mosaic_gpu") == 6
