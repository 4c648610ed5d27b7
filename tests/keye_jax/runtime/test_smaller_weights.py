"""A model of fewer bits against one of the numbers that its weights stand for: on one device and on eight."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import convert, load_params
from convert.detect import read_config
from convert.quantize import quantize_checkpoint
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.model.params import parameter_shardings
from keye_jax.quantization.schemes import Quantization, standard
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding import MeshRules, ShardingConfig
from tests.convert.convert_helpers import edit, numbers_of
from tests.keye_jax.golden_models import (
    GOLDEN,
    Trace,
    float8,
    golden_model,
    random_ids,
    text,
    traced,
    traced_decode,
)
from tests.keye_jax.runtime.sharded_helpers import TOKENS, assert_safe, assert_same, prefill_and_decode
from tests.keye_jax.runtime.test_sharded_meshes import PRESETS, on_eight

pytestmark = pytest.mark.usefixtures("quick_to_compile")
LAYERS, SEED = 2, 309
"""The seed is of a prompt whose choices are all safe."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Experts of int4 and attention of int8, both with zero points, in compressed-tensors."""
    folder = tmp_path_factory.mktemp("smaller")
    quantize_checkpoint(GOLDEN / "b", folder / "orbax", Quantization(standard("int4", 32), standard("int8")))
    convert(folder / "orbax", folder / "files")
    rng = np.random.default_rng(0)

    def add_zeros(arrays: dict[str, np.ndarray]) -> None:
        for name in [name for name in arrays if name.endswith("_scale")]:
            *experts, outputs, groups = arrays[name].shape
            if experts:
                zeros = rng.integers(-(2**31), 2**31, (*experts, outputs // 8, groups)).astype(np.int32)
            else:
                zeros = rng.integers(-20, 21, (outputs, groups)).astype(np.int8)
            arrays[name.removesuffix("_scale") + "_zero_point"] = zeros

    edit(folder / "files", add_zeros)
    (folder / "files" / "checkpoint.json").unlink()
    file = folder / "files" / "config.json"
    values = json.loads(file.read_text())
    for group in values["quantization_config"]["config_groups"].values():
        group["weights"]["symmetric"] = False
    file.write_text(json.dumps(values))
    return folder / "files"


def model_of(config: KeyeConfig, params: dict) -> tuple[Keye, KeyeConfig]:
    """The first layers."""
    layers = params["decoder"]["layers"]
    params["decoder"]["layers"] = {number: layers[number] for number in map(str, range(LAYERS))}
    config = dataclasses.replace(config, num_hidden_layers=LAYERS)
    return Keye.from_params(config, params), config


@pytest.fixture(scope="module")
def expected(checkpoint) -> tuple[Trace, list[int]]:
    """What one device computes with the numbers."""
    config = KeyeConfig.from_file(GOLDEN / "b")
    params: dict = {}
    for path, numbers in numbers_of(checkpoint).items():
        node = params
        *owners, last = path.split(".")
        for owner in owners:
            node = node.setdefault(owner, {})
        node[last] = jnp.asarray(numbers)
    trace, tokens = prefill_and_decode(Runtime(*model_of(config, params)), SEED)
    assert_safe(trace, config.sa_config.topk)
    return trace, tokens


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem != "v5p_32")) for path in PRESETS],
)
def test_presets(path, checkpoint, expected):
    """Each device reads its part of values, scales and zero points. v5p_32 splits experts and heads, by two axes."""
    config = read_config(checkpoint)
    assert config.quantization.experts and config.quantization.experts.zero_points
    rules = MeshRules.create(on_eight(ShardingConfig.from_file(path)), config)
    params = load_params(checkpoint, config, shardings=parameter_shardings(config, rules))
    model, config = model_of(config, params)
    assert_same(prefill_and_decode(Runtime(model, config, rules=rules, prefill_chunk=16), SEED), expected)


def test_prompts_alone_multiply_activations_in_float8(tmp_path):
    """With the same pages, a step of decode is the same with and without."""
    quantize_checkpoint(GOLDEN / "b", tmp_path / "fp8", Quantization(standard("fp8")))
    config = read_config(tmp_path / "fp8")
    model, config = model_of(config, load_params(tmp_path / "fp8", config))
    exact = Runtime(model, config)
    rounded = Runtime(model, config, options=AttentionOptions(activation_dtype="float8_e4m3fn"))
    ids, prompts = random_ids(TOKENS, SEED), []
    for runtime in (exact, rounded):
        pool, tables = runtime.new_cache(1, TOKENS + 1)
        with float8():
            trace, pool = traced(runtime, text(ids, tables[0]), pool)
        prompts.append(trace.hidden[0])
    assert 1e-3 < np.linalg.norm(prompts[1] - prompts[0]) / np.linalg.norm(prompts[0]) < 0.1
    given = np.asarray([7]), np.asarray([TOKENS]), tables
    answers = [traced_decode(runtime, *given, jax.tree.map(jnp.copy, pool))[0] for runtime in (exact, rounded)]
    np.testing.assert_allclose(answers[1].hidden, answers[0].hidden, rtol=1e-5, atol=1e-5)


def test_activations_in_float8_need_experts_in_fp8(checkpoint):
    options = AttentionOptions(activation_dtype="float8_e4m3fn")
    for config, has in ((golden_model("b")[1], "of all bits"), (read_config(checkpoint), "in int4")):
        with pytest.raises(UserError, match=f"it takes experts in fp8, and this model's are {has}"):
            options.check(config)
