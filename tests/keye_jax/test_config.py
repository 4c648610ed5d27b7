import copy
import json
from pathlib import Path

import pytest

from keye_jax.config import KeyeConfig

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
        ("sa_config.topk", 0, "sa_config.topk is 0; it must be positive"),
        ("sa_config.indexer_num_kv_heads", 2, "sa_config.indexer_num_kv_heads is 2; it must be 1"),
        ("sa_config.indexer_head_dim", 60, "sa_config.indexer_head_dim is 60"),
        ("num_experts_per_tok", 129, "num_experts_per_tok is 129; it must be at most num_experts 128"),
        ("hidden_size", -1, "hidden_size is -1; it must be positive"),
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
