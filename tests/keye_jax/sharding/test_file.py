"""Every mistake in a sharding file is refused by name; every preset holds for the released model."""

import re
from pathlib import Path

import pytest
import yaml

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.sharding import ShardingConfig

ROOT = Path(__file__).parents[3]
PRESETS = sorted((ROOT / "configs" / "sharding").glob("*.yaml"))
MESH = "mesh: {data: 2, sequence: auto}\n"


@pytest.fixture(scope="module")
def released():
    return KeyeConfig.from_file(ROOT / "configs" / "model" / "keye_vl_2_30b_a3b.json")


def read(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return ShardingConfig.from_file(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mesh: [", "is not YAML"),
        ("mesh: {data: 2020-13-45}", "is not YAML"),
        ("mesh: {data: 2}\nrules: []", "rules is []; it must be a mapping of names"),
        ("mesh: {'': 2}", "mesh is {'': 2}; it must be a mapping of names"),
        ("mesh: {data: 2, data: 4}", "'data' stands twice"),
        ("- mesh", "the file is ['mesh']; it must be a mapping of names"),
        ("rules: {}", "mesh is missing"),
        ("mesh: {}", "mesh is {}; it must be at least one axis and its size"),
        ("mesh: {data: 0}", "mesh.data is 0; it must be a positive integer or auto"),
        ("mesh: {data: true}", "mesh.data is True; it must be a positive integer or auto"),
        ("mesh: {data: some}", "mesh.data is 'some'; it must be a positive integer or auto"),
        ("mesh: {data: auto, tensor: auto}", "mesh is 'auto for data and tensor'; it must be auto for one axis"),
        (MESH + "rule: {}", "the file has 'rule'; known are mesh, rules, exchange, across_slices"),
        (MESH + "rules: {expert: data}", "rules has 'expert'; known are batch, query_sequence,"),
        (MESH + "rules: {experts: tensor}", "rules.experts is 'tensor'; it must be an axis of the mesh: data, seq"),
        (MESH + "rules: {experts: [data, data]}", "rules.experts is ['data', 'data']; it must be axes that differ"),
        (
            MESH + "rules: {cache_sequence: [data, sequence], heads: data, kv_heads: data}",
            "mesh axis data is used twice, by rules.cache_sequence and rules.heads, which split the same array; one of",
        ),
        (MESH + "rules: {heads: data}", "rules.kv_heads is None; it must be that of rules.heads"),
        (
            MESH + "rules: {experts: [data, sequence], expert_hidden: sequence}",
            "mesh axis sequence is used twice, by rules.experts and rules.expert_hidden",
        ),
        (MESH + "exchange: {expert: auto}", "exchange has 'expert'; known are experts"),
        (MESH + "exchange: {experts: ring}", "exchange.experts is 'ring'; it must be one of auto, all_gather"),
        (MESH + "across_slices: pod", "across_slices is 'pod'; it must be an axis of the mesh: data, sequence"),
    ],
)
def test_a_mistake_is_refused_by_file_and_field(tmp_path, text, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read(tmp_path, text)
    assert str(tmp_path / "mine.yaml") in str(error.value)
    assert "\n" not in str(error.value)


def test_more_devices_than_there_are_is_refused_with_both_numbers(tmp_path):
    config = read(tmp_path, "mesh: {data: 2, sequence: 8}")
    with pytest.raises(UserError, match=r"\(data 2 x sequence 8\) needs 16 devices; there are 8$"):
        config.sizes(8)
    assert config.sizes(20) == {"data": 2, "sequence": 8}


def test_auto_takes_all_devices_or_says_why_it_cannot(tmp_path):
    config = read(tmp_path, MESH)
    assert config.sizes(8) == {"data": 2, "sequence": 4}
    with pytest.raises(UserError, match=r"mesh.sequence is auto, but 7 devices .* their product 2 must divide 7"):
        config.sizes(7)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "heads: tensor, kv_heads: tensor",
            "rules.kv_heads splits num_key_value_heads 4 into 8 (tensor 8), which does not",
        ),
        ("experts: [tensor, data]", "rules.experts splits num_experts 128 into 24 (tensor 8 x data 3)"),
        ("vocab: data", "rules.vocab splits vocab_size 151936 into 3 (data 3), which does not divide it; 1, 2, 4, 8"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(tmp_path, released, rule, message):
    config = read(tmp_path, f"mesh: {{tensor: 8, data: 3}}\nrules: {{{rule}}}")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        config.check(released, config.sizes(24))
    assert str(error.value).endswith("would")


def test_what_would_divide_divides(tmp_path, released):
    config = read(tmp_path, "mesh: {tensor: 8}\nrules: {heads: tensor, kv_heads: tensor}")
    with pytest.raises(UserError, match="which does not divide it; 1, 2 or 4 would"):
        config.check(released, config.sizes(8))
    for size in (1, 2, 4):
        config.check(released, config.with_sizes(tensor=size).sizes(8))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_say_when_to_use_them_and_hold_for_the_released_model(path, released):
    text = path.read_text()
    assert text.startswith("# ") and len(text.splitlines()[0]) > 60
    config = ShardingConfig.from_file(path)
    for devices in (16, 32):
        config.check(released, config.sizes(devices))


def test_the_format_in_the_documentation_is_read():
    from keye_jax.sharding import file

    assert file.__doc__ is not None
    example = "\n".join(line[4:] for line in file.__doc__.splitlines() if line.startswith("    "))
    config = ShardingConfig.from_dict(yaml.safe_load(example))
    assert config.axes("experts") == ("data", "sequence") and config.across_slices == "data"
