"""The text around each frame: its presets, where it is read from, and how many tokens it takes."""

import json

import numpy as np
import pytest

from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.processor.frame_text import PRESETS, FrameEncoder, FrameText
from keye_jax.processor.prompt import SafeTokenizer


@pytest.fixture
def load(checkpoint, config, tmp_path):
    """A processor for a checkpoint with other files."""

    def make(**files):
        for file in checkpoint.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "preprocessor_config.json").write_text("{}")
        for name, values in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(values))
        return Processor.from_checkpoint(tmp_path, config)

    return make


def shown(processor):
    """The text of a video of three frames, each pad token run as one `#`, and the inputs."""
    part = {"type": "video", "video": np.zeros((3, 28, 56, 3), np.uint8), "fps": 2}
    plan = processor.plan([{"role": "user", "content": [part]}])
    inputs = processor.process(plan)
    assert len(inputs.input_ids) == plan.num_tokens
    text = processor.detokenize(inputs.input_ids, skip_special_tokens=False)
    text = text.replace("<|video_pad|>" * plan.videos[0].tokens_per_frame, "#")
    return text.removeprefix("<|im_start|>user\n").split("<|im_end|>")[0], inputs


@pytest.mark.parametrize(
    ("frame_format", "text"),
    [
        ("keye-1.5", "<|vision_start|><|frame|>0.0#<|frame|>0.5#<|frame|>1.0#<|vision_end|>"),
        (
            "per-frame",
            "<|vision_start|><|frame|>0.0<|vision_start|>#<|vision_end|><|frame|>0.5<|vision_start|>#<|vision_end|>"
            "<|frame|>1.0<|vision_start|>#<|vision_end|><|vision_end|>",
        ),
        ("natural", "<|vision_start|><0.0 seconds>#<0.5 seconds>#<1.0 seconds>#<|vision_end|>"),
        ("[{time:.2f}]", "<|vision_start|>[0.00]#[0.50]#[1.00]#<|vision_end|>"),
        ("{pads}@{time:.1f} ", "<|vision_start|>#@0.0 #@0.5 #@1.0 <|vision_end|>"),
    ],
)
def test_formats(load, frame_format, text):
    found, inputs = shown(load(preprocessor_config={"frame_format": frame_format}))
    assert found == text
    assert inputs.warnings == ()


@pytest.mark.parametrize("preset", PRESETS)
def test_positions_are_those_of_text_around_blocks(load, config, preset):
    _, inputs = shown(load(preprocessor_config={"frame_format": preset}))
    rows, cols = (inputs.video_grids[0, 1:] // 2).tolist()
    at, index = 0, 0
    while index < len(inputs.input_ids):
        if inputs.input_ids[index] != config.video_token_id:
            assert inputs.positions[:, index].tolist() == [at] * 3
            at, index = at + 1, index + 1
            continue
        block = inputs.positions[:, index : index + rows * cols].reshape(3, rows, cols)
        np.testing.assert_array_equal(block[0], np.full((rows, cols), at))
        np.testing.assert_array_equal(block[1], at + np.repeat(np.arange(rows)[:, None], cols, 1))
        np.testing.assert_array_equal(block[2], at + np.repeat(np.arange(cols)[None], rows, 0))
        at, index = at + max(rows, cols), index + rows * cols
    assert at == len(inputs.input_ids) + inputs.position_delta


def test_where_it_is_read_from(load):
    one = {"frame_format": "1:{time:.0f}"}
    two = {"video_processor": {"frame_format": "2:{time:.0f}"}}
    three = {"frame_format": "3:{time:.0f}"}
    assert "3:0#" in shown(load(preprocessor_config=three))[0]
    assert "2:0#" in shown(load(preprocessor_config=three, processor_config=two))[0]
    assert "1:0#" in shown(load(preprocessor_config=three, processor_config=two, video_preprocessor_config=one))[0]


def test_a_guess_is_said_once(load):
    processor = load()
    text, inputs = shown(processor)
    assert text.startswith("<|vision_start|><|frame|>0.0#")
    (warning,) = inputs.warnings
    assert "keye-1.5" in warning and "per-frame" in warning and "natural" in warning
    video = {"type": "video", "video": np.zeros((2, 28, 28, 3), np.uint8)}
    assert len(processor.plan([{"role": "user", "content": [video, video]}]).warnings) == 1
    assert processor.plan([{"role": "user", "content": "Hello."}]).warnings == ()


@pytest.mark.parametrize(
    "value",
    ["nearly", "", "{}", "{oops}", "{time", "{time}{pads}{pads}", "{time:9999999.1f}", "{time.real}", "{time!r}", 3],
)
def test_what_is_not_a_format(load, value):
    message = r"preprocessor_config.json: frame_format is .*; it must be a format string such as .* or one of keye-1.5"
    with pytest.raises(UserError, match=message):
        load(preprocessor_config={"frame_format": value})


def test_a_format_holds_no_pad_token(load):
    with pytest.raises(UserError, match="it must hold no pad token"):
        load(preprocessor_config={"frame_format": "{time:.1f}<|video_pad|>"})


def test_frame_is_plain_text_unless_the_tokenizer_has_it(checkpoint, tmp_path):
    tokenizer = SafeTokenizer(checkpoint / "tokenizer.json")
    text = FrameText.parse("keye-1.5")
    plain = FrameEncoder(tokenizer, text)
    [(ids, after)] = plain.interleave(np.zeros(1))
    assert len(ids) > 4 and not after
    assert not set(ids) & set(tokenizer.control.values())
    values = json.loads((checkpoint / "tokenizer.json").read_text())
    token = max(token["id"] for token in values["added_tokens"]) + 1
    values["added_tokens"].append({**values["added_tokens"][0], "id": token, "content": "<|frame|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    known = FrameEncoder(SafeTokenizer(tmp_path / "tokenizer.json"), text)
    [(ids, _)] = known.interleave(np.zeros(1))
    assert ids[0] == token
    assert known.tokens_per_frame() < plain.tokens_per_frame()
    per_frame = FrameEncoder(tokenizer, FrameText.parse("per-frame"))
    assert per_frame.tokens_per_frame() == pytest.approx(plain.tokens_per_frame() + 2)
