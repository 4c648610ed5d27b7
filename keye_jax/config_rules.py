"""What each field of `config.json` may say: the one table of fields that are fixed, and of those that have no effect.

A field is one of three. It is obeyed: an attribute of a class in `keye_jax.config`. It is fixed: `FIXED` says which
values mean what this model computes, and every other value is refused. Or it has no effect on an answer: `HARMLESS`
says why. A field that is none of these is kept, has no effect, and is listed by `KeyeConfig.unknown_fields`.

Sections are named as in the file: "" for the top, which holds the decoder's fields, "rope_scaling", "sa_config" and
"vision_config". A field that is null counts as left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from keye_jax.errors import UserError, shorten, shorten_name


def fail(field: str, value: Any, allowed: str) -> NoReturn:
    """Raises the UserError for a field of config.json."""
    raise UserError(f"config: {field} is {shorten(value)}; it must be {allowed}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a field may say.

    Attributes:
      holds: whether a value is allowed, given the other fields of its section.
      allowed: what is, for the message; it may name fields of the section in braces.
    """

    holds: Callable[[Any, Mapping[str, Any]], bool]
    allowed: str


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Compares as JSON does: true is not 1, and 1.0 is 1."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)


def _must(*values: Any, why: str = "as in the released model") -> Rule:
    allowed = " or ".join(map(repr, values)).replace("{", "{{").replace("}", "}}")
    return Rule(lambda value, _: _is_one_of(value, values), f"{allowed}, {why}")


def _same_as(name: str) -> Rule:
    return Rule(lambda value, section: value == section.get(name), f"{name} {{{name}}}")


def _left_out(why: str) -> Rule:
    return Rule(lambda value, _: _is_one_of(value, ({}, [], False)), f"left out: {why}")


def _all(item: str) -> Rule:
    # A model may be made of the first layers only.
    def holds(value: Any, section: Mapping[str, Any]) -> bool:
        is_list = isinstance(value, list) and len(value) >= section.get("num_hidden_layers", 0)
        return is_list and all(each == item for each in value)

    return Rule(holds, f"a list of {item!r} for each of {{num_hidden_layers}} layers")


def _is_window_off(value: Any, section: Mapping[str, Any]) -> bool:
    return section.get("use_sliding_window") is False or _is_one_of(value, (0, False))


def _are_tokens(value: Any, _: Mapping[str, Any]) -> bool:
    return all(type(each) is int and 0 <= each < 1 << 31 for each in (value if isinstance(value, list) else [value]))


def _names_this_model(value: Any, _: Mapping[str, Any]) -> bool:
    return isinstance(value, list) and all(each in _ARCHITECTURES for each in value)


_ARCHITECTURES = ("KeyeVL2MoeForConditionalGeneration", "KeyeVL2ForConditionalGeneration")
_OFF = _must(False)
_ONE, _NONE = _must(1), _must(0)
_NO_QUANTISATION = _left_out("these weights have no fewer bits")
_NO_CAP = _must(0, why="or left out: this model caps no logits")
_NO_SCALING = _left_out("this model scales no positions")
_WEIGHTS = "weights keep the dtypes of their files"

FIXED: Mapping[str, Mapping[str, Rule]] = {
    "": {
        "architectures": Rule(_names_this_model, f"['{_ARCHITECTURES[0]}']"),
        "model_type": _must("KeyeVL2"),
        # The decoder's mathematics.
        "hidden_act": _must("silu"),
        "hidden_activation": _must("silu"),
        "attention_bias": _OFF,
        "qkv_bias": _OFF,
        "mlp_bias": _OFF,
        "lm_head_bias": _OFF,
        "use_qk_norm": _must(True),
        "qk_norm": _must(True),
        "tie_word_embeddings": _OFF,
        "attn_logit_softcapping": _NO_CAP,
        "final_logit_softcapping": _NO_CAP,
        "router_logit_softcapping": _NO_CAP,
        "query_pre_attn_scalar": _same_as("head_dim"),
        "attention_multiplier": _left_out("scores are divided by the square root of head_dim"),
        "embedding_multiplier": _ONE,
        "residual_multiplier": _ONE,
        "logits_scaling": _ONE,
        "logit_scale": _ONE,
        "clip_qkv": _left_out("this model clips nothing"),
        "attention_sinks": _OFF,
        "attn_temperature_tuning": _OFF,
        "attn_output_gate": _OFF,
        "parallel_attn": _OFF,
        "attention_type": _must("full", "full_attention"),
        "attn_type_list": _left_out("every layer has the same attention"),
        "q_lora_rank": _left_out("this model projects queries at once"),
        "kv_lora_rank": _left_out("this model keeps keys and values as they are"),
        "v_head_dim": _same_as("head_dim"),
        "index_topk": _left_out("sa_config says it"),
        "index_n_heads": _left_out("sa_config says it"),
        "index_head_dim": _left_out("sa_config says it"),
        "num_kv_shared_layers": _NONE,
        "hidden_size_per_layer_input": _NONE,
        "scale_emb": _ONE,
        "scale_depth": _left_out("this model scales no layers"),
        "swiglu_limit": _left_out("this model clips nothing"),
        "is_encoder_decoder": _OFF,
        "is_causal": _must(True),
        "add_cross_attention": _OFF,
        "num_nextn_predict_layers": _NONE,
        "num_hash_layers": _NONE,
        # Which tokens a layer sees.
        "use_sliding_window": _OFF,
        "sliding_window": Rule(_is_window_off, "left out, or use_sliding_window false: every layer sees all positions"),
        "attention_chunk_size": _left_out("every layer sees all positions"),
        "dual_chunk_attention_config": _left_out("every layer sees all positions"),
        "layer_types": _all("full_attention"),
        "full_attention_interval": _ONE,
        # Positions; see also rope_scaling.
        "alibi": _OFF,
        "use_alibi": _OFF,
        "use_mrope": _must(True),
        "rope_type": _must("default", "mrope", why="for this model scales no positions"),
        "position_embedding_type": _must("rope", "mrope", why="as in the released model"),
        "partial_rotary_factor": _ONE,
        "rotary_pct": _ONE,
        "rope_interleave": _OFF,
        "rope_interleaved": _OFF,
        "mrope_interleaved": _OFF,
        "rope_local_base_freq": _left_out("all layers have rope_theta"),
        "no_rope_layers": _left_out("all layers have rotary positions"),
        "nope_layers": _left_out("all layers have rotary positions"),
        # Experts.
        "decoder_sparse_step": _ONE,
        "moe_layer_freq": _ONE,
        "mlp_only_layers": Rule(lambda value, _: list(value) == [], "[], as in the released model"),
        "first_k_dense_replace": _NONE,
        "scoring_func": _must("softmax"),
        "moe_router_activation_func": _must("softmax"),
        "routed_scaling_factor": _ONE,
        "moe_routed_scaling_factor": _ONE,
        "moe_router_topk_scaling_factor": _ONE,
        "router_scaling_factor": _ONE,
        "route_scale": _ONE,
        "score_function": _must("softmax"),
        "n_group": _ONE,
        "topk_group": _ONE,
        "num_expert_group": _ONE,
        "topk_method": _must("greedy"),
        "moe_router_enable_expert_bias": _OFF,
        "use_expert_bias": _OFF,
        "n_shared_experts": _NONE,
        "num_shared_experts": _NONE,
        "shared_expert_intermediate_size": _NONE,
        "zero_expert_num": _NONE,
        "num_local_experts": _same_as("num_experts"),
        "n_routed_experts": _same_as("num_experts"),
        "num_selected_experts": _same_as("num_experts_per_tok"),
        "num_experts_per_token": _same_as("num_experts_per_tok"),
        "moe_topk": _same_as("num_experts_per_tok"),
        "moe_top_k": _same_as("num_experts_per_tok"),
        # Weights.
        "pruned_heads": _left_out("no heads are pruned"),
        "eos_token_id": Rule(_are_tokens, "a token id or a list of them"),
        "projector_hidden_act": _must("gelu"),
    },
    "rope_scaling": {
        "type": _must("mrope", "default", why="for this model scales no positions"),
        "rope_type": _must("default", "mrope", why="for this model scales no positions"),
        "mrope_interleaved": _OFF,
        "factor": _must(1, why="or left out: this model scales no positions"),
        "attention_factor": _must(1, why="or left out: this model scales no positions"),
        "partial_rotary_factor": _ONE,
    },
    "sa_config": {
        "indexer_num_kv_heads": _ONE,
        "quantization_config": _NO_QUANTISATION,
    },
    "vision_config": {
        "model_type": _must("siglip_vision_model"),
        "hidden_act": _must("gelu_pytorch_tanh"),
        "hidden_activation": _must("gelu_pytorch_tanh"),
        "temporal_patch_size": _ONE,
        "deepstack_visual_indexes": _left_out("this model takes the encoder's last layer alone"),
        "fullatt_block_indexes": _left_out("all layers see the whole image"),
        "window_size": _NONE,
        "use_sliding_window": _OFF,
        "rope_scaling": _left_out("this model scales no positions"),
        "qkv_bias": _must(True),
        "attention_bias": _must(True),
        "depth": _same_as("num_hidden_layers"),
        "num_heads": _same_as("num_attention_heads"),
        "in_channels": _same_as("num_channels"),
        "in_chans": _same_as("num_channels"),
        "embed_dim": _same_as("hidden_size"),
        "vision_use_head": _must(False, True, why="which makes no difference here"),
        "quantization_config": _NO_QUANTISATION,
        "compression_config": _NO_QUANTISATION,
    },
}
"""Values that mean what this model computes, by section and field."""

_TRAINING = "training alone reads it"
_LIBRARY = "it tells the library that wrote the file what to run, not what the model computes"
_OF_GENERATION = "generation_config.json says it"
_DERIVED = "the model has no such part"

_COMMON = {
    "dtype": _WEIGHTS,
    "torch_dtype": _WEIGHTS,
    "attention_dropout": _TRAINING,
    "dropout": _TRAINING,
    "initializer_range": _TRAINING,
    "initializer_factor": _TRAINING,
    "gradient_checkpointing": _TRAINING,
    "_name_or_path": _LIBRARY,
    "_attn_implementation": _LIBRARY,
    "_attn_implementation_autoset": _LIBRARY,
    "attn_implementation": _LIBRARY,
    "auto_map": _LIBRARY,
    "chunk_size_feed_forward": _LIBRARY,
    "id2label": _LIBRARY,
    "label2id": _LIBRARY,
    "is_decoder": _LIBRARY,
    "output_attentions": _LIBRARY,
    "output_hidden_states": _LIBRARY,
    "output_router_logits": _LIBRARY,
    "return_dict": _LIBRARY,
    "use_return_dict": _LIBRARY,
    "problem_type": _LIBRARY,
    "task_specific_params": _LIBRARY,
    "tokenizer_class": _LIBRARY,
    "transformers_version": _LIBRARY,
    "use_cache": _LIBRARY,
    "use_bfloat16": _LIBRARY,
    "base_model_tp_plan": _LIBRARY,
}

HARMLESS: Mapping[str, Mapping[str, str]] = {
    "": _COMMON
    | {
        "text_config": "its fields count as the decoder's",
        "intermediate_size": _DERIVED,  # the width of dense layers, of which there are none
        "max_window_layers": _DERIVED,
        "vision_token_id": _DERIVED,
        "fast_video_token_id": _DERIVED,
        "router_aux_loss_coef": _TRAINING,
        "router_z_loss_coef": _TRAINING,
        "router_jitter_noise": _TRAINING,
        "embd_pdrop": _TRAINING,
        "resid_pdrop": _TRAINING,
        "bos_token_id": _OF_GENERATION,
        "pad_token_id": _OF_GENERATION,
        "temperature": _OF_GENERATION,
        "top_k": _OF_GENERATION,
        "top_p": _OF_GENERATION,
        "do_sample": _OF_GENERATION,
        "max_length": _OF_GENERATION,
        "min_length": _OF_GENERATION,
    },
    "rope_scaling": {},
    "sa_config": {},
    "vision_config": _COMMON
    | {
        "architectures": _LIBRARY,
        "tokens_per_second": "each frame is a block of positions, whatever its time",
        "tie_word_embeddings": _DERIVED,
        "add_cross_attention": _DERIVED,
        "is_encoder_decoder": _DERIVED,
        "bos_token_id": _DERIVED,
        "eos_token_id": _DERIVED,
        "pad_token_id": _DERIVED,
    },
}
"""Fields that no answer depends on, by section and field, and why."""

STRICT = ("rope_scaling",)
"""Sections of which each field changes what is computed: one that is not known is refused."""


def check(section: str, values: Mapping[str, Any], known: frozenset[str]) -> None:
    """Holds the fields of a section to the table.

    Args:
      values: its fields as the file has them, with the defaults of those that are left out.
      known: names of those that are obeyed.

    Raises:
      UserError: a fixed field has another value, or a field of a strict section is not known.
    """
    where = f"{section}." if section else ""
    for name, value in values.items():
        rule = FIXED[section].get(name)
        if value is None:
            continue
        if rule is not None and not rule.holds(value, values):
            method = value.get("quant_method") if rule is _NO_QUANTISATION and isinstance(value, Mapping) else None
            if method is not None:
                fail(f"{where}{name}.quant_method", method, rule.allowed)
            fail(f"{where}{name}", value, rule.allowed.format_map(_Shown(values)))
        if rule is None and section in STRICT and name not in known:
            fail(f"{where}{shorten_name(name)}", value, _NO_SCALING.allowed)


def unknown(section: str, names: Any) -> list[str]:
    """Those of `names` that the table does not have, with their section."""
    rows = FIXED[section].keys() | HARMLESS[section].keys()
    return [f"{section}.{name}" if section else name for name in sorted(names) if name not in rows]


class _Shown(dict[str, Any]):
    """Fields of a section as messages show them."""

    def __missing__(self, name: str) -> str:
        return "(left out)"
