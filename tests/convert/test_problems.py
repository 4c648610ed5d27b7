"""Every bad input gives one clear message and exit code 2, and leaves nothing behind."""

import json
import os
import re
import shutil

import ml_dtypes
import numpy as np
import pytest

import convert
from convert import storage
from convert.reader import INDEX_NAME
from keye_jax.errors import UserError
from tests.convert.convert_helpers import contents, edit, edit_index, run_cli, write

EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Checkpoints that tests copy and spoil."""
    directory = tmp_path_factory.mktemp("pristine")
    write(directory / "single")
    write(directory / "sharded", shard_size=1_500_000)
    write(directory / "per_expert", expert_layout="per_expert")
    convert.convert(directory / "single", directory / "orbax")
    return directory


@pytest.fixture
def copy(pristine, tmp_path):
    def make(kind):
        return shutil.copytree(pristine / kind, tmp_path / "source")

    return make


def problems_of(source, tmp_path, **options):
    """The problems that `convert` lists when it refuses `source`; checks that it left nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as raised:
        convert.convert(source, tmp_path / "made", **options)
    assert sorted(tmp_path.rglob("*")) == before
    first, *lines = str(raised.value).splitlines()
    assert not lines or first == f"{source} has {len(lines)} problems:"
    return [line.strip() for line in lines] or [first.removeprefix(f"{source}: ")]


def test_all_problems_are_listed_together(copy, tmp_path):
    source = copy("single")

    def spoil(arrays):
        del arrays["model.norm.weight"]
        arrays["model.layers.7.mlp.gate.weight"] = np.ones(3, np.float32)
        arrays["lm_head.weight"] = arrays["lm_head.weight"][:-1]
        arrays["mlp_AR.pre_norm.bias"] = arrays["mlp_AR.pre_norm.bias"].astype(np.float64)
        arrays["mlp_AR.pre_norm.weight"] = np.full_like(arrays["mlp_AR.pre_norm.weight"], np.nan)
        arrays["model.embed_tokens.weight"][3, 5] = np.inf

    edit(source, spoil)
    assert problems_of(source, tmp_path, check_finite=True) == [
        "model.norm.weight: it is missing; its shape must be [128]",
        "lm_head.weight: its shape is [2047, 128]; it must be [2048, 128]",
        "mlp_AR.pre_norm.bias: its dtype is F64; it must be BF16 or F32 or F16",
        "model.layers.7.mlp.gate.weight: it is not a tensor of this model",
        "model.embed_tokens.weight: 1 of 262,144 values are infinite or not a number",
        "mlp_AR.pre_norm.weight: 576 of 576 values are infinite or not a number",
    ]


def test_non_finite_values_pass_unless_asked(copy, tmp_path):
    source = copy("single")
    edit(source, lambda arrays: arrays["model.norm.weight"].fill(np.nan))
    convert.convert(source, tmp_path / "orbax")
    assert problems_of(tmp_path / "orbax", tmp_path, check_finite=True) == [
        "model.norm.weight: 128 of 128 values are infinite or not a number"
    ]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_finite_and_not(dtype):
    from convert.checks import count_non_finite

    largest = float(ml_dtypes.finfo(dtype).max)
    values = np.array([0.0, -0.0, largest, -largest, 1e-7, np.inf, -np.inf, np.nan], dtype)
    assert count_non_finite(values) == 3
    assert count_non_finite(values[:5].reshape(5, 1)) == 0


def test_truncated_shard(copy, tmp_path):
    source = copy("sharded")
    shards = sorted(source.glob("model-*.safetensors"))
    os.truncate(shards[1], shards[1].stat().st_size - 1)
    os.truncate(shards[2], 5)
    first, second = problems_of(source, tmp_path)
    assert first.startswith(f"{shards[1].name}: it is truncated: ") and " its header promises " in first
    assert second == f"{shards[2].name}: it is truncated: it has 5 bytes; a header alone has at least 8"


def test_missing_shard(copy, tmp_path):
    source = copy("sharded")
    shard = sorted(source.glob("model-*.safetensors"))[0]
    shard.unlink()
    assert problems_of(source, tmp_path) == [f"{shard.name}: it is missing; the index names it"]


def test_index_names_a_tensor_that_its_shard_lacks(copy, tmp_path):
    source = copy("sharded")
    index = json.loads((source / INDEX_NAME).read_text())["weight_map"]
    wrong = next(file for file in sorted(set(index.values())) if file != index["lm_head.weight"])
    edit_index(source, lambda names: names.update({"lm_head.weight": wrong}))
    assert problems_of(source, tmp_path) == [f"{wrong}: lm_head.weight is missing in it; the index puts it there"]


def test_tensor_in_two_shards(copy, tmp_path):
    source = copy("sharded")
    (source / INDEX_NAME).unlink()
    assert contents(source)
    shards = sorted(source.glob("model-*.safetensors"))
    shutil.copy(shards[0], source / "model-again.safetensors")
    assert all(" is also in " in problem for problem in problems_of(source, tmp_path))


def test_shards_without_an_index(copy, tmp_path):
    source = copy("sharded")
    expected = contents(source)
    (source / INDEX_NAME).unlink()
    convert.convert(source, tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == expected


def test_per_expert_problems(copy, tmp_path):
    source = copy("per_expert")

    def spoil(arrays):
        del arrays[f"{EXPERTS}.3.up_proj.weight"]
        arrays[f"{EXPERTS}.4.gate_proj.weight"] = arrays[f"{EXPERTS}.4.gate_proj.weight"].T.copy()
        arrays[f"{EXPERTS}.16.up_proj.weight"] = arrays[f"{EXPERTS}.0.up_proj.weight"]
        arrays[f"{EXPERTS}.5.down_proj.weight"] = arrays[f"{EXPERTS}.5.down_proj.weight"].astype(np.float32)
        fused = np.ones((16, 128, 128), np.float32)
        arrays["model.layers.1.mlp.experts.gate_up_proj"] = fused

    edit(source, spoil)
    assert problems_of(source, tmp_path) == [
        f"{EXPERTS}.3.up_proj.weight: it is missing; its shape must be [64, 128]",
        f"{EXPERTS}.4.gate_proj.weight: its shape is [128, 64]; it must be [64, 128]",
        f"{EXPERTS}.down_proj: its experts have more than one dtype: BF16 ({EXPERTS}.0.down_proj.weight)"
        f" and F32 ({EXPERTS}.5.down_proj.weight)",
        "model.layers.1.mlp.experts.gate_up_proj: its experts are stored both fused and one by one; only one may be",
        f"{EXPERTS}.16.up_proj.weight: it is not a tensor of this model of 2 layers and 16 experts",
    ]


def test_orbax_file_truncated_or_missing(copy, tmp_path):
    source = copy("orbax")
    data = max(
        (path for path in (source / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    os.truncate(data, data.stat().st_size - 1)
    name = data.relative_to(source).as_posix()
    (problem,) = problems_of(source, tmp_path)
    assert problem.startswith(f"{name}: it is truncated: ")
    data.unlink()
    assert problems_of(source, tmp_path) == [f"{name}: it is missing"]


def test_orbax_data_that_cannot_be_read(copy, tmp_path):
    source = copy("orbax")
    for path in (source / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(bytes(path.stat().st_size))
    (problem,) = problems_of(source, tmp_path)
    assert re.fullmatch(r"\d+ files are damaged, by their SHA-256: params/.*, .*, .* and \d+ more", problem)
    (source / "checkpoint.json").unlink()
    (problem,) = problems_of(source, tmp_path)
    assert re.search(r"cannot be read as an Orbax checkpoint: params/state/d/\w+ is damaged$", problem)


def test_orbax_of_another_config(copy, tmp_path):
    source = copy("orbax")
    (source / "checkpoint.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 2049, "num_hidden_layers": 1}))
    problems = problems_of(source, tmp_path)
    assert problems[1] == "decoder.embed_tokens.weight: its shape is [2048, 128]; it must be [2049, 128]"
    assert problems[0].startswith("16 tensors are not of this model: decoder.layers.1.") and len(problems) == 3
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    problems = problems_of(source, tmp_path)
    assert problems == [
        "16 tensors are missing: decoder.layers.2.input_norm.weight, decoder.layers.2.attention.q_proj.weight, "
        "decoder.layers.2.attention.k_proj.weight and 13 more"
    ]


def test_config_problems(copy, tmp_path):
    source = copy("single")
    (source / "config.json").write_text('{"hidden_size": -1')
    assert "is not JSON" in problems_of(source, tmp_path)[0]
    (source / "config.json").unlink()
    assert "has no config.json" in problems_of(source, tmp_path)[0]


def test_not_enough_space(copy, tmp_path, monkeypatch):
    source = copy("single")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    (problem,) = problems_of(source, tmp_path)
    assert problem.endswith("its filesystem has 1,000 bytes free")


def test_destinations_that_are_refused(copy, tmp_path):
    source = copy("single")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    cases = [
        (source, {}, "holds SRC"),
        (source, {"overwrite": True}, "holds SRC"),
        (tmp_path, {"overwrite": True}, "holds SRC"),
        (tmp_path / "file", {}, "is a file"),
        (tmp_path / "full", {}, "exists and is not empty"),
        (tmp_path / "full", {"overwrite": True}, "is not a checkpoint, so --overwrite does not replace it"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for destination, options, message in cases:
        with pytest.raises(UserError, match=message):
            convert.convert(source, destination, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_kind_of(pristine, tmp_path):
    assert convert.kind_of(pristine / "single") == "safetensors"
    assert convert.kind_of(str(pristine / "orbax")) == "orbax"
    (tmp_path / "file").write_text("")
    for path, message in [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "neither model.safetensors.index.json, nor"),
    ]:
        with pytest.raises(UserError, match=message):
            convert.kind_of(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "made"], "nowhere does not exist; a checkpoint is a directory"),
        (["one", "two", "three"], "the command takes SRC and DST"),
        (["only"], "the command takes SRC and DST"),
        (["--hf", "owner/name", "one", "two"], "with --hf or --modelscope the command takes DST alone"),
        (["--hf", "a/b", "--modelscope", "a/b", "made"], "only one of them can be"),
        (["--revision", "main", "one", "two"], "--revision and --cache-dir belong to"),
        (["--shard-size", "0", "one", "two"], "--shard-size is 0; it must be a positive number of bytes"),
        (["--hf", "no-slash", "made"], "--hf is 'no-slash'; it must be an id such as owner/name"),
        (["--nonsense", "one", "two"], "No such option: --nonsense"),
    ],
)
def test_command_line_mistakes(arguments, message, tmp_path, capsys, monkeypatch):
    from keye_jax.cli import app, run

    monkeypatch.chdir(tmp_path)
    assert run(app, ["convert", *arguments]) == 2
    printed = capsys.readouterr()
    assert not printed.out and message in printed.err and printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_problem_list_on_the_command_line(copy, tmp_path):
    source = copy("single")
    edit(source, lambda arrays: [arrays.pop("model.norm.weight"), arrays.pop("lm_head.weight")])
    failed = run_cli(source, tmp_path / "made")
    assert failed.returncode == 2 and not failed.stdout
    first, *lines = failed.stderr.splitlines()
    assert first == f"keye-jax: {source} has 2 problems:" and len(lines) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
