"""Steps over eight virtual devices: batches, float8 keys, ties, images, and what travels."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import PAGE_SIZE, PagePool, Pages
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.model.split_keys import select_split
from keye_jax.runtime.lowering import decode_program, prefill_programs
from keye_jax.runtime.prefill import plan_chunks
from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams
from keye_jax.sharding import StepSharding
from pallas_kernels.select_topk import select_topk
from tests.keye_jax.golden_models import CONFIGS, float8, golden_model, rules_of, text, traced_decode
from tests.keye_jax.runtime.sharded_helpers import (
    ATOL,
    GREEDY,
    ONE_AXIS,
    SCORE_LEAD,
    SEEDS,
    SEQUENCE,
    TOKENS,
    prefill_and_decode,
)
from tests.near_ties import assert_leads, selection_leads

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def filled(pool: PagePool, tables: np.ndarray, sequences: tuple[np.ndarray, np.ndarray], runtime: Runtime) -> PagePool:
    """The pool with keys and values `[l, b, s, 2 * kv_heads, d]` and index keys `[l, b, s, di]` in its pages."""
    kv, index_keys = sequences
    parts = runtime.rules.size("kv_heads")
    # On several devices a row holds the keys and values of the first one's heads, then of the second one's.
    kv = kv.reshape(*kv.shape[:3], 2, parts, -1, kv.shape[-1]).swapaxes(3, 4).reshape(kv.shape)
    # A step is compiled again for a pool on one device that is committed to it.
    put = runtime.put if runtime.rules.sharding() is None else jnp.asarray
    layers = []
    for number, layer in enumerate(pool.layers):
        pages, index_pages = np.zeros(layer.kv.shape, np.float32), np.zeros(layer.index_keys.shape, np.float32)
        for row, sequence in enumerate(tables):
            pages[sequence] = kv[number, row].reshape(-1, *pages.shape[1:])
            index_pages[sequence] = index_keys[number, row].reshape(-1, *index_pages.shape[1:])
        layers.append(Pages(put(pages), put(index_pages)))
    made = PagePool(tuple(layers))
    return made if runtime.rules.sharding() is None else jax.device_put(made, pool.shardings(runtime.rules))


TENSOR: dict[str, str | list[str]] = {"heads": "y", "kv_heads": "y", "experts": ["z", "x"], "vocab": "y"}


@pytest.mark.parametrize(
    ("batch", "mesh", "rules", "attention"),
    [
        (4, {"x": 2, "y": 4}, {"batch": "x", "cache_sequence": "y", "experts": ["x", "y"], "vocab": "y"}, "sparse"),
        (3, {"x": 2, "y": 2, "z": 2}, ONE_AXIS | TENSOR, "sparse"),
        (3, {"x": 2, "y": 2, "z": 2}, SEQUENCE | TENSOR, "sparse"),
        (3, {"x": 2, "y": 2, "z": 2}, SEQUENCE | TENSOR, "dense"),
        (4, {"x": 4}, ONE_AXIS, "sparse"),
        (4, {"x": 4}, SEQUENCE, "sparse"),
    ],
    ids=["data and positions", "a row stays idle", "positions and heads", "the same, dense", "data", "positions"],
)
def test_batches_of_different_lengths_decode_alike(
    batch: int, mesh: dict[str, int], rules: dict[str, str | list[str]], attention: Literal["sparse", "dense"]
):
    """One sequence is empty, and one ends where a device's positions do."""
    model, config = golden_model("b", 2)
    options, rng, size = AttentionOptions(attention), np.random.default_rng(4), 4 * PAGE_SIZE
    kv = rng.normal(
        size=(config.num_hidden_layers, batch, size, 2 * config.num_key_value_heads, config.head_dim)
    ).astype(np.float32)
    index_keys = rng.normal(size=(config.num_hidden_layers, batch, size, config.sa_config.indexer_head_dim)).astype(
        np.float32
    )
    tokens = rng.integers(0, 500, (3, batch)).astype(np.int32)
    lengths = np.asarray([0, size - 10, PAGE_SIZE, 97][:batch], np.int32)
    results, traces = [], []
    for over in (None, rules_of(config, mesh, rules)):
        runtime = Runtime(model, config, options=options, rules=over)
        empty, tables = runtime.new_cache(batch, size)
        assert tables.shape[1] * PAGE_SIZE == size
        pool = filled(empty, tables, (kv, index_keys), runtime)
        homes = runtime.rules.size("batch")
        state, logits = runtime.new_state(-(-batch // homes) * homes, tables.shape[1]), []
        for row in range(batch):
            state = runtime.set_row(
                state,
                row,
                token=0,
                length=int(lengths[row]),
                position_delta=0,
                pages=tables[row],
                sampling=SamplingParams(temperature=0),
            )
        for step in range(3):
            given = np.zeros(len(state.tokens), np.int32)
            given[:batch] = tokens[step]
            state = dataclasses.replace(state, tokens=runtime.put(given))
            found, state, pool = runtime.decode(state, pool)
            logits.append(np.asarray(found)[:batch])
            state = runtime.draw(found, state)
        results.append(np.stack(logits))
        assert np.asarray(state.lengths)[:batch].tolist() == [length + 3 for length in lengths]
        if attention == "sparse":
            pool = filled(empty, tables, (kv, index_keys), runtime)
            for step in range(3):
                trace, pool = traced_decode(runtime, tokens[step], lengths + step, tables, pool)
                np.testing.assert_allclose(trace.logits, results[-1][step], atol=ATOL)
                traces.append(trace)
    np.testing.assert_allclose(results[1], results[0], atol=ATOL)
    for one, many in zip(traces[:3], traces[3:], strict=True):
        assert_leads(selection_leads(one.scores, config.sa_config.topk), SCORE_LEAD)
        np.testing.assert_array_equal(many.selected, one.selected)


def test_float8_index_keys_and_their_scales_travel_too():
    """A rounding that falls the other way may change a selection: of a token now and then, not of all that follow."""
    model, config = golden_model("a", 1)
    options, results = AttentionOptions(indexer_dtype="float8_e4m3fn"), []
    for rules in (None, rules_of(config, {"x": 4}, SEQUENCE)):
        runtime = Runtime(model, config, options=options, rules=rules)
        assert runtime.new_pool(1).layers[0].index_scales is not None
        with float8():
            results.append(prefill_and_decode(runtime, SEEDS["a"])[0].logits)
    assert np.mean(np.abs(results[1] - results[0]).max(axis=-1) < ATOL) > 0.9


@pytest.mark.slow
def test_a_float8_cache_lies_over_devices_as_any_other():
    """Its positions, rows and heads are split. A rounding that falls the other way may change a token now and then."""
    model, config = golden_model("b", 1)
    options, results = AttentionOptions(indexer_dtype="float8_e4m3fn", cache_dtype="float8_e4m3fn"), []
    for rules in (None, rules_of(config, {"x": 2, "y": 2, "z": 2}, SEQUENCE | TENSOR)):
        runtime = Runtime(model, config, options=options, rules=rules, prefill_chunk=64)
        with float8():
            results.append(prefill_and_decode(runtime, SEEDS["b"])[0].logits)
    assert np.mean(np.abs(results[1] - results[0]).max(axis=-1) < 10 * ATOL) > 0.9


def test_of_equal_scores_the_lower_positions_win_on_any_device():
    """Index queries of zeros: all scores are equal, and the first positions are selected, more than one device has."""
    model, config = golden_model("a", 1)
    top_k = PAGE_SIZE + 26
    config = dataclasses.replace(config, sa_config=dataclasses.replace(config.sa_config, topk=top_k))
    blind = Keye.from_params(config, nnx.to_pure_dict(nnx.state(model)))
    for layer in blind.decoder.layers:
        layer.indexer.q_proj.weight.set_value(jnp.zeros_like(layer.indexer.q_proj.weight[...]))
    rules = rules_of(config, {"x": 4}, SEQUENCE)
    (one, _), (many, _) = (prefill_and_decode(Runtime(blind, config, rules=each), SEEDS["a"]) for each in (None, rules))
    for trace in (one, many):
        expected = np.tile(np.arange(top_k), (TOKENS + GREEDY - top_k, 1))
        np.testing.assert_array_equal(trace.selected[0, top_k:], expected)
    np.testing.assert_allclose(many.logits, one.logits, atol=ATOL)


@pytest.mark.parametrize("most", [0, 2**30], ids=["the best", "all scores"])
@pytest.mark.parametrize("devices", [2, 3, 8])
def test_what_devices_exchange_gives_the_selection_of_one(monkeypatch, most: int, devices: int):
    """Scores of a few values, so that the last places are tied; rows of all lengths, some below `top_k`."""
    monkeypatch.setattr("keye_jax.model.split_keys._EXCHANGED_BYTES", most)
    pages, top_k, rng = 2 * devices, 2 * PAGE_SIZE + 3, np.random.default_rng(devices)
    length = np.asarray([0, 1, PAGE_SIZE, top_k - 1, top_k + 1, pages * PAGE_SIZE - 30, pages * PAGE_SIZE], np.int32)
    scores = rng.integers(-2, 3, (len(length), 1, pages * PAGE_SIZE)).astype(np.float32)
    seen = np.arange(scores.shape[-1]) < length[:, None]
    # What no query sees may hold anything.
    scores = np.where(seen[:, None], scores, np.nan)

    def in_turns(x: np.ndarray) -> np.ndarray:
        """Page j on device j modulo their number, `[..., devices * pages of each * PAGE_SIZE]`."""
        return x.reshape(*x.shape[:-1], -1, devices, PAGE_SIZE).swapaxes(-2, -3).reshape(x.shape)

    def body(scores: jax.Array, lengths: jax.Array) -> jax.Array:
        return select_split(scores, lengths[:, 0], top_k, ("x",), "xla")

    own_length = in_turns(seen).reshape(len(length), devices, -1).sum(axis=-1, dtype=np.int32)
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("x",))
    split = PartitionSpec(None, None, "x")
    run = jax.shard_map(body, mesh=mesh, in_specs=(split, split), out_specs=split, check_vma=False)
    selected = np.asarray(jax.jit(run)(in_turns(scores), own_length[:, None, :])).reshape(len(length), devices, top_k)
    turn, offset = np.divmod(selected, PAGE_SIZE)
    position = np.where(selected >= 0, (turn * devices + np.arange(devices)[:, None]) * PAGE_SIZE + offset, -1)
    one_device = select_topk(jnp.asarray(scores), jnp.asarray(length)[:, None], top_k, implementation="xla")
    expected = np.asarray(one_device)[:, 0]
    for found, one in zip(position.reshape(len(length), -1), expected, strict=True):
        np.testing.assert_array_equal(np.sort(found[found >= 0]), one[one >= 0])


@pytest.mark.parametrize("devices", [{"x": 8}, {"x": 3}, {"x": 2, "y": 2}])
def test_images_are_shared_out_whatever_their_number(golden, devices: dict[str, int]):
    model, config = golden_model("a", 2)
    arrays = np.load(golden / "a" / "golden.npz")
    rules = rules_of(config, devices, {"vision_patches": list(devices)})
    embeds = Runtime(model, config, rules=rules).encode(arrays["pixels"], arrays["grids"])
    np.testing.assert_allclose(np.asarray(embeds), arrays["vision_embeds"], atol=ATOL)


@pytest.mark.parametrize("tokens", [4096, 2**20], ids=["all scores", "the best"])
def test_a_decoding_step_moves_what_it_must_and_no_weights(tokens: int):
    """A layer: scores, parts of the attention, and sums of the experts. The model: embeddings and logits."""
    model, config = golden_model("a", 2)
    runtime = Runtime(model, config, rules=rules_of(config, {"x": 4}, SEQUENCE))
    program = decode_program(runtime, 1, tokens).lower().compile().as_text()
    assert program is not None
    moved = re.findall(
        r"= (\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", program
    )
    assert len(moved) == 3 * config.num_hidden_layers + 2, moved
    sizes = [np.prod([int(n) for n in re.findall(r"\d+", shape.split("]")[0].split("[")[1])]) for shape, _ in moved]
    scores = tokens if tokens == 4096 else 4 * 2 * config.sa_config.topk
    assert max(sizes) <= max(scores, config.vocab_size, 4 * config.num_attention_heads * (config.head_dim + 1))


def test_the_order_of_a_chunk_is_undone():
    """Rows are dealt out in turns; what is computed of them comes back in the prompt's order."""
    model, config = golden_model("a", 1)
    rules = rules_of(config, {"x": 4}, SEQUENCE)
    whole = text(np.arange(2048, dtype=np.int32), np.arange(32, dtype=np.int32))
    (chunk,) = plan_chunks([whole], 1024, StepSharding.prefill(rules), 32)
    assert chunk.token.reshape(-1)[:257].tolist() == [*range(256), 1024]
    assert sorted(chunk.token.reshape(-1)) == list(range(2048))
    runtime = Runtime(model, config, rules=rules)
    pool, tables = runtime.new_cache(1, 128)
    ids = np.arange(100, dtype=np.int32)
    ((_, _, (layer,), _),) = runtime.forward_with_intermediates(text(ids, tables[0]), pool)
    # Each token sees itself and those before it.
    assert [len(np.unique(row[row >= 0])) for row in np.asarray(layer.attention.selected)] == [
        min(token + 1, config.sa_config.topk) for token in range(100)
    ]


@pytest.mark.parametrize(
    ("rows", "kernels"), [(0, 6), (1, 8), (32, 11)], ids=["prefill", "decode, all scores", "decode, the best"]
)
def test_hopper_kernels_are_lowered_on_a_mesh(rows: int, kernels: int):
    """One layer of the released size, the cache's positions, the experts and eight heads a device on four devices."""
    released = KeyeConfig.from_file(CONFIGS / "model" / "keye_vl_2_30b_a3b.json")
    config = dataclasses.replace(released, num_hidden_layers=1)
    rules = rules_of(config, {"x": 2, "y": 2, "z": 2}, SEQUENCE | TENSOR)
    options = AttentionOptions(implementation="mosaic_gpu")
    runtime = Runtime(Keye.abstract(config), config, rules=rules, options=options, prefill_chunk=2048)
    (program,) = [decode_program(runtime, rows, 32_768, sample=False)] if rows else prefill_programs(runtime, 32_768)
    lowered = program.lower(lowering_platforms=("cuda",)).as_text()
    # Prefill: scores, selection, unions, attention. Decode: scores, one selection or three, attention, and what is
    # between the products: three, or four where many rows are sorted. Experts: two.
    assert lowered.count("custom_call @mosaic_gpu") == kernels
