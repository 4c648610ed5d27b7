"""Small stand-ins for the files of a checkpoint and of a user: processor files, a video clip, a picture."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from keye_jax.byte_level import byte_level_bpe
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError

_CORPUS = """
A short film shows a red ball that rolls over the table, a blue square that turns, and a clock that counts the seconds.
What happens in the video? The ball moves from the left to the right and then back again, while the clock runs on.
When does the person open the door? At about twelve seconds the person walks to the door, opens it and leaves the room.
Describe the picture in one sentence. There is a green triangle on a white background with some text below it.
How many people are in this image? Two people sit on a bench, and a third one is standing behind them with a camera.
Let me think about the question first. The user asks for the time at which the shape changes its colour. Looking at the
frames one after another, the first change is between three and four seconds, and the second one is near the end.
The answer is that the scene begins in the morning and ends at night. Please explain why, and list the events in order.
First, a car stops in front of the house. Second, somebody gets out of the car. Third, the light goes on. Finally, it
is dark again. I cannot see any more details, because the frames are small, but the text on the sign reads "open".
You are a helpful assistant. You can see images and videos and answer questions about them in the language of the user.
Yes, that is right. No, this is not what the video shows. It would be better to look at every frame of this part again.
def main(values): return [value for value in values if value > 0]  # 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19
"""

# ChatML. Pictures and videos stand where the message has them, before the text or between its parts. The arguments of a
# call are JSON as text, or a value.
_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\nTools:\\n' }}
{%- for tool in tools %}
{{- (tool | tojson) + '\\n' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and message.reasoning_content %}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif %}
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
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else (call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}
"""


def write_processor_files(directory: str | Path, config: KeyeConfig) -> None:
    """Writes the tokenizer, the chat template and the two processor configurations of a small random model.

    The tokenizer is a byte-level BPE with exactly `config.vocab_size` tokens. It is the same on every call. Control
    tokens have the ids that `config` gives them: `extra` has those of `<|endoftext|>` (bos_token_id) and `<|im_end|>`
    (eos_token_id).

    Args:
      directory: the folder to write to. It is made if it does not exist.
      config: the model's configuration, with a vocabulary of at least 288 tokens.

    Raises:
      UserError: the vocabulary is smaller than that.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    special = _control_tokens(config)
    if config.vocab_size < len(special) + 257:
        size = config.vocab_size
        raise UserError(f"config: vocab_size is {size}; it must be at least 288, 256 of them for the bytes")
    values = byte_level_bpe(_CORPUS.splitlines(), config.vocab_size, special)
    (directory / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    files = {
        "tokenizer.json": values,
        "tokenizer_config.json": {
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": config.max_position_embeddings,
        },
        "generation_config.json": {
            "eos_token_id": [special["<|im_end|>"], special["<|endoftext|>"]],
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
        },
        "preprocessor_config.json": {
            "patch_size": config.vision_config.patch_size,
            "merge_size": config.vision_config.spatial_merge_size,
            "min_pixels": 4 * 784,
            "max_pixels": 20480 * 784,
            "video_min_pixels": 64 * 784,
            "video_max_pixels": 256 * 784,
            "video_total_pixels": 184320 * 784,
            "rescale_factor": 1 / 255,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "frame_format": "keye-1.5",
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _control_tokens(config: KeyeConfig) -> dict[str, int]:
    """Ids of the control tokens. Tokens that the configuration does not name get the highest free ids."""
    special = {
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
    }
    for name, key in (("<|endoftext|>", "bos_token_id"), ("<|im_end|>", "eos_token_id")):
        if isinstance(config.extra.get(key), int):
            special[name] = config.extra[key]
    others = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_pad|>")
    free = (token for token in range(config.vocab_size - 1, 0, -1) if token not in set(special.values()))
    free = iter(list(free))
    for name in (*others, "<think>", "</think>", "<tool_call>", "</tool_call>"):
        if name not in special:
            special[name] = next(free)
    return special


def write_clip(path: str | Path, seconds: float = 20, fps: int = 12, size: tuple[int, int] = (640, 360)) -> None:
    """Writes an H.264 clip without sound. It shows a clock, and a ball and a square that move.

    Args:
      path: the file. The end of its name, such as .mp4 or .mkv, decides the format.
      seconds: length of the clip.
      fps: frames per second.
      size: (width, height) in pixels, both even.
    """
    import av

    width, height = size
    font = ImageFont.load_default(size=height // 6)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # With one thread the file is the same on every machine.
        stream.options = {"preset": "veryfast", "crf": "23", "threads": "1", "g": str(2 * fps)}
        for index in range(round(seconds * fps)):
            image = _scene(index / fps, width, height, font)
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def _scene(time: float, width: int, height: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    """The frame of the clip at `time`, in seconds."""
    colours = ((225, 235, 245), (245, 230, 215), (220, 240, 215), (235, 220, 240))
    image = Image.new("RGB", (width, height), colours[int(time // 5) % len(colours)])
    draw = ImageDraw.Draw(image)
    radius = height // 8
    phase = time / 4 % 2
    x = radius + (width - 2 * radius) * (phase if phase < 1 else 2 - phase)
    draw.circle((x, height * 0.7), radius, fill=(200, 40, 40), outline="black")
    y = height * 0.15 + height * 0.5 * (time / 6 % 1)
    draw.rectangle((width * 0.7, y, width * 0.7 + radius, y + radius), fill=(40, 70, 200), outline="black")
    draw.text((width * 0.04, height * 0.06), f"{int(time) // 60:02d}:{time % 60:04.1f}", fill="black", font=font)
    return image


def write_picture(path: str | Path, size: tuple[int, int] = (448, 336)) -> None:
    """Writes an image of a triangle, a disc and a word.

    Args:
      path: the file. The end of its name, such as .png or .jpg, decides the format.
      size: (width, height) in pixels.
    """
    width, height = size
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    corners = [(width * 0.1, height * 0.75), (width * 0.3, height * 0.2), (width * 0.5, height * 0.75)]
    draw.polygon(corners, fill=(40, 150, 60), outline="black")
    draw.circle((width * 0.72, height * 0.45), height * 0.2, fill=(240, 190, 30), outline="black")
    draw.text((width * 0.3, height * 0.8), "HELLO", fill="black", font=ImageFont.load_default(size=height // 8))
    image.save(path)
