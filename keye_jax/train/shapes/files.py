"""The tokenizer, the chat template and the configurations of the embedded model, as in a released checkpoint.

python -m keye_jax.train.shapes.files DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from keye_jax import presets
from keye_jax.byte_level import byte_level_bpe
from keye_jax.config import KeyeConfig
from keye_jax.processor.video import TOKEN_PIXELS
from keye_jax.train.shapes.questions import ask
from keye_jax.train.shapes.scene import COLOURS, SHAPES, SIDE, WORDS, make_scene

# ChatML, whose answers begin at once: the model does not think.
TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' %}
{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif part.type == 'text' %}
{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

CONTROL = {
    "<|endoftext|>": 499,
    "<|im_start|>": 500,
    "<|im_end|>": 501,
    "<|vision_start|>": 502,
    "<|vision_end|>": 503,
    "<|vision_pad|>": 504,
    "<|image_pad|>": 505,
    "<|video_pad|>": 506,
    "<|frame|>": 507,
    "<think>": 508,
    "</think>": 509,
    "<tool_call>": 510,
    "</tool_call>": 511,
}
"""Ids of the control tokens, as `configs/model/embedded.json` has them."""

_SCENES = 40
"""Scenes whose questions the tokenizer is made from."""


def write_model_files(directory: str | Path) -> None:
    """Writes all files of the embedded model but its weights. They are the same on every call.

    Args:
      directory: the folder to write to. It is made if it does not exist.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = KeyeConfig.from_file(presets.EMBEDDED)
    frame_pixels = (SIDE * SIDE) // TOKEN_PIXELS * TOKEN_PIXELS
    files = {
        "config.json": config.to_dict(),
        "tokenizer.json": byte_level_bpe(_lines(), config.vocab_size, CONTROL, digits=True),
        "tokenizer_config.json": {
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": config.max_position_embeddings,
        },
        "generation_config.json": {
            "eos_token_id": [CONTROL["<|im_end|>"], CONTROL["<|endoftext|>"]],
            "do_sample": False,
        },
        "preprocessor_config.json": {
            "patch_size": config.vision_config.patch_size,
            "merge_size": config.vision_config.spatial_merge_size,
            "min_pixels": frame_pixels,
            "max_pixels": frame_pixels,
            "video_min_pixels": frame_pixels,
            "video_max_pixels": frame_pixels,
            "rescale_factor": 1 / 255,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "frame_format": "keye-1.5",
        },
    }
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _lines() -> list[str]:
    """Text with the words of all questions and answers."""
    asked = [question for number in range(_SCENES) for question in ask(make_scene(0, number=number), 8, number)]
    vocabulary = [f"{word}\n the {word} is {word}" for word in (*COLOURS, *SHAPES) for _ in range(8)]
    roles = ["system\nuser\nassistant\n"] * 50
    return [question.text for question in asked] + vocabulary + roles + 3 * list(WORDS)


if __name__ == "__main__":
    write_model_files(sys.argv[1])
