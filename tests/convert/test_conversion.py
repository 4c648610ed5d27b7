"""Round trips keep every bit, and the files beside the weights."""

import hashlib
import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint.experimental import v1 as ocp

import convert
from convert import mapping, orbax_io, orbax_layout, sinks, synthetic
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from tests.convert.convert_helpers import (
    GOLDEN,
    ROOT,
    contents,
    edit,
    equal_bits,
    run_cli,
    run_python,
    small_config,
    write,
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shard_size", [5_000_000_000, 1_000_000], ids=["one_file", "shards"])
def test_round_trip(tmp_path, dtype, shard_size):
    write(tmp_path / "source", dtype=dtype, shard_size=shard_size)
    done = convert.convert(tmp_path / "source", tmp_path / "orbax", check_finite=True)
    assert (done.kind, done.continued) == ("orbax", 0)
    done = convert.convert(tmp_path / "orbax", tmp_path / "back", shard_size=shard_size, check_finite=True)
    assert done.kind == "safetensors"
    expected = contents(tmp_path / "source")
    assert contents(tmp_path / "back") == expected
    assert done.tensors == len(expected) and done.nbytes == sum(len(data) for _, _, data in expected.values())
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1 or shard_size > 1_000_000
    assert not list(tmp_path.glob("*.partial"))


def test_every_bit_pattern_survives(tmp_path):
    config = write(tmp_path / "source")
    bits = np.arange(2**16, dtype=np.uint16)

    def all_patterns(arrays):
        table = arrays["visual.vision_model.embeddings.packing_position_embedding.weight"]
        arrays["visual.vision_model.embeddings.packing_position_embedding.weight"] = (
            np.resize(bits, table.shape).astype(np.uint16).view(ml_dtypes.bfloat16)
        )
        embedding = np.resize(bits, (config.vocab_size, config.hidden_size)).astype(np.uint16)
        arrays["model.embed_tokens.weight"] = embedding.view(ml_dtypes.bfloat16)

    edit(tmp_path / "source", all_patterns)
    convert.convert(tmp_path / "source", tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "source")


def test_dtypes_may_differ_between_tensors(tmp_path):
    write(tmp_path / "source")
    edit(tmp_path / "source", lambda arrays: arrays.update({"model.norm.weight": np.ones(128, np.float32)}))
    convert.convert(tmp_path / "source", tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "source")


def test_per_expert_layout(tmp_path):
    write(tmp_path / "fused")
    write(tmp_path / "per_expert", expert_layout="per_expert", shard_size=1_000_000)
    assert any(".experts.3.up_proj.weight" in name for name in contents(tmp_path / "per_expert"))
    convert.convert(tmp_path / "per_expert", tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "fused")


@pytest.mark.parametrize("name", ["a", "b"])
def test_golden_checkpoints(tmp_path, name):
    convert.convert(GOLDEN / name, tmp_path / "orbax", check_finite=True)
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(GOLDEN / name)
    assert (tmp_path / "back" / "config.json").read_bytes() == (GOLDEN / name / "config.json").read_bytes()


def test_side_files_travel_and_others_stay(tmp_path):
    source = tmp_path / "source"
    write(source, shard_size=1_000_000)
    carried = {
        *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja"),
        *("generation_config.json", "preprocessor_config.json", "LICENSE", "README.md"),
    }
    for name in (*carried, "modeling_keye.py", "pytorch_model.bin", "picture.png"):
        (source / name).write_text(f"content of {name}")
    convert.convert(source, tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    for directory, own in ((tmp_path / "orbax", {"params"}), (tmp_path / "back", set())):
        names = {path.name for path in directory.iterdir() if "safetensors" not in path.name}
        assert names == carried | own | {"config.json", "checkpoint.json"}
        assert all((directory / name).read_text() == f"content of {name}" for name in carried)


def test_ignored_tensors_are_left_behind(tmp_path):
    write(tmp_path / "source")
    before = contents(tmp_path / "source")
    ignored = {"visual.vision_model.head.probe": np.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)}
    edit(tmp_path / "source", lambda arrays: arrays.update(ignored))
    convert.convert(tmp_path / "source", tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_unused_table_may_be_absent(tmp_path):
    write(tmp_path / "source")
    name = "visual.vision_model.embeddings.packing_position_embedding.weight"
    edit(tmp_path / "source", lambda arrays: arrays.pop(name))
    convert.convert(tmp_path / "source", tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "source")


def test_orbax_restores_it_without_us(tmp_path):
    config = write(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "orbax")
    restored = orbax_layout.flatten(ocp.load(tmp_path / "orbax" / "params"))
    assert restored.keys() == {tensor.path for tensor in mapping.rows(config)}
    for tensor in mapping.rows(config):
        expected = synthetic.random_tensor(tensor, 0, np.dtype(ml_dtypes.bfloat16))
        assert equal_bits(restored[tensor.path], expected)


def test_experts_are_stored_one_a_chunk(tmp_path):
    (tmp_path / "groups").mkdir()
    writer = orbax_io.OrbaxWriter(tmp_path / "groups")
    writer.save(
        {("experts",): np.ones((4, 1024, 512), ml_dtypes.bfloat16), ("other",): np.ones((4, 64, 64), np.float32)}
    )
    writer.finish(tmp_path / "params")
    metadata = ocp.metadata(tmp_path / "params").metadata
    assert metadata["experts"].storage_metadata.chunk_shape == (1, 1024, 512)
    assert metadata["other"].storage_metadata.chunk_shape == (4, 64, 64)


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_load_params(tmp_path, kind):
    config = write(tmp_path / "safetensors", expert_layout="per_expert")
    convert.convert(tmp_path / "safetensors", tmp_path / "orbax")
    assert convert.kind_of(tmp_path / kind) == kind
    params = orbax_layout.flatten(convert.load_params(tmp_path / kind, config))
    tensors = {tensor.path: tensor for tensor in mapping.rows(config) if tensor.in_model}
    assert params.keys() == tensors.keys()
    for path, tensor in tensors.items():
        assert isinstance(params[path], jax.Array)
        assert equal_bits(params[path], synthetic.random_tensor(tensor, 0, np.dtype(ml_dtypes.bfloat16)))
    wide = orbax_layout.flatten(convert.load_params(tmp_path / kind, config, dtype="float32"))
    assert all(equal_bits(wide[path], np.asarray(params[path]).astype(np.float32)) for path in tensors)


SHARDED = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import convert
from convert.orbax_layout import flatten, nest
from keye_jax.config import KeyeConfig

source, orbax = sys.argv[1:]
config = KeyeConfig.from_file(source)
mesh = Mesh(jax.devices(), ("expert",))
everywhere, by_expert = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("expert"))
plain = flatten(convert.load_params(source, config))
shardings = nest({path: by_expert if "moe" in path else everywhere for path in plain})
for path in (source, orbax):
    for given in (shardings, everywhere, {"decoder": shardings["decoder"]}):
        loaded = flatten(convert.load_params(path, config, shardings=given))
        assert loaded.keys() == plain.keys()
        for key, array in loaded.items():
            assert (np.asarray(array) == np.asarray(plain[key])).all(), key
    loaded = flatten(convert.load_params(path, config, shardings=shardings))
    experts = loaded["decoder", "layers", "1", "moe", "down_proj"]
    assert [shard.data.shape[0] for shard in experts.addressable_shards] == [4, 4, 4, 4]
"""


def test_load_params_onto_a_mesh(tmp_path):
    write(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "orbax")
    flags = "--xla_force_host_platform_device_count=4"
    run_python(SHARDED, tmp_path / "source", tmp_path / "orbax", XLA_FLAGS=flags)


def test_load_params_of_another_config_is_refused(tmp_path):
    write(tmp_path / "source", layers=1)
    with pytest.raises(
        UserError, match=r"16 tensors are missing: model\.layers\.1\.input_layernorm\.weight, .* and 13 more"
    ):
        convert.load_params(tmp_path / "source", small_config(2))


def test_synthetic_weights_follow_the_seed(tmp_path):
    write(tmp_path / "first", seed=3)
    write(tmp_path / "second", seed=3, shard_size=1_000_000)
    write(tmp_path / "other", seed=4)
    assert contents(tmp_path / "first") == contents(tmp_path / "second") != contents(tmp_path / "other")
    config = KeyeConfig.from_file(tmp_path / "first")
    assert config.to_dict() == small_config().to_dict()
    with pytest.raises(UserError, match="not empty"):
        synthetic.write_checkpoint(tmp_path / "first", config)


def test_progress_counts_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "GROUP_BYTES", 500_000)
    write(tmp_path / "source")
    calls = []
    report = lambda *call: calls.append(call)  # noqa: E731
    done = convert.convert(tmp_path / "source", tmp_path / "orbax", check_finite=True, progress=report)
    for phase in ("check", "convert"):
        counts = [count for name, count, total in calls if name == phase and total == done.nbytes]
        assert len(counts) > 5 and counts == sorted(counts) and counts[-1] == done.nbytes


def test_random_checkpoint_on_the_command_line(tmp_path, capsys):
    tiny = ROOT / "configs" / "model" / "tiny.json"
    assert synthetic.main([str(tiny), str(tmp_path / "made"), "--layers", "2"]) == 0
    write(tmp_path / "expected")
    assert contents(tmp_path / "made") == contents(tmp_path / "expected")
    for arguments in ([str(tiny)], [str(tiny), "made", "--layers", "0"], ["nowhere", "made"], ["--seed", "x"]):
        assert synthetic.main(arguments) == 2
        out, error = capsys.readouterr()
        assert not out and error.startswith("keye-jax: ") and error.count("\n") == 1


def test_command_line_without_arguments_shows_its_help():
    shown = run_cli()
    assert shown.returncode == 0 and not shown.stderr and "[SRC] DST" in shown.stdout


def test_command_line(tmp_path):
    write(tmp_path / "source")
    made = run_cli(tmp_path / "source", tmp_path / "orbax")
    assert made.returncode == 0 and not made.stderr
    assert made.stdout.startswith(f"{tmp_path / 'orbax'}: orbax, ")
    made = run_cli("--check-finite", "--shard-size", 1_000_000, tmp_path / "orbax", tmp_path / "back")
    assert made.returncode == 0 and not made.stderr
    assert contents(tmp_path / "back") == contents(tmp_path / "source")


def test_overwrite_replaces_a_checkpoint(tmp_path):
    write(tmp_path / "source")
    write(tmp_path / "newer", seed=1)
    convert.convert(tmp_path / "source", tmp_path / "orbax")
    (tmp_path / "orbax" / "stale.txt").write_text("")
    convert.convert(tmp_path / "newer", tmp_path / "orbax", overwrite=True)
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "newer")
    assert not (tmp_path / "orbax" / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "newer", "orbax", "source"]


def test_empty_destination_is_used(tmp_path):
    write(tmp_path / "source")
    (tmp_path / "orbax").mkdir()
    convert.convert(tmp_path / "source", tmp_path / "orbax")
    assert convert.kind_of(tmp_path / "orbax") == "orbax"


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(orbax_io.os, "link", refuse)
    monkeypatch.setattr(orbax_io, "_COPIED_BYTES", 0)
    write(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "source")


def test_manifest_lists_every_file(tmp_path):
    write(tmp_path / "source", shard_size=1_000_000)
    convert.convert(tmp_path / "source", tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back", shard_size=1_000_000)
    for directory in (tmp_path / "orbax", tmp_path / "back"):
        files = [path for path in directory.rglob("*") if path.is_file() and path.name != "checkpoint.json"]
        assert json.loads((directory / "checkpoint.json").read_text())["files"] == {
            path.relative_to(directory).as_posix(): {
                "size": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files
        }
    shutil.move(tmp_path / "orbax", tmp_path / "moved")
    convert.convert(tmp_path / "moved", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "source")


def test_manifest_of_the_first_version(tmp_path):
    write(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "orbax")
    sizes = orbax_io.file_sizes(tmp_path / "orbax" / "params")
    manifest = {"format": "keye-jax", "version": 1, "files": sizes}
    path, whole = tmp_path / "orbax" / "checkpoint.json", json.dumps(manifest)
    for damaged in ('{"files": 3}', '{"files": {"a": "1"}}', '{"files": {"a": 1e400}}', "[" * 100_000, whole[:-1]):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"checkpoint.json (is not|has lists)") as error:
            convert.load_params(tmp_path / "orbax", small_config())
        assert "\n" not in str(error.value)
    path.write_text(whole)
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    largest = max(sizes, key=lambda name: sizes[name])
    os.truncate(tmp_path / "orbax" / "params" / largest, 5)
    with pytest.raises(UserError, match=f"params/{largest}: it is truncated"):
        convert.convert(tmp_path / "orbax", tmp_path / "other")
    with pytest.raises(UserError, match="has no checksums to verify"):
        convert.load_params(tmp_path / "orbax", small_config(), verify_checksums=True)
