"""The catalogue of released shapes against the released configuration."""

import dataclasses
import json
from pathlib import Path

from pallas_kernels import shapes

CONFIG = Path(__file__).parents[2] / "configs" / "model" / "keye_vl_2_30b_a3b.json"


def test_the_catalogue_is_the_released_configuration():
    config = json.loads(CONFIG.read_text())
    indexer, vision = config["sa_config"], config["vision_config"]
    assert dataclasses.asdict(shapes.KEYE_VL_2) == {
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "index_heads": indexer["indexer_num_heads"],
        "index_dim": indexer["indexer_head_dim"],
        "top_k": indexer["topk"],
        "hidden": config["hidden_size"],
        "vocab": config["vocab_size"],
        "experts": config["num_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "expert_hidden": config["moe_intermediate_size"],
        "vision_heads": vision["num_attention_heads"],
        "vision_dim": vision["hidden_size"] // vision["num_attention_heads"],
    }
    assert indexer["indexer_num_kv_heads"] == 1
