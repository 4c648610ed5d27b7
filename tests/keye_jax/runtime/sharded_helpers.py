"""What the tests of steps over several devices share: golden models, and what one device gets from them."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from convert import load_params
from keye_jax.config import KeyeConfig
from keye_jax.model.keye import Keye
from keye_jax.runtime.runtime import Runner
from keye_jax.sharding import Layout, ShardingConfig

TOKENS, GREEDY = 203, 4
ATOL = 5e-4
ONE_AXIS = {name: "x" for name in ("batch", "query_sequence", "cache_sequence", "experts", "vocab", "vision_patches")}


@functools.cache
def golden_model(name, layers=None):
    """A golden model, or so many of its layers, and its configuration."""
    directory = Path(__file__).parents[2] / "golden" / name
    whole = KeyeConfig.from_file(directory)
    params = load_params(directory, whole)
    layers = layers or whole.num_hidden_layers
    numbered = params["decoder"]["layers"]
    params["decoder"]["layers"] = {number: numbered[number] for number in map(str, range(layers))}
    config = dataclasses.replace(whole, num_hidden_layers=layers)
    return Keye.from_params(config, params), config


@functools.cache
def expected(name):
    model, config = golden_model(name)
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


def check(name, sharding, **kwargs):
    (model, config), (logits, selected, tokens) = golden_model(name), expected(name)
    layout = Layout.create(sharding, config)
    got_logits, got_selected, got_tokens = read_and_write(Runner(model, config, layout=layout, **kwargs))
    np.testing.assert_allclose(got_logits, logits, atol=ATOL)
    np.testing.assert_array_equal(got_selected, selected)
    assert got_tokens == tokens


def layout_of(config, mesh, rules, experts="auto"):
    return Layout.create(
        ShardingConfig.from_dict({"mesh": mesh, "rules": rules, "exchange": {"experts": experts}}), config
    )
