"""Training a tiny model: the loss falls, batches add up, and runs resume bit for bit."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from convert import load_params
from convert.adapter import read_adapter
from convert.synthetic import write_checkpoint
from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.sharding import MeshRules, ShardingConfig, StepSharding
from keye_jax.testing import write_clip, write_processor_files
from keye_jax.train import session
from keye_jax.train.checkpoints import RunCheckpoints
from keye_jax.train.config import StageConfig
from keye_jax.train.data import FileBatches
from keye_jax.train.loop import Trainer, load_model, train_options
from keye_jax.train.lora import from_adapter
from keye_jax.train.steps import selecting_share

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ANSWERS = ("A red ball.", "A blue square.", "The clock.", "At two seconds.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint in float32 with its processor's files, and samples of text and of one clip."""
    config = KeyeConfig.from_file(presets.TINY)
    config = dataclasses.replace(
        config,
        num_hidden_layers=2,
        num_experts=4,
        num_experts_per_tok=2,
        dtype="float32",
        sa_config=dataclasses.replace(config.sa_config, topk=64),
        vision_config=dataclasses.replace(config.vision_config, num_hidden_layers=1),
    )
    folder = tmp_path_factory.mktemp("train")
    write_checkpoint(folder / "hf", config, seed=0)
    write_processor_files(folder / "hf", config)
    write_clip(folder / "clip.mp4", seconds=2, size=(160, 96))
    samples: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": ANSWERS[i % 4]}]}
        for i in range(8)
    ]
    for sample in samples[:3]:
        sample["videos"] = ["clip.mp4"]
    (folder / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))
    return folder


DATA = {"workers": 0, "media": {"min_pixels": 784, "max_pixels": 24 * 784}}

# A step is the gradient.
PLAIN = {"lr": 1e3, "schedule": "constant", "warmup": 0, "betas": [0, 0], "eps": 1e3, "clip": 0, "indexer_clip": 0}


def stage(**values) -> StageConfig:
    batch = {"tokens": 512, "length": 256, "row": 256, "images": {96: 4}} | values.pop("batch", {})
    given = {
        "train": ["*"],
        "loss": {"kl": 0.1},
        "optimizer": {"lr": 3e-3, "schedule": "constant", "warmup": 0},
        "steps": 6,
        "remat": "none",
        "checkpoint_every": 2,
        "data": DATA,
    }
    return StageConfig.from_dict(given | {"batch": batch} | values)


@pytest.fixture(scope="module")
def trainer(folder):
    """Makes a trainer and its batches."""

    def make(config: StageConfig, rules: MeshRules | None = None, steps: int = 20):
        rules = rules or MeshRules.single_device()
        model_config = KeyeConfig.from_file(folder / "hf")
        processor = Processor.from_checkpoint(folder / "hf", model_config, defaults=dict(config.data.media))
        model = load_model(folder / "hf", config, rules)
        step = StepSharding.prefill(rules)
        batches = FileBatches(
            *(folder / "data.jsonl", processor, model_config, config),
            groups=step.size(step.batch),
            shuffle=config.data.shuffle,
        )
        return Trainer(model, config, train_options(config, processor), rules, steps), batches

    return make


@contextlib.contextmanager
def before_batch(number: int, do: Callable[[], None]) -> Iterator[None]:
    """Does something before a batch of that number, from 1, is taken."""
    taken, numbers = FileBatches.__next__, itertools.count(1)

    def take(batches):
        if next(numbers) == number:
            do()
        return taken(batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileBatches, "__next__", take)
        yield


def assert_same_change(before, found, expected):
    """Weights changed alike, to rounding."""
    for path, value in before.items():
        wanted = expected[path] - value
        np.testing.assert_allclose(found[path] - value, wanted, atol=5e-3 * np.abs(wanted).max() + 1e-9, err_msg=path)


def host_weights(trainer):
    """A copy of the weights that train."""
    return {path: np.array(value) for path, value in trainer.state.weights.items()}


def losses(trainer, batches, steps):
    return [float(trainer.train(batches)["language"]) for _ in range(steps)]


@pytest.mark.slow
class TestSteps:
    def test_the_loss_falls_and_a_step_is_compiled_once(self, trainer, compiled):
        made, batches = trainer(stage())
        found = losses(made, batches, 20)
        assert np.mean(found[-4:]) < 0.5 * found[0]
        assert compiled.count("jit(train)") == 1

    def test_only_what_trains_changes_and_has_moments(self, trainer, folder):
        made, batches = trainer(stage(train=["projector"], loss={}))
        before = host_weights(made)
        assert before.keys() == {
            f"projector.{name}"
            for name in ("norm.weight", "norm.bias", "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
        }
        moments = [leaf.size for leaf in jax.tree.leaves(made.state.moments) if leaf.ndim]
        assert sum(moments) == 2 * sum(value.size for value in before.values())
        losses(made, batches, 1)
        assert all((host_weights(made)[path] != value).any() for path, value in before.items())

    def test_batches_that_are_added_equal_a_larger_one(self, trainer):
        """Two batches of unlike numbers of targets, and both in one."""
        data = DATA | {"shuffle": False, "lookahead": 1}
        small = stage(data=data, optimizer=PLAIN, batch={"tokens": 512, "accumulation": 2})
        large = stage(data=data, optimizer=PLAIN, batch={"tokens": 1024, "images": {96: 8}})
        (one, its_batches), (other, others) = trainer(small), trainer(large)
        before = host_weights(one)
        np.testing.assert_allclose(losses(one, its_batches, 1), losses(other, others, 1), rtol=1e-5)
        assert_same_change(before, host_weights(one), host_weights(other))

    def test_low_rank_pairs_learn_and_weights_stay(self, trainer):
        lora = {"targets": ["decoder.layers.*.attention", "decoder.layers.*.moe", "!*.router"], "rank": 4}
        optimizer = {"lr": 1e-2, "warmup": 0}
        made, batches = trainer(stage(train=[], lora=lora, loss={}, optimizer=optimizer, scan_layers=True))
        assert all(".lora_" in path for path in made.state.weights)
        found = losses(made, batches, 20)
        assert np.mean(found[-4:]) < 0.8 * found[0]


@pytest.mark.slow
def test_indexers_alone_are_compared_by_their_divergence(trainer):
    config = stage(train=["decoder.layers.*.indexer"], loss={"language": False, "kl": 1.0}, attention="dense")
    made, batches = trainer(config)
    found = made.evaluate(itertools.islice(batches, 1))
    assert found["loss"] == found["kl"] > 0


def run(folder, output, config=None, **settings):
    return session.train(
        config or stage(),
        source="stage",
        checkpoint=folder / "hf",
        output=output,
        data=folder / "data.jsonl",
        **settings,
    )


def weights(folder, output, which="last"):
    """The weights of a run's checkpoint."""
    made = run(folder, output, export=output / which, export_step=which)
    return made.step, load_params(output / which, KeyeConfig.from_file(folder / "hf"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The weights that a run in one sitting ends with."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder, output).finished
    return jax.tree.leaves(weights(folder, output))


class TestRuns:
    def test_a_run_that_was_stopped_ends_with_the_same_bits(self, folder, whole, tmp_path):
        """Where it stands it is exported, which changes nothing."""
        first = run(folder, tmp_path / "parts", stop_after=1e-9)
        assert (first.step, first.finished) == (0, False)

        # The third step's samples end the process, as a signal would.
        def interrupt():
            os.kill(os.getpid(), signal.SIGTERM)

        with before_batch(3, interrupt):
            second = run(folder, tmp_path / "parts", export=tmp_path / "end")
        assert (second.step, second.finished, second.signal) == (3, False, signal.SIGTERM)
        assert not (tmp_path / "end").exists()
        start = load_params(folder / "hf", KeyeConfig.from_file(folder / "hf"))
        for which, step in (("2", 2), ("3", 3)):
            made, found = weights(folder, tmp_path / "parts", which)
            assert made == step
            assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (found, start)), strict=True))
            start = found
        assert run(folder, tmp_path / "parts").finished
        found = jax.tree.leaves(weights(folder, tmp_path / "parts"))
        assert all(np.all(a == b) for a, b in zip(found, whole, strict=True))

    def test_a_run_that_was_killed_loses_what_came_after_its_last_checkpoint(self, folder, whole, tmp_path):
        def die():
            raise RuntimeError("killed")

        with before_batch(4, die), pytest.raises(RuntimeError, match="killed"):
            run(folder, tmp_path / "killed")
        run(folder, tmp_path / "killed")
        found = jax.tree.leaves(weights(folder, tmp_path / "killed"))
        assert all(np.all(a == b) for a, b in zip(found, whole, strict=True))
        lines = [json.loads(line) for line in (tmp_path / "killed" / "measures.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]

    def test_evaluation_and_export(self, folder, tmp_path):
        config = stage(steps=2, evaluate_every=1, checkpoint_every=0)
        ended = run(folder, tmp_path / "run", config, evaluation=folder / "data.jsonl", export=tmp_path / "out")
        assert ended.finished
        lines = [json.loads(line) for line in (tmp_path / "run" / "measures.jsonl").read_text().splitlines()]
        assert [line["kind"] for line in lines] == ["train", "evaluation"] * 2
        assert lines[3]["loss"] < lines[1]["loss"] and 0 < lines[3]["recall"] <= 1
        # The indexers' KL divergence does not decide which is best.
        assert all(line["loss"] == line["language"] and line["kl"] > 0 for line in (lines[1], lines[3]))
        assert {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()} == {1, 2}
        assert {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"} <= {
            file.name for file in (tmp_path / "out").iterdir()
        }

    def test_only_a_run_has_a_checkpoint_to_export(self, folder, tmp_path):
        with pytest.raises(UserError, match=r"--output is .*; it must be the folder of a run"):
            run(folder, tmp_path / "none", export=tmp_path / "out", export_step="last")
        assert not (tmp_path / "none").exists()

    def test_epochs_are_counted_before(self, folder, tmp_path):
        config = dataclasses.replace(stage(checkpoint_every=0), steps=None, epochs=1.0)
        ended = run(folder, tmp_path / "run", config)
        assert ended.finished and ended.step == 4

    def test_an_adapter_merged_is_the_export_and_a_run_goes_on_from_it(self, folder, tmp_path):
        from convert import convert

        targets = ["decoder.layers.*.attention.q_proj", "decoder.layers.*.moe.down_proj"]
        lora = {"targets": targets, "rank": 2}
        config = stage(train=[], lora=lora, loss={}, steps=2)
        run(folder, tmp_path / "run", config, export=tmp_path / "out")
        convert(folder / "hf", tmp_path / "merged", merge_lora=tmp_path / "run" / "adapter")
        model = KeyeConfig.from_file(folder / "hf")
        exported, merged = load_params(tmp_path / "out", model), load_params(tmp_path / "merged", model)
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(exported), jax.tree.leaves(merged), strict=True))
        adapter = tmp_path / "run" / "adapter"
        loaded = load_model(folder / "hf", config, MeshRules.single_device(), adapter=adapter)
        for name, value in from_adapter(read_adapter(adapter, model), model).items():
            assert np.any(value) and (np.asarray(loaded.trained[name]) == value).all()
        for other, reason in (
            ({"rank": 3}, "lora has the rank 3; the adapter has 2, and they must agree"),
            ({"alpha": 1.0}, "lora has the scale 0.5; the adapter has 16, and they must agree"),
            ({"targets": [*targets, "decoder.layers.*.attention.o_proj"]}, "only the stage has a pair for decoder."),
        ):
            wrong = stage(train=[], lora=lora | other, loss={}, steps=1)
            with pytest.raises(UserError, match=reason):
                load_model(folder / "hf", wrong, MeshRules.single_device(), adapter=adapter)
        with pytest.raises(UserError, match="lora is missing; --adapter is given"):
            run(folder, tmp_path / "wrong", stage(), adapter=adapter)


def test_the_share_of_tokens_that_select(trainer):
    _, batches = trainer(stage())
    batch = next(batches)
    lengths = [int(batch.count[batch.sequence == each].sum()) for each in set(batch.sequence[batch.count > 0])]
    over = sum(max(0, length - 64) for length in lengths)
    assert over > 0 and selecting_share([batch, batch], 64) == over / sum(lengths)
    assert selecting_share([batch], 256) == 0


def test_moments_lie_as_their_weights_do_and_are_restored_there(trainer, folder, tmp_path):
    sharding = ShardingConfig.from_dict({"mesh": {"x": 4}, "rules": {"experts": "x", "parameters": "x"}})
    rules = MeshRules.create(sharding, KeyeConfig.from_file(folder / "hf"))
    state = trainer(stage(), rules)[0].state
    moments = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.moments)}
    query = "decoder.layers.0.attention.q_proj.weight"
    own = [leaf for path, leaf in moments.items() if query in path]
    assert len(own) == 2 and {leaf.sharding for leaf in own} == {state.weights[query].sharding}
    assert own[0].addressable_shards[0].data.size == own[0].size // 4
    checkpoints = RunCheckpoints(tmp_path / "run", {}, keep=1)
    checkpoints.save(1, (state.weights, state.moments), {})
    found = checkpoints.restore((state.weights, state.moments))
    checkpoints.close()
    assert found is not None
    for got, expected in zip(*map(jax.tree.leaves, (found[1], (state.weights, state.moments))), strict=True):
        assert got.sharding == expected.sharding and len(got.sharding.device_set) == 4
        np.testing.assert_array_equal(got, expected)


class TestMistakes:
    def test_a_weight_cannot_train_and_have_a_pair(self, trainer):
        with pytest.raises(UserError, match="a weight with a pair is frozen"):
            trainer(stage(lora={"targets": ["decoder.layers.0.attention"]}))

    @pytest.mark.slow
    def test_a_loss_that_is_not_finite_ends_the_run(self, folder, tmp_path):
        config = stage(optimizer={"lr": 1e30, "warmup": 0, "clip": 0, "indexer_clip": 0})
        with pytest.raises(UserError, match="is not finite"):
            run(folder, tmp_path / "run", config)

    def test_experts_whose_columns_are_split(self, trainer, folder):
        sharding = ShardingConfig.from_dict({"mesh": {"x": 2}, "rules": {"expert_hidden": "x"}})
        rules = MeshRules.create(sharding, KeyeConfig.from_file(folder / "hf"))
        with pytest.raises(UserError, match="expert_hidden"):
            trainer(stage(), rules)


# One sample for each of at most eight groups of devices, so that all take the same ones.
EIGHT_SAMPLES = stage(
    optimizer=PLAIN,
    batch={"tokens": 2048, "row": 64, "samples": 8, "images": {96: 16}},
    data=DATA | {"lookahead": 8},
)


@pytest.fixture(scope="module")
def step_of_one(trainer):
    """Of one device: its weights before a step, the loss, and the weights after it."""
    made, batches = trainer(EIGHT_SAMPLES)
    before = host_weights(made)
    loss = losses(made, batches, 1)
    return before, loss, host_weights(made)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "rules", "scan"),
    [
        ({"x": 8}, {"batch": "x", "parameters": "x"}, False),
        ({"x": 4}, {"query_sequence": "x", "experts": "x", "vision_patches": "x", "vocab": "x"}, False),
        ({"y": 2, "x": 4}, {"batch": "y", "query_sequence": "x", "experts": "x", "parameters": ["y", "x"]}, True),
    ],
    ids=["data", "experts", "both, layers in a loop"],
)
def test_several_devices_make_the_step_of_one(trainer, folder, step_of_one, mesh, rules, scan):
    sharding = ShardingConfig.from_dict({"mesh": mesh, "rules": rules})
    devices = MeshRules.create(sharding, KeyeConfig.from_file(folder / "hf"))
    several, batches = trainer(dataclasses.replace(EIGHT_SAMPLES, scan_layers=scan), devices)
    before, expected, after = step_of_one
    np.testing.assert_allclose(losses(several, batches, 1), expected, rtol=1e-5)
    assert_same_change(before, host_weights(several), after)
