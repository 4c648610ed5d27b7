"""`keye-jax quantize --calibrate`: what matrices are multiplied with, and how scales follow from it."""

import json
import re

import numpy as np
import pytest

from convert import load_params
from convert.synthetic import write_checkpoint
from keye_jax.cli import app, run
from keye_jax.config import KeyeConfig
from keye_jax.engine.checkpoint import load
from keye_jax.jobs.calibration import PromptCalibration
from keye_jax.quantization.quantize import quantize
from keye_jax.quantization.schemes import standard
from keye_jax.runtime.calibration import SAMPLES
from keye_jax.runtime.prefill import Segment
from keye_jax.testing import write_picture, write_processor_files
from tests.convert.convert_helpers import stop_after
from tests.keye_jax.jobs.fake import line
from tests.near_ties import assert_leads, selection_leads

LEAD = 2e-5
"""Of the router's logits, which are computed in float32."""


@pytest.fixture(scope="module")
def asked(tmp_path_factory, golden):
    """A float32 checkpoint, and requests of text and of a picture."""
    directory = tmp_path_factory.mktemp("calibration")
    config = KeyeConfig.from_file(golden / "a")
    write_checkpoint(directory / "model", config, seed=0, dtype="float32")
    write_processor_files(directory / "model", config)
    write_picture(directory / "picture.png", size=(84, 56))
    picture = {"type": "image_url", "image_url": {"url": str(directory / "picture.png")}}
    contents = ["What moves?", [picture, {"type": "text", "text": "What is it?"}], "word " * 50]
    lines = [line(f"id{place}", messages=[{"role": "user", "content": each}]) for place, each in enumerate(contents)]
    (directory / "requests.jsonl").write_bytes(b"".join(lines))
    return directory


@pytest.fixture(scope="module")
def calibration(asked):
    """With what the progress was told."""
    told = []
    made = PromptCalibration(asked / "model", asked / "requests.jsonl", progress=lambda *each: told.append(each))
    return made, made.inputs(), told


def rows_of(asked) -> dict[str, list[list[np.ndarray]]]:
    """The rows of each expert by the path of the weight, from the intermediates of the model, in NumPy.

    Every choice of experts is safe.
    """
    runtime, processor, _ = load(asked / "model")
    params = load_params(asked / "model", runtime.config)["decoder"]["layers"]
    count = runtime.config.num_experts
    paths = [f"decoder.layers.{layer}.moe.{name}_proj" for layer in params for name in ("gate_up", "down")]
    found = {path: [[] for _ in range(count)] for path in paths}
    for request in map(json.loads, (asked / "requests.jsonl").read_text().splitlines()):
        with processor.plan(request["body"]["messages"]) as plan:
            inputs = processor.process(plan)
        embeds = None
        if len(inputs.image_patches):
            scale, shift = processor.pixel_scale, processor.pixel_shift
            embeds = runtime.encode(inputs.image_patches, inputs.image_grids, scale=scale, shift=shift)
        pool, tables = runtime.new_cache(1, len(inputs.input_ids))
        segment = Segment(inputs.input_ids, inputs.positions, tables[0], embeds)
        for _, pool, layers, _ in runtime.forward_with_intermediates(segment, pool):  # noqa: B007, B020
            for number, layer in enumerate(layers):
                moe = params[str(number)]["moe"]
                gate_up, router = np.asarray(moe["gate_up_proj"]), np.asarray(moe["router"]["weight"])
                leads = selection_leads(np.asarray(layer.moe_input) @ router.T, layer.experts.shape[-1])
                assert_leads(leads, LEAD)
                for x, experts in zip(np.asarray(layer.moe_input), np.asarray(layer.experts), strict=True):
                    for expert in experts:
                        gate, up = np.split(x @ gate_up[expert], 2)
                        found[f"decoder.layers.{number}.moe.gate_up_proj"][expert].append(x)
                        inner = gate / (1 + np.exp(-gate)) * up
                        found[f"decoder.layers.{number}.moe.down_proj"][expert].append(inner)
    return found


def test_inputs_are_those_of_the_model(asked, calibration):
    made, inputs, told = calibration
    expected = rows_of(asked)
    assert set(inputs) == set(expected)
    for path, rows in expected.items():
        got = inputs[path]
        np.testing.assert_array_equal(got.count, [len(each) for each in rows])
        every = np.concatenate([np.stack(each) for each in rows if each])
        for expert, each in enumerate(rows):
            squares = np.square(np.stack(each) if each else every).mean(axis=0)
            np.testing.assert_allclose(got.squares[expert], squares, rtol=1e-3, atol=1e-6)
            few = each[:SAMPLES]
            np.testing.assert_allclose(got.samples[expert, : len(few)], np.reshape(few, (len(few), -1)), atol=1e-4)
            assert not got.samples[expert, len(few) :].any()
    assert told[-1] == (made.tokens, made.tokens) and len(told) == 3


def test_a_stopped_run_goes_on_and_gives_the_same(asked, tmp_path, monkeypatch, calibration, capsys):
    def quantized(name: str) -> tuple[int, str, str]:
        arguments = ("--experts", "int4", "--group", "32", "--calibrate", str(asked / "requests.jsonl"))
        code = run(app, ["quantize", str(asked / "model"), str(tmp_path / name), *arguments])
        return code, *capsys.readouterr()

    code, whole, err = quantized("whole")
    assert code == 0 and "of experts for the calibration's inputs" in whole and "tokens" in err
    errors = re.findall(r"(0\.\d+)  \((0\.\d+) without calibration\)", whole)
    assert len(errors) == 6 and all(float(calibrated) < float(without) for calibrated, without in errors)
    stop_after(monkeypatch, 5)
    assert quantized("stopped")[0] == 130
    monkeypatch.undo()
    code, out, _ = quantized("stopped")
    assert code == 0 and out.splitlines()[:-1] == whole.splitlines()[:-1]

    config = KeyeConfig.from_file(asked / "model")
    before = load_params(asked / "model", config)
    for name in ("whole", "stopped"):
        after = load_params(tmp_path / name, KeyeConfig.from_file(tmp_path / name))
        for layer in before["decoder"]["layers"]:
            for weight, parts in (("gate_up_proj", 2), ("down_proj", 1)):
                source, got = (each["decoder"]["layers"][layer]["moe"][weight] for each in (before, after))
                squares = calibration[1][f"decoder.layers.{layer}.moe.{weight}"].squares
                for expert in range(config.num_experts):
                    how = {"parts": parts, "input_squares": squares[expert]}
                    made = quantize(np.asarray(source)[expert], standard("int4", 32), **how)
                    np.testing.assert_array_equal(np.asarray(got["values"])[expert], made.values)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("keye_jax.jobs.calibration.memory_limit_bytes", lambda: 1000)
    arguments = ("--experts", "int4", "--calibrate", str(asked / "requests.jsonl"))
    assert run(app, ["quantize", str(asked / "model"), str(tmp_path / "q"), *arguments]) == 2
    err = capsys.readouterr().err
    assert "--calibrate: line 3: the context does not fit" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it must have at least one line"),
        (b"{}\n", "--calibrate: line 1: custom_id is None"),
        (line("a", messages=[]), "--calibrate: line 1: messages is []"),
        (
            line("a", messages=[{"role": "user", "content": "x " * 9000}]),
            "--calibrate: line 1: the context does not fit",
        ),
    ],
)
def test_files_that_hold_no_prompts(asked, tmp_path, capsys, content, message):
    (tmp_path / "requests.jsonl").write_bytes(content)
    arguments = ("--experts", "int4", "--calibrate", str(tmp_path / "requests.jsonl"))
    assert run(app, ["quantize", str(asked / "model"), str(tmp_path / "q"), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "q").exists()
