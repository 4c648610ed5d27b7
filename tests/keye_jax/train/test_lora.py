"""Low-rank pairs: the forward pass with them, PEFT's layout, and merging."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import convert, load_params
from convert.adapter import adaptable, read_adapter, write_adapter
from convert.synthetic import write_checkpoint
from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.context import PackedContext
from keye_jax.model.keye import Keye
from keye_jax.sharding import MeshRules, StepSharding
from keye_jax.train.config import LoraConfig
from keye_jax.train.lora import from_adapter, init_pair, pair_names, targets, to_adapter
from keye_jax.train.weights import ModelDef

LORA = LoraConfig(
    targets=("decoder.layers.*.attention", "decoder.layers.*.moe", "!*.router", "vision.layers.*.mlp.fc1"), rank=4
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint in float32, its configuration, and random pairs whose B is not zero."""
    config = dataclasses.replace(KeyeConfig.from_file(presets.TINY), num_hidden_layers=2, dtype="float32")
    directory = tmp_path_factory.mktemp("lora") / "hf"
    write_checkpoint(directory, config, seed=0)
    pairs = {}
    for index, (path, tensor) in enumerate(targets(LORA, config, "test").items()):
        a, b = init_pair(tensor, LORA, jax.random.key(index))
        b = jax.random.normal(jax.random.key(1000 + index), b.shape) / 20
        pairs |= dict(zip(pair_names(path), (a, b), strict=True))
    return directory, config, pairs


def hidden(model: Keye) -> jax.Array:
    """What the decoder and the vision encoder compute of some tokens and pixels."""
    step = StepSharding.prefill(MeshRules.single_device())
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 500, (2, 64)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), (3, 2, 64))
    contexts = (PackedContext.of((64, 64), 64),) * len(model.decoder.layers)
    x = model.decoder.embed_tokens(ids, step)
    text, _, _ = model.decoder(x, positions, contexts, AttentionOptions(implementation="xla"), step)
    pixels = jnp.asarray(np.random.default_rng(1).standard_normal((1, 16, 588)), jnp.float32)
    seen = model.vision(pixels, jnp.array([[4, 4]]), implementation="xla")
    return jnp.concatenate([text.reshape(-1), seen.reshape(-1)])


class TestForward:
    @pytest.mark.slow
    def test_it_equals_that_of_merged_weights(self, checkpoint, tmp_path):
        directory, config, pairs = checkpoint
        structure, weights = ModelDef.split(Keye.from_params(config, load_params(directory, config)))
        beside = hidden(structure.merge(weights | pairs, LORA.scale))
        write_adapter(tmp_path / "adapter", to_adapter(pairs, LORA, config), config, base="base")
        convert(directory, tmp_path / "merged", merge_lora=tmp_path / "adapter")
        merged = hidden(Keye.from_params(config, load_params(tmp_path / "merged", config)))
        plain = hidden(structure.merge(weights))
        assert jnp.max(jnp.abs(beside - plain)) > 0.1
        np.testing.assert_allclose(beside, merged, atol=2e-4 * float(jnp.max(jnp.abs(merged))))

    def test_new_pairs_change_nothing(self, checkpoint):
        directory, config, pairs = checkpoint
        structure, weights = ModelDef.split(Keye.from_params(config, load_params(directory, config)))
        new = {name: jnp.zeros_like(value) if name.endswith("_b") else value for name, value in pairs.items()}
        assert (hidden(structure.merge(weights | new, 2.0)) == hidden(structure.merge(weights))).all()

    def test_weights_without_a_pair_are_the_same_bits(self, checkpoint, tmp_path):
        directory, config, pairs = checkpoint
        write_adapter(tmp_path / "adapter", to_adapter(pairs, LORA, config), config, base="base")
        convert(directory, tmp_path / "merged", merge_lora=tmp_path / "adapter")
        before, after = load_params(directory, config), load_params(tmp_path / "merged", config)
        layer, changed = before["decoder"]["layers"]["1"], after["decoder"]["layers"]["1"]
        assert (layer["indexer"]["q_proj"]["weight"] == changed["indexer"]["q_proj"]["weight"]).all()
        assert (layer["moe"]["router"]["weight"] == changed["moe"]["router"]["weight"]).all()
        assert (layer["moe"]["down_proj"] != changed["moe"]["down_proj"]).any()


class TestPeft:
    def test_the_layout(self, checkpoint, tmp_path):
        _, config, pairs = checkpoint
        write_adapter(tmp_path, to_adapter(pairs, LORA, config), config, base="owner/name")
        stored = load_file(tmp_path / "adapter_model.safetensors")
        experts, inner, hidden_size = config.num_experts, config.moe_intermediate_size, config.hidden_size
        layer = "base_model.model.model.layers.1."
        shapes = {
            "self_attn.o_proj.lora_A.weight": (4, config.num_attention_heads * config.head_dim),
            "self_attn.o_proj.lora_B.weight": (hidden_size, 4),
            "mlp.experts.base_layer.lora_A.weight": (4 * experts, hidden_size),
            "mlp.experts.base_layer.lora_B.weight": (2 * inner, 4 * experts),
            "mlp.experts.lora_A.weight": (4 * experts, inner),
            "mlp.experts.lora_B.weight": (hidden_size, 4 * experts),
        }
        assert {name: stored[layer + name].shape for name in shapes} == shapes
        # The product of one expert, as PEFT computes it.
        a = stored[f"{layer}mlp.experts.lora_A.weight"].reshape(experts, 4, inner)
        b = stored[f"{layer}mlp.experts.lora_B.weight"].reshape(hidden_size, 4, experts)
        ours = [np.asarray(pairs[name][3]) for name in pair_names("decoder.layers.1.moe.down_proj")]
        np.testing.assert_allclose(np.einsum("ore,eri->eio", b, a)[3], ours[0] @ ours[1], rtol=1e-5, atol=1e-6)
        values = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (values["r"], values["lora_alpha"], values["peft_type"]) == (4, 32, "LORA")
        assert "model.layers.0.self_attn.q_proj" in values["target_modules"]
        assert "model.layers.0.mlp.experts.gate_up_proj" in values["target_parameters"]

    def test_there_and_back(self, checkpoint, tmp_path):
        _, config, pairs = checkpoint
        write_adapter(tmp_path, to_adapter(pairs, LORA, config), config, base="base")
        read = read_adapter(tmp_path, config)
        assert (read.rank, read.scale) == (LORA.rank, LORA.scale)
        back = from_adapter(read, config)
        assert back.keys() == pairs.keys()
        for name, value in pairs.items():
            assert (back[name] == np.asarray(value)).all(), name

    def test_experts_of_one_kind_are_not_nested(self, checkpoint, tmp_path):
        _, config, pairs = checkpoint
        down = {name: value for name, value in pairs.items() if "down_proj" in name}
        write_adapter(tmp_path, to_adapter(down, LORA, config), config, base="base")
        names = load_file(tmp_path / "adapter_model.safetensors").keys()
        assert not any("base_layer" in name for name in names)
        assert from_adapter(read_adapter(tmp_path, config), config).keys() == down.keys()

    def test_all_problems_are_named(self, checkpoint, tmp_path):
        _, config, pairs = checkpoint
        adapter = to_adapter(pairs, LORA, config)
        write_adapter(tmp_path, adapter, config, base="base")
        other = dataclasses.replace(config, num_hidden_layers=1, moe_intermediate_size=32)
        with pytest.raises(UserError) as error:
            read_adapter(tmp_path, other)
        message = str(error.value)
        assert "layers.1.self_attn.q_proj.lora_A.weight: it belongs to no weight" in message
        assert "layers.0.mlp.experts.lora_A.weight: its shape is [64, 64]; it must be [64, 32]" in message

    def test_what_cannot_be_merged_is_refused(self, checkpoint, tmp_path):
        _, config, pairs = checkpoint
        write_adapter(tmp_path, to_adapter(pairs, LORA, config), config, base="base")
        values = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"use_dora": True}))
        with pytest.raises(UserError, match="use_dora is True; only False can be merged"):
            read_adapter(tmp_path, config)
        with pytest.raises(UserError, match="has no adapter_config"):
            read_adapter(tmp_path / "nowhere", config)


def test_a_pattern_without_linear_maps_is_refused():
    config = KeyeConfig.from_file(presets.TINY)
    with pytest.raises(UserError, match=r"lora.targets has '\*norm\*'"):
        targets(LoraConfig(targets=("*norm*",)), config, "stage")
    assert "decoder.embed_tokens.weight" not in adaptable(config)
