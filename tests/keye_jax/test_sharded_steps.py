"""Whatever the layout: logits, selected sets and greedy tokens are those of one device, on eight virtual ones."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_params
from keye_jax.cache import PAGE_SIZE, Cache
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.runner import Runner
from keye_jax.sharding import Layout, ShardingConfig

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "sharding").glob("*.yaml"))
TOKENS, GREEDY, LAYERS = 203, 5, 2
ATOL = 5e-4


@pytest.fixture(scope="module")
def models(golden):
    """The golden models, and what one device makes of a prompt; two layers of each, which is quicker to compile."""
    found = {}
    for name in ("a", "b"):
        config = dataclasses.replace(KeyeConfig.from_file(golden / name), num_hidden_layers=LAYERS)
        params = load_params(golden / name, KeyeConfig.from_file(golden / name))
        layers = params["decoder"]["layers"]
        params["decoder"]["layers"] = {number: layers[number] for number in map(str, range(LAYERS))}
        model = Keye.from_params(config, params)
        found[name] = model, config, read_and_write(Runner(model, config))
    return found


def prompt():
    ids = np.random.default_rng(0).integers(0, 500, TOKENS).astype(np.int32)
    return ids, np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (3, TOKENS))


def traced(runner, ids, positions, cache):
    """Logits `[t, vocab]`, selected `[l, t, top_k]`, and the cache."""
    logits, selected, start = [], [], 0
    embeds = np.zeros((0, runner.config.hidden_size), np.float32)
    for part, cache, found, done in runner.trace(ids, positions, embeds, cache):
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


def check(models, name, sharding, **kwargs):
    model, config, (logits, selected, tokens) = models[name]
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
def test_presets(models, path):
    check(models, "b", on_eight(ShardingConfig.from_file(path)), prefill_chunk=16)


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
def test_random_layouts(models, number):
    name = "ab"[number % 2]
    sharding = random_sharding(models[name][1], number)
    check(models, name, sharding, prefill_chunk=[16, 40, None][number % 3])
