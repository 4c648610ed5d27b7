"""Stage files, and the patterns in them."""

import json

import pytest

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.model.params import parameter_axes
from keye_jax.train.config import StageConfig
from keye_jax.train.generated import read_options
from keye_jax.train.patterns import chosen, matches, unmatched

PRESETS = sorted((presets.DIRECTORY / "train").glob("*.yaml"))
LEAST = {"train": ["projector"], "steps": 1}


def mistakes(values) -> str:
    with pytest.raises(UserError) as error:
        StageConfig.from_dict(values, source="file.yaml")
    return str(error.value)


@pytest.fixture(scope="module")
def released():
    config = KeyeConfig.from_file(presets.RELEASED)
    return config, [".".join(path) for path in parameter_axes(config)]


class TestPatterns:
    def test_a_pattern_names_a_parameter_or_a_module_above(self):
        path = "decoder.layers.3.attention.q_proj.weight"
        assert matches("decoder", path) and matches("decoder.layers.*.attention", path) and matches(path, path)
        assert not matches("decoder.layers.3.attention.q", path) and not matches("attention", path)

    def test_the_last_pattern_holds(self):
        patterns = ["*", "!vision", "vision.layers.1"]
        assert chosen(patterns, "decoder.norm.weight")
        assert not chosen(patterns, "vision.layers.0.norm1.weight")
        assert chosen(patterns, "vision.layers.1.norm1.weight")

    def test_unmatched(self):
        assert unmatched(["decoder", "!vision", "encoder"], ["decoder.norm.weight", "vision.x"]) == ["encoder"]


class TestReading:
    def test_there_and_back(self):
        stage = StageConfig.from_dict(
            LEAST | {"optimizer": {"lr": "1e-3", "lr_of": {"vision": 1e-6}}, "batch": {"images": {256: 64}}}
        )
        assert stage.optimizer.lr == 1e-3 and stage.optimizer.lr_of == {"vision": 1e-6}
        assert StageConfig.from_dict(json.loads(json.dumps(stage.to_dict()))) == stage

    def test_all_mistakes_are_named_at_once(self):
        message = mistakes(
            {"train": "projector", "stesp": 3, "keep": 0, "detach": 1, "loss": 3, "seed": True}
            | {"optimizer": {"lr": -1, "betas": [1, 2], "schedule": "steps"}, "batch": {"row": 100, "images": {0: 1}}}
        )
        lines = message.split("\n")
        assert lines[0] == "file.yaml has 11 mistakes:" and len(lines) == 12
        assert "  train is 'projector'; it must be a list of patterns" in message
        assert "  stesp is not known; known are train, lora, loss" in message
        assert "  optimizer.lr is -1; it must be a positive number" in message
        assert "  optimizer.schedule is 'steps'; it must be constant or cosine or linear" in message
        assert "  batch.row is 100; it must be a positive multiple of 64" in message

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"steps": 1}, "train is empty and lora is left out"),
            ({"train": ["*"]}, "steps is None and epochs is None"),
            ({"train": ["*"], "steps": 10**99}, "...; it must be a positive integer"),
            ({"train": ["*"], "steps": 1, "epochs": 10**400}, "...; it must be a positive number"),
            (LEAST | {"epochs": 1}, "one of them must be given"),
            (LEAST | {"loss": {"language": False}}, "there must be a loss"),
            (LEAST | {"batch": {"tokens": 300, "length": 256}}, "batch.tokens is 300; it must be a multiple"),
            (LEAST | {"batch": {"tokens": 512, "length": 768}}, "it must be at most batch.tokens 512"),
            (LEAST | {"batch": {"length": 300}}, "batch.length is 300; it must be a multiple of batch.row 256"),
            ({"train": ["*"], "epochs": 1, "data": {"source": "shapes"}}, "generated data has no end"),
            (LEAST | {"data": {"long": {}}}, "data.long is given and data.source is 'jsonl'"),
            (LEAST | {"data": {"long": {"length": 768}}}, "it must be a multiple of data.long.length 768"),
            (LEAST | {"data": {"long": {"share": 1}}}, "data.long.share is 1; it must be a number above 0 and below 1"),
        ],
    )
    def test_fields_that_contradict_each_other(self, values, message):
        assert message in mistakes(values)

    def test_a_file_that_is_no_yaml(self, tmp_path):
        (tmp_path / "x.yaml").write_text("train: [")
        with pytest.raises(UserError, match=r"x.yaml is not YAML"):
            StageConfig.from_file(tmp_path / "x.yaml")


class TestModel:
    def check(self, released, **values) -> str:
        stage = StageConfig.from_dict(LEAST | values)
        with pytest.raises(UserError) as error:
            stage.check(released[0], released[1], "stage")
        return str(error.value)

    def test_patterns_without_a_parameter(self, released):
        message = self.check(released, train=["projecter"], optimizer={"lr_of": {"visoin": 1}})
        assert "train has 'projecter'; no parameter matches it" in message and "'visoin'" in message

    def test_lengths_at_which_nothing_is_selected_are_refused(self, released):
        values = {"train": ["decoder.layers.*.indexer"], "loss": {"kl": 1, "language": False}}
        message = self.check(released, **values, batch={"length": 2048})
        assert "batch.length is 2048; it must be above topk 2048" in message
        StageConfig.from_dict(LEAST | values | {"batch": {"length": 4096}}).check(released[0], released[1], "stage")

    def test_the_indexer_and_its_loss_go_together(self, released):
        assert "loss.kl is 1.0; train must name the indexers" in self.check(released, loss={"kl": 1})
        assert "loss.kl is 0, but train names indexers" in self.check(released, train=["decoder"])

    def test_lengths_beyond_the_model(self, released):
        message = self.check(released, batch={"tokens": 2**20, "length": 2**20})
        assert "at most max_position_embeddings 262144" in message

    def test_layers_in_a_loop_are_alike(self, released):
        values = {"train": [], "scan_layers": True}
        lora = {"targets": ["decoder.layers.*.moe", "!decoder.layers.3.moe"]}
        assert "lora.targets must then have the same weights of all layers" in self.check(released, **values, lora=lora)
        alike = {"targets": ["decoder.layers.*.moe", "!*.router", "projector"]}
        StageConfig.from_dict(LEAST | values | {"lora": alike}).check(released[0], released[1], "stage")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid(path, released):
    stage = StageConfig.from_file(path)
    config, names = released
    if stage.data.source == "shapes":
        config = KeyeConfig.from_file(presets.EMBEDDED)
        names = [".".join(path) for path in parameter_axes(config)]
        read_options(stage)
    stage.check(config, names, str(path))
