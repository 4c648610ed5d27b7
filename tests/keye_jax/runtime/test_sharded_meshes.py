"""Whatever the file: logits, selected sets and greedy tokens of eight virtual devices are those of one."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from keye_jax.errors import UserError
from keye_jax.model.attention import AttentionOptions
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding import MeshRules, ShardingConfig
from tests.keye_jax.golden_models import float8, golden_model
from tests.keye_jax.runtime.sharded_helpers import ATOL, SEEDS, check, prefill_and_decode

pytestmark = pytest.mark.usefixtures("quick_to_compile")
PRESETS = sorted((Path(__file__).parents[3] / "configs" / "sharding").glob("*.yaml"))
FLOAT8_CACHE = AttentionOptions(cache_dtype="float8_e4m3fn")


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
    check("b", on_eight(ShardingConfig.from_file(path)), prefill_chunk=16)


@pytest.mark.slow
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_with_a_float8_cache(path):
    """A rounding that falls the other way may change a token now and then, not all that follow."""
    model, config = golden_model("b", 1)
    rules = MeshRules.create(on_eight(ShardingConfig.from_file(path)), config)
    runtime = Runtime(model, config, rules=rules, options=FLOAT8_CACHE, prefill_chunk=16)
    got, expected = prefill_and_decode(runtime, SEEDS["b"])[0].logits, on_one_device()
    assert np.mean(np.abs(got - expected).max(axis=-1) < 10 * ATOL) > 0.9


@functools.cache
def on_one_device():
    """Logits of one layer with a float8 cache."""
    model, config = golden_model("b", 1)
    with float8():
        return prefill_and_decode(Runtime(model, config, options=FLOAT8_CACHE), SEEDS["b"])[0].logits


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
    return ShardingConfig.from_dict(values, source=f"random rules {seed}")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_random_meshes(number):
    name = "ab"[number % 2]
    sharding = random_sharding(golden_model(name)[1], number)
    check(name, sharding, prefill_chunk=[16, 40, None][number % 3], layers=2)
