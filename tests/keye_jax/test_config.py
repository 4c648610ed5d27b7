import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest

from keye_jax.config import KeyeConfig, SparseAttentionConfig, VisionConfig
from keye_jax.config_rules import FIXED, HARMLESS
from keye_jax.errors import UserError
from tests import fuzz_config

CONFIGS = Path(__file__).parents[2] / "configs" / "model"


def values(name="keye_vl_2_30b_a3b"):
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_are_read_and_written_back(path):
    config = KeyeConfig.from_file(path)
    assert KeyeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_released_dimensions():
    config = KeyeConfig.from_file(CONFIGS / "keye_vl_2_30b_a3b.json")
    assert (config.num_hidden_layers, config.num_experts, config.sa_config.topk) == (48, 128, 2048)
    assert config.indexer_mrope_section == (8, 12, 12)
    assert (config.vision_config.head_dim, config.vision_config.base_grid, config.vision_config.merged_size) == (
        72,
        27,
        4608,
    )


def test_unknown_fields_are_kept_and_ignored():
    given = values() | {"a_new_field": [1, {"b": 2}]}
    config = KeyeConfig.from_dict(given)
    assert config == KeyeConfig.from_dict(values())
    assert config.to_dict()["a_new_field"] == [1, {"b": 2}]
    assert config.vision_config.to_dict()["model_type"] == "siglip_vision_model"


def required():
    """Dotted names of all fields that the released file must have."""
    return [
        *(["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"]),
        *(["max_position_embeddings", "rope_theta", "rope_scaling", "num_experts", "num_experts_per_tok"]),
        *(["moe_intermediate_size", "sa_config", "vision_config", "image_token_id", "video_token_id"]),
        *(["rope_scaling.mrope_section", "sa_config.topk", "sa_config.indexer_num_heads"]),
        *(["sa_config.indexer_head_dim", "vision_config.hidden_size", "vision_config.patch_size"]),
    ]


@pytest.mark.parametrize("name", required())
def test_a_missing_field_is_named(name):
    given = values()
    *path, last = name.split(".")
    section = given
    for key in path:
        section = section[key]
    del section[last]
    with pytest.raises(ValueError, match=f"config: {name} is missing"):
        KeyeConfig.from_dict(given)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_key_value_heads", 5, "num_key_value_heads is 5; it must be a divisor of num_attention_heads 32"),
        ("rope_scaling.mrope_section", [16, 24, 25], "mrope_section is .16, 24, 25.; it must be such that it sums to"),
        ("rope_scaling.mrope_section", [32, 32], "must be three positive numbers"),
        ("rope_scaling.mrope_section", "16", "must be a list of integers"),
        ("sa_config.topk", 0, "sa_config.topk is 0; it must be from 1 to 134,217,728"),
        ("sa_config.indexer_num_kv_heads", 2, "sa_config.indexer_num_kv_heads is 2; it must be 1"),
        ("sa_config.indexer_head_dim", 60, "sa_config.indexer_head_dim is 60"),
        ("num_experts_per_tok", 129, "num_experts_per_tok is 129; it must be at most num_experts 128"),
        ("hidden_size", -1, "hidden_size is -1; it must be from 1 to 1,048,576"),
        ("hidden_size", "2048", "hidden_size is '2048'; it must be an integer"),
        ("hidden_size", True, "hidden_size is True; it must be an integer"),
        ("rope_theta", "1e7", "rope_theta is '1e7'; it must be a number"),
        ("norm_topk_prob", 1, "norm_topk_prob is 1; it must be true or false"),
        ("image_token_id", 151936, "image_token_id is 151936; it must be from 0 to vocab_size - 1 = 151935"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True; it must be False, as in the released model"),
        ("mlp_only_layers", [3], "mlp_only_layers"),
        ("dtype", "int8", "dtype is 'int8'"),
        ("vision_config.num_attention_heads", 7, "vision_config.num_attention_heads is 7"),
        ("vision_config.num_attention_heads", 64, "multiple of 4"),
        ("vision_config.hidden_act", "relu", "vision_config.hidden_act is 'relu'"),
        ("vision_config", 3, "vision_config is 3; it must be a JSON object"),
    ],
)
def test_an_impossible_field_is_named(name, value, message):
    given = copy.deepcopy(values())
    *path, last = name.split(".")
    section = given
    for key in path:
        section = section[key]
    section[last] = value
    with pytest.raises(ValueError, match=message):
        KeyeConfig.from_dict(given)


def test_a_file_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        KeyeConfig.from_file(tmp_path)


GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*/config.json"))


@pytest.mark.parametrize("path", [*sorted(CONFIGS.glob("*.json")), *GOLDEN], ids=lambda path: f"{path.parts[-2:]}")
def test_the_table_has_every_field_of_the_known_files(path):
    assert KeyeConfig.from_file(path).unknown_fields == []


def test_a_field_is_obeyed_or_fixed_or_harmless():
    for section, kind in (("", KeyeConfig), ("sa_config", SparseAttentionConfig), ("vision_config", VisionConfig)):
        assert not FIXED[section].keys() & HARMLESS[section].keys()
        obeyed = {field.name for field in dataclasses.fields(kind)} - {"dtype"}
        assert not obeyed & HARMLESS[section].keys()


def changed(name, value):
    """The released file with another value of a field, whose sections may be new."""
    given = copy.deepcopy(values())
    *path, last = name.split(".")
    section = given
    for key in path:
        section = section.setdefault(key, {})
    section[last] = value
    return given


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rope_scaling.rope_type", kind) for kind in ("yarn", "linear", "dynamic", "longrope", "llama3", "su", 3)),
        ("rope_scaling.type", "yarn"),
        ("rope_type", "yarn"),
        ("dual_chunk_attention_config", {"chunk_size": 8192}),
        ("attention_type", "linear"),
        ("index_topk", 512),
        ("moe_topk", 3),
        ("router_scaling_factor", 2.5),
        ("vision_config.rope_scaling", {"type": "yarn", "factor": 2}),
        ("vision_config.use_sliding_window", True),
        ("text_config", {"text_config": {"use_sliding_window": True}}),
        ("rope_scaling.factor", 4.0),
        ("rope_scaling.original_max_position_embeddings", 32768),
        ("rope_scaling.mrope_interleaved", True),
        ("rope_scaling.a_new_field", 1),
        ("rope_parameters.rope_type", "yarn"),
        ("rope_parameters.rope_theta", 1e6),
        ("rope_parameters.mrope_section", [24, 20, 20]),
        ("rope_parameters", [1]),
        ("text_config.rope_scaling", {"rope_type": "linear", "factor": 2}),
        ("text_config.hidden_size", 4096),
        ("text_config.num_hidden_layers", 47),
        ("text_config.model_type", "llama"),
        ("text_config", 3),
        ("mrope_interleaved", True),
        ("use_sliding_window", True),
        ("sliding_window", 4096),
        ("layer_types", ["full_attention"] * 47 + ["sliding_attention"]),
        ("layer_types", ["full_attention"]),
        ("routed_scaling_factor", 2.5),
        ("scoring_func", "sigmoid"),
        ("n_group", 8),
        ("topk_group", 4),
        ("n_shared_experts", 1),
        ("shared_expert_intermediate_size", 768),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("quantization_config", {"quant_method": "gptq", "bits": 3, "group_size": 128}),
        ("compression_config", {"format": "int-quantized"}),
        ("text_config.quantization_config", {"quant_method": "awq"}),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("partial_rotary_factor", 0.5),
        ("attn_logit_softcapping", 50.0),
        ("attn_temperature_tuning", True),
        ("architectures", ["LlamaForCausalLM"]),
        ("model_type", "qwen3_vl_moe"),
        ("eos_token_id", -1),
        ("eos_token_id", "<|im_end|>"),
        ("torch_dtype", "float32"),
        ("vision_config.hidden_act", "gelu"),
        ("vision_config.model_type", "qwen3_vl_moe"),
        ("vision_config.deepstack_visual_indexes", [8, 16, 24]),
        ("vision_config.temporal_patch_size", 2),
        ("vision_config.layer_norm_eps", math.nan),
        ("rms_norm_eps", 0),
        ("rope_theta", math.inf),
        ("rope_theta", -1.0),
        ("rope_theta", 10**400),
        ("hidden_size", 2048.5),
        ("num_hidden_layers", 10**12),
    ],
)
def test_what_is_not_computed_is_refused_in_one_sentence(name, value):
    with pytest.raises(UserError, match=r"^config: ") as error:
        KeyeConfig.from_dict(changed(name, value))
    message = str(error.value)
    assert name.rpartition(".")[2] in message and message.isprintable() and len(message) < 300
    assert "must" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10_000_000, "mrope_section": [16, 24, 24]}),
        ("rope_scaling.factor", 1.0),
        ("rope_scaling.mrope_interleaved", False),
        ("text_config", {"model_type": "KeyeVL2_text", "hidden_size": 2048, "torch_dtype": "bfloat16"}),
        ("use_sliding_window", False),
        ("sliding_window", None),
        ("layer_types", ["full_attention"] * 48),
        ("routed_scaling_factor", 1.0),
        ("quantization_config", None),
        ("mlp_only_layers", None),
        ("torch_dtype", "bfloat16"),
        ("eos_token_id", [151645, 151643]),
    ],
)
def test_what_says_the_same_is_taken(name, value):
    assert KeyeConfig.from_dict(changed(name, value)) == KeyeConfig.from_dict(values())


def test_the_decoder_may_stand_in_a_section_of_its_own():
    given = values()
    rope = {"rope_theta": given.pop("rope_theta"), **given.pop("rope_scaling")}
    apart = ("vision_config", "architectures", "model_type", *(name for name in given if name.endswith("_token_id")))
    text = {name: given.pop(name) for name in list(given) if name not in apart} | {"rope_parameters": rope}
    config = KeyeConfig.from_dict(given | {"text_config": text})
    assert config == KeyeConfig.from_dict(values()) and config.unknown_fields == []
    assert KeyeConfig.from_dict(config.to_dict()) == config


def test_the_dtype_has_two_names_and_may_be_a_guess():
    given = values()
    del given["dtype"]
    assert (found := KeyeConfig.from_dict(given)).dtype == "bfloat16" and found.dtype_is_assumed
    found = KeyeConfig.from_dict(given | {"torch_dtype": "float32"})
    assert found.dtype == "float32" and not found.dtype_is_assumed and found.to_dict()["dtype"] == "float32"
    with pytest.raises(UserError, match=r"dtype is 'torch\.float32'; it must be bfloat16 or float32 or float16"):
        KeyeConfig.from_dict(given | {"torch_dtype": "torch.float32"})


def test_damaged_files_are_refused_or_valid():
    """`python -m tests.fuzz_config` tries more."""
    outcomes = [fuzz_config.run(1, number) for number in range(300)]
    assert not [found for _, found in outcomes if found]
    assert {outcome for outcome, _ in outcomes} == {"valid", "refused"}
