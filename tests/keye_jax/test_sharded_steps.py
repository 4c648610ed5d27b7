"""Whatever the layout: logits, selected sets and greedy tokens are those of one device, on eight virtual ones."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import load_params
from keye_jax.cache import PAGE_SIZE, Cache
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.runner import Runner
from keye_jax.sharding import Layout, ShardingConfig

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "sharding").glob("*.yaml"))
TOKENS, GREEDY = 203, 4
ATOL = 5e-4


@pytest.fixture(scope="module", autouse=True)
def _quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def golden_model(name, layers=2):
    """A golden model, of so many of its layers, and its configuration."""
    directory = Path(__file__).parents[1] / "golden" / name
    whole = KeyeConfig.from_file(directory)
    params = load_params(directory, whole)
    numbered = params["decoder"]["layers"]
    params["decoder"]["layers"] = {number: numbered[number] for number in map(str, range(layers))}
    config = dataclasses.replace(whole, num_hidden_layers=layers)
    return Keye.from_params(config, params), config


@functools.cache
def expected(name, layers):
    model, config = golden_model(name, layers)
    return read_and_write(Runner(model, config))


def prompt():
    ids = np.random.default_rng(0).integers(0, 500, TOKENS).astype(np.int32)
    return ids, np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (3, TOKENS))


def traced(runner, ids, positions, cache):
    """Logits `[t, vocab]`, selected `[l, t, top_k]`, and the cache."""
    logits, selected, start = [], [], 0
    embeds = np.zeros((0, runner.config.hidden_size), np.float32)
    steps = runner.trace(ids, positions, embeds, cache)
    for part, cache, found, done in steps:  # noqa: B007 (the last one is returned)
        logits.append(np.asarray(part[0, : done - start]))
        selected.append(np.stack([np.asarray(layer.attention.selected[0, : done - start]) for layer in found]))
        start = done
    return np.concatenate(logits), np.concatenate(selected, axis=1), cache


def read_and_write(runner):
    """Logits, selected positions and greedy tokens of a prompt and of a few decoding steps behind it."""
    ids, positions = prompt()
    logits, selected, cache = traced(runner, ids, positions, runner.new_cache(TOKENS + GREEDY))
    tokens, rows, sets = [], [logits], [selected]
    for index in range(GREEDY):
        tokens.append(int(np.argmax(rows[-1][-1])))
        place = np.full((3, 1), TOKENS + index, np.int32)
        logits, selected, cache = traced(runner, np.asarray(tokens[-1:], np.int32), place, cache)
        rows.append(logits)
        sets.append(selected)
    return np.concatenate(rows), np.concatenate(sets, axis=1), tokens


def check(name, layers, sharding, **kwargs):
    (model, config), (logits, selected, tokens) = golden_model(name, layers), expected(name, layers)
    layout = Layout.create(sharding, config)
    got_logits, got_selected, got_tokens = read_and_write(Runner(model, config, layout=layout, **kwargs))
    np.testing.assert_allclose(got_logits, logits, atol=ATOL)
    np.testing.assert_array_equal(got_selected, selected)
    assert got_tokens == tokens


def on_eight(sharding):
    """The file's rules on eight devices, where it is for more."""
    smaller = {"data": 2, "sequence": 4} if "tensor" not in dict(sharding.mesh) else {"sequence": 2}
    sizes = {axis: size for axis, size in smaller.items() if axis in dict(sharding.mesh)}
    try:
        sharding.sizes(len(jax.devices()))
    except UserError:
        return sharding.with_sizes(**sizes)
    return sharding


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets(path):
    check("b", 2 if path.stem == "combined" else 1, on_eight(ShardingConfig.from_file(path)), prefill_chunk=16)


def random_sharding(config, seed):
    """A mesh of eight devices and rules that the model allows."""
    rng = np.random.default_rng(seed)
    mesh = [{"x": 8}, {"x": 2, "y": 4}, {"x": 4, "y": 2}, {"x": 2, "y": 2, "z": 2}][rng.integers(4)]
    rules = {name: [] for name in ("batch", "query_sequence", "cache_sequence", "vocab", "vision_patches")}
    rules |= {name: [] for name in ("heads", "experts", "expert_hidden")}
    parts = config.num_key_value_heads
    for axis in map(str, rng.permutation(list(mesh))):
        if rng.random() < 0.4 and parts % mesh[axis] == 0:
            rules["heads"].append(axis)
            parts //= mesh[axis]
        else:
            for name in ("batch", "query_sequence", "cache_sequence"):
                if rng.random() < 0.6:
                    rules[name].insert(rng.integers(2), axis)
        if rng.random() < 0.8:
            rules[str(rng.choice(["experts", "experts", "expert_hidden"]))].append(axis)
        for name in ("vocab", "vision_patches"):
            if rng.random() < 0.5:
                rules[name].insert(rng.integers(2), axis)
    values = {"mesh": mesh, "rules": rules | {"kv_heads": rules["heads"]}}
    values["exchange"] = {"experts": str(rng.choice(["all_gather", "all_to_all"]))}
    return ShardingConfig.from_dict(values, source=f"random layout {seed}")


@pytest.mark.parametrize("number", range(12))
def test_random_layouts(number):
    name = "ab"[number % 2]
    sharding = random_sharding(golden_model(name, 1)[1], number)
    check(name, 1, sharding, prefill_chunk=[16, 40, None][number % 3])


def layout_of(config, mesh, rules, experts="auto"):
    return Layout.create(
        ShardingConfig.from_dict({"mesh": mesh, "rules": rules, "exchange": {"experts": experts}}), config
    )


ONE_AXIS = {name: "x" for name in ("batch", "query_sequence", "cache_sequence", "experts", "vocab", "vision_patches")}


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
    model, config = golden_model("b")
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
    model, config = golden_model("a")
    arrays = np.load(golden / "a" / "golden.npz")
    layout = layout_of(config, devices, {"vision_patches": list(devices)})
    embeds = Runner(model, config, layout=layout).encode(arrays["pixels"], arrays["grids"])
    np.testing.assert_allclose(np.asarray(embeds), arrays["vision_embeds"], atol=ATOL)


def test_a_decoding_step_moves_what_it_must_and_no_weights():
    """A layer: candidates, parts of the attention, and sums of the experts. The model: embeddings and logits."""
    model, config = golden_model("a")
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
    _, config = golden_model("a")
    runner = Runner(Keye.abstract(config), config, layout=layout_of(config, {"x": 4}, ONE_AXIS))
    parallel = runner.parallel(1, 2048)
    order = parallel.token_order(2048)
    assert order[:257].tolist() == [*range(256), 1024]
    np.testing.assert_array_equal(np.asarray(parallel.in_order(jnp.asarray(order)[None])[0]), np.arange(2048))


@pytest.mark.parametrize(("step", "kernels"), [("read", 8), ("decode", 6)])
def test_hopper_kernels_are_lowered_inside_a_layout(step, kernels):
    """One layer of the released size, the cache's positions, the experts and eight heads a device on four devices."""
    released = KeyeConfig.from_file(Path(__file__).parents[2] / "configs" / "model" / "keye_vl_2_30b_a3b.json")
    config = dataclasses.replace(released, num_hidden_layers=1)
    layout = layout_of(config, {"x": 2, "y": 2, "z": 2}, ONE_AXIS | TENSOR)
    options = AttentionOptions(implementation="mosaic_gpu", dense_below=0)
    runner = Runner(Keye.abstract(config), config, layout=layout, options=options, prefill_chunk=2048)
    (program,) = runner.prefill_programs(32_768) if step == "read" else [runner.decode_program(1, 32_768)]
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    # Reading: scores, selection, unions, attention, and the experts' two in the first turn and in the loop of others.
    # Decoding: scores, two selections, attention, and the experts' two.
    assert text.count("custom_call @mosaic_gpu") == kernels
