import json

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.model.keye import Keye
from keye_jax.processor.prompt import SafeTokenizer
from keye_jax.train.shapes.files import CONTROL, write_model_files
from keye_jax.train.shapes.scene import COLOURS, SHAPES


def test_the_files_are_the_same_on_every_call(files, tmp_path):
    write_model_files(tmp_path)
    names = {path.name for path in files.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert all((files / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_control_tokens_have_the_ids_of_the_configuration(config):
    named = {
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|endoftext|>": config.extra["bos_token_id"],
        "<|im_end|>": config.extra["eos_token_id"],
    }
    assert {name: CONTROL[name] for name in named} == named


def test_words_are_few_tokens_and_digits_one_each(files, config):
    tokenizer = SafeTokenizer(files / "tokenizer.json")
    values = json.loads((files / "tokenizer.json").read_text())
    assert len(values["model"]["vocab"]) == config.vocab_size == 512
    assert all(len(tokenizer.encode_text(word)) == 1 for word in (*COLOURS, *SHAPES))
    assert all(len(tokenizer.encode_text(f" {word}")) == 1 for word in (*COLOURS, *SHAPES))
    assert [tokenizer.detokenize([token]) for token in tokenizer.encode_text("12:34 10.5-7")] == list("12:34 10.5-7")
    anything = "Ünïcode, 例\n"
    assert tokenizer.detokenize(tokenizer.encode_text(anything)) == anything


def test_the_model_is_small():
    config = KeyeConfig.from_file(presets.EMBEDDED)
    parameters = Keye.parameter_count(config)
    assert 2e6 < parameters < 4e6 and 2 * parameters < 8e6
