"""`keye-jax inspect`."""

import json
import os

import pytest

import convert
from convert.detect import read_config
from convert.inspection import inspect
from keye_jax.cli import app, run
from keye_jax.errors import UserError
from tests.convert.convert_helpers import FULL_CONFIG, contents, write


def cli(capsys, *arguments):
    code = run(app, ["inspect", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_full_config(capsys):
    code, out, err = cli(capsys, FULL_CONFIG)
    assert code == 0 and not err
    assert "31,122,082,160 parameters" in out.splitlines()
    assert "3,461,569,536 of the decoder's are active for one token" in out.splitlines()
    total = next(line for line in out.splitlines() if line.startswith("total"))
    assert total.split() == ["total", "1,215", "31,122,082,160", "62,244,164,320"]


def test_parts_add_up():
    found = inspect(FULL_CONFIG)
    assert sum(part.parameters for part in found.parts.values()) == found.total.parameters
    assert found.parts["experts"].parameters == 48 * 128 * 3 * 2048 * 768
    assert found.parts["indexer"].parameters == 48 * (1040 * 2048 + 64 * 2048 + 3 * 64)
    assert found.parts["unused"].parameters == 32768 * 1152
    assert (found.kind, found.files, found.problems) == ("config", 0, [])


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_checkpoints(tmp_path, capsys, kind):
    write(tmp_path / "safetensors", shard_size=1_500_000, expert_layout="per_expert", dtype="float32")
    convert.convert(tmp_path / "safetensors", tmp_path / "orbax")
    expected = sum(len(data) for _, _, data in contents(tmp_path / "safetensors").values())
    found = inspect(tmp_path / kind)
    assert (found.kind, found.problems, found.dtypes) == (kind, [], {"float32": expected})
    assert found.total.nbytes == expected == 4 * found.total.parameters
    assert found.parts == inspect(tmp_path / ("orbax" if kind == "safetensors" else "safetensors")).parts
    code, out, err = cli(capsys, tmp_path / kind)
    assert code == 0 and not err and out.rstrip().endswith("; whole")
    code, out, _ = cli(capsys, tmp_path / kind, "--json")
    values = json.loads(out)
    assert code == 0 and values["total"]["parameters"] == found.total.parameters and values["kind"] == kind


def test_directory_with_a_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(FULL_CONFIG.read_text())
    assert inspect(tmp_path).total == inspect(FULL_CONFIG).total


def test_checkpoint_that_is_not_whole(tmp_path, capsys):
    write(tmp_path / "source", shard_size=1_500_000)
    shard = sorted(tmp_path.glob("source/model-*"))[0]
    os.truncate(shard, 1000)
    code, out, err = cli(capsys, tmp_path / "source")
    assert code == 2 and "NOT whole" in out and f"{shard.name}: it is truncated" in err


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"])
def test_bad_config(tmp_path, capsys, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    code, out, err = cli(capsys, path)
    assert code == 2 and not out and err.startswith("keye-jax: ") and err.count("\n") == 1


def test_nothing_to_inspect(tmp_path):
    with pytest.raises(UserError, match="is not a checkpoint"):
        inspect(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_a_dtype_that_is_not_stated_is_that_of_the_weights(tmp_path, kind):
    write(tmp_path / "safetensors", dtype="float32")
    if kind == "orbax":
        convert.convert(tmp_path / "safetensors", tmp_path / "orbax")
    file = tmp_path / kind / "config.json"
    values = json.loads(file.read_text())
    del values["dtype"]
    file.write_text(json.dumps(values | {"a_new_field": 1}))
    found = read_config(tmp_path / kind)
    assert found.dtype == "float32" and not found.dtype_is_assumed
    assert inspect(tmp_path / kind).notes == ["fields of config.json without effect: a_new_field"]
    assert inspect(file).notes[0] == "config.json does not say the dtype of the weights; bfloat16 is assumed"
