"""`keye-jax quantize`: what it writes, what it says, and how a stopped run goes on."""

import json

import numpy as np
import pytest

from convert import convert, load_params, quantize
from convert.detect import read_config
from keye_jax.cli import app, run
from keye_jax.errors import UserError
from keye_jax.quantization.quantize import quantize as quantize_matrix
from keye_jax.quantization.schemes import Quantization, standard
from tests.convert.convert_helpers import stop_after


def weight(params, layer: int, *path: str):
    node = params["decoder"]["layers"][str(layer)]
    for key in path:
        node = node[key]
    return node


def test_a_stopped_run_goes_on_and_gives_the_same(golden, tmp_path, monkeypatch):
    """Experts have the values that each matrix has alone; all else keeps its bits; a stop changes nothing."""
    source, quantization = golden / "a", Quantization(standard("int4", 32), standard("fp8"))
    whole = quantize.quantize_checkpoint(source, tmp_path / "whole", quantization)
    stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        quantize.quantize_checkpoint(source, tmp_path / "stopped", quantization)
    monkeypatch.undo()
    with pytest.raises(UserError, match="unfinished conversion of another source, or with other options"):
        quantize.quantize_checkpoint(source, tmp_path / "stopped", Quantization(standard("int8")))
    resumed = quantize.quantize_checkpoint(source, tmp_path / "stopped", quantization)
    assert 0 < resumed.continued < resumed.nbytes == whole.nbytes < whole.before
    assert resumed.errors == whole.errors and len(whole.errors) == 3 * 6

    config, before = read_config(tmp_path / "whole"), load_params(source, read_config(source))
    assert config.quantization == quantization
    for name in ("whole", "stopped"):
        after = load_params(tmp_path / name, config)
        for layer in range(config.num_hidden_layers):
            for expert in range(config.num_experts):
                made = quantize_matrix(
                    np.asarray(weight(before, layer, "moe", "gate_up_proj"))[expert], standard("int4", 32), parts=2
                )
                got = weight(after, layer, "moe", "gate_up_proj")
                np.testing.assert_array_equal(np.asarray(got["values"])[expert], made.values)
                np.testing.assert_array_equal(np.asarray(got["scales"])[expert], made.scales)
            for path in (("moe", "router", "weight"), ("indexer", "q_proj", "weight"), ("input_norm", "weight")):
                np.testing.assert_array_equal(
                    np.asarray(weight(after, layer, *path)), np.asarray(weight(before, layer, *path))
                )


def test_the_command_and_what_verify_and_inspect_say(golden, tmp_path, capsys):
    assert run(app, ["quantize", str(golden / "a"), str(tmp_path / "q"), "--experts", "int8"]) == 0
    out = capsys.readouterr().out
    assert "decoder.layers.2.moe.down_proj" in out and "experts: int8, a scale for all inputs x 1 output" in out
    convert(tmp_path / "q", tmp_path / "st")
    assert json.loads((tmp_path / "st" / "config.json").read_text())["quantization_config"]["format"] == "int-quantized"
    assert run(app, ["inspect", str(tmp_path / "st")]) == 0
    assert "int8" in capsys.readouterr().out
    arguments = ["verify", "--checkpoint", str(tmp_path / "st"), "--golden", str(golden / "a" / "golden.npz")]
    assert run(app, arguments) == 0
    out = capsys.readouterr().out
    assert "6 passed, 0 failed" in out and "agreement" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "int3"], "--experts is 'int3'; it must be 'fp8' or 'int8' or 'int4'"),
        (["--attention", "int4"], "--attention is 'int4'; it must be 'fp8' or 'int8'"),
        (["--experts", "int4", "--group", "0"], "--group is 0; it must be from 2 to 16,384"),
        ([], "give --experts, --attention or both"),
        (["--experts", "fp8", "--calibrate", "x"], "--experts is 'fp8'; --calibrate goes with 'int4'"),
        (["--experts", "int4", "--calibrate", "missing.jsonl"], "--calibrate is missing.jsonl; it must be a file"),
    ],
)
def test_mistakes_are_one_sentence(golden, tmp_path, capsys, arguments, message):
    assert run(app, ["quantize", str(golden / "a"), str(tmp_path / "q"), *arguments]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
