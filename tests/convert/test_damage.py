"""Damage to a checkpoint is found, and is one sentence that names the file."""

import json
import shutil

import numpy as np
import pytest

import convert
from convert.checks import raise_problems
from convert.inspection import inspect
from convert.manifest import Manifest
from keye_jax.cli import app, run
from keye_jax.errors import UserError
from tests.convert.convert_helpers import contents, edit, small_config, write


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    write(directory / "source", layers=1)
    (directory / "source" / "tokenizer_config.json").write_text("{}")
    convert.convert(directory / "source", directory / "orbax")
    convert.convert(directory / "orbax", directory / "safetensors", shard_size=1_000_000)
    return directory


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 8]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_every_file_is_held_to_its_checksum(made, tmp_path, kind):
    copy = shutil.copytree(made / kind, tmp_path / "copy")
    manifest = Manifest.read(copy)
    assert manifest is not None and {"config.json", "tokenizer_config.json"} < manifest.files.keys()
    for name in manifest.files:
        file, data = copy / name, (copy / name).read_bytes()
        if not data:
            continue
        file.write_bytes(flip(data))
        expected = f"{name}: its content is damaged: its SHA-256 is not the one in checkpoint.json"
        for refused in (
            lambda: raise_problems(copy, inspect(copy, check=True).problems[:1]),
            lambda: convert.convert(copy, tmp_path / "to"),
            lambda: convert.load_params(copy, small_config(1), verify_checksums=True),
        ):
            with pytest.raises(UserError) as raised:
                refused()
            assert str(raised.value) == f"{copy}: {expected}"
        file.write_bytes(data)
    assert inspect(copy, check=True).problems == [] and not (tmp_path / "to").exists()
    convert.load_params(copy, small_config(1), verify_checksums=True)


@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
@pytest.mark.parametrize("damage", ["zeroed", "lost", "truncated", "unreadable"])
def test_the_largest_file(made, tmp_path, kind, damage):
    copy = shutil.copytree(made / kind, tmp_path / "copy")
    manifest = Manifest.read(copy)
    assert manifest is not None
    name = max(manifest.files, key=lambda name: manifest.files[name].size)
    file = copy / name
    size = file.stat().st_size
    if damage == "zeroed":
        # Half of the file, with its header.
        file.write_bytes(file.read_bytes()[: size // 2] + bytes(size - size // 2))
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    if damage == "unreadable":
        # Opening it fails, as on a bad disk.
        file.symlink_to(file.name)
    plain = damage in ("lost", "truncated")
    for refused in (
        lambda: convert.convert(copy, tmp_path / "to"),
        lambda: convert.load_params(copy, small_config(1), verify_checksums=not plain),
    ):
        with pytest.raises(UserError) as raised:
            refused()
        assert name in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "to").exists() and not (tmp_path / "to.partial").exists()


@pytest.mark.parametrize("file", ["manifest.ocdbt", "_METADATA", "_CHECKPOINT_METADATA", "d"])
@pytest.mark.parametrize("damage", ["flipped", "lost", "emptied"])
def test_parts_of_orbax_without_a_manifest(made, tmp_path, file, damage):
    """Without checksums damage may pass that is in the weights alone; the rest is one sentence."""
    copy = shutil.copytree(made / "orbax", tmp_path / "copy")
    (copy / "checkpoint.json").unlink()
    for path in sorted((copy / "params").rglob("*")):
        if path.is_file() and file in (path.name, path.parent.name):
            data = path.read_bytes()
            path.unlink()
            if damage != "lost":
                path.write_bytes(flip(data) if damage == "flipped" else b"")
    try:
        convert.load_params(copy, small_config(1))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 400, error
    else:
        assert damage == "flipped" or file == "_CHECKPOINT_METADATA"


@pytest.mark.parametrize("damage", ["emptied", "not JSON", "a name with a line in it"])
def test_a_file_that_no_index_describes(made, tmp_path, damage):
    """What is missing because it was there is not said besides."""
    copy = shutil.copytree(made / "source", tmp_path / "copy")
    data = (copy / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    renamed = data[8:end].replace(b'"lm_head.weight"', rb'"lm_head\nweight"')
    new = {
        "emptied": b"",
        "not JSON": data[:8] + b"[" + data[9:],
        "a name with a line in it": len(renamed).to_bytes(8, "little") + renamed + data[end:],
    }
    (copy / "model.safetensors").write_bytes(new[damage])
    with pytest.raises(UserError, match=rf"^{copy}: model\.safetensors: it[^\n]*$"):
        convert.convert(copy, tmp_path / "to")


def test_the_manifest_itself(made, tmp_path):
    copy = shutil.copytree(made / "orbax", tmp_path / "copy")
    manifest = copy / "checkpoint.json"
    values = json.loads(manifest.read_text())
    name = next(iter(values["files"]))
    values["files"][name]["sha256"] = "0" * 64
    for text, message in (
        (json.dumps(values), "checkpoint.json is damaged"),
        ("{", "checkpoint.json is not JSON"),
        ("[" * 100_000, "checkpoint.json has lists or objects 100,000 levels deep"),
        ('{"version": %s}' % ("1" * 5000), "checkpoint.json is not JSON: a number has 5,000 digits"),
        ("[]", "checkpoint.json is not a checkpoint's manifest"),
        ('{"version": 2, "files": {"a": 1}}', "checkpoint.json is not a checkpoint's manifest"),
        ('{"version": 1, "files": {"/dev/zero": 1}}', "checkpoint.json is not a checkpoint's manifest"),
        ('{"version": 1, "files": {"../a": 1}}', "checkpoint.json is not a checkpoint's manifest"),
    ):
        manifest.write_text(text)
        with pytest.raises(UserError, match=message):
            convert.convert(copy, tmp_path / "to")
    manifest.unlink()
    with pytest.raises(UserError, match="has no checksums to verify"):
        convert.load_params(copy, small_config(1), verify_checksums=True)
    assert "it has no checksums to check" in inspect(copy, check=True).problems[0]


def test_commands(made, tmp_path, capsys):
    copy = shutil.copytree(made / "safetensors", tmp_path / "copy")
    assert run(app, ["inspect", "--check", str(copy)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("; whole")
    name = sorted(copy.glob("*.safetensors"))[0].name
    (copy / name).write_bytes(flip((copy / name).read_bytes()))
    assert run(app, ["inspect", str(copy)]) == 0
    capsys.readouterr()
    assert run(app, ["inspect", "--check", str(copy)]) == 2
    _, err = capsys.readouterr()
    assert err == f"  {name}: its content is damaged: its SHA-256 is not the one in checkpoint.json\n"
    golden = tmp_path / "golden.npz"
    np.savez(golden, tokens=np.zeros(1))
    arguments = ["verify", "--checkpoint", str(copy), "--golden", str(golden), "--verify-checksums"]
    assert run(app, arguments) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and f"{name}: its content is damaged" in err


@pytest.mark.parametrize("names", [("model.safetensors",), ("tokenizer.json",), ("config.json", "model.safetensors")])
def test_pointers_of_git_lfs(made, tmp_path, names):
    copy = shutil.copytree(made / "source", tmp_path / "copy")
    for name in names:
        (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 62244164320\n")
    with pytest.raises(UserError, match=r"Git LFS pointers?, without the content; run: git lfs pull$") as raised:
        convert.convert(copy, tmp_path / "to")
    assert names[0] in str(raised.value)


def renamed(prefixes):
    def change(arrays):
        for name in list(arrays):
            new = next((new + name.removeprefix(old) for old, new in prefixes if name.startswith(old)), name)
            arrays[new] = arrays.pop(name)

    return change


@pytest.mark.parametrize(
    "prefixes",
    [
        [("model.", "model.language_model."), ("visual.", "model.visual."), ("mlp_AR.", "model.mlp_AR.")],
        [("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")],
        [("", "module.")],
    ],
)
def test_names_of_other_layouts_are_taken(made, tmp_path, prefixes):
    copy = shutil.copytree(made / "source", tmp_path / "copy")
    edit(copy, renamed(prefixes))
    convert.convert(copy, tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(made / "source")


def test_other_names_are_hinted_at_in_one_line(made, tmp_path):
    copy = shutil.copytree(made / "source", tmp_path / "copy")
    edit(copy, renamed([("", "student.")]))
    with pytest.raises(UserError, match=r"names begin with 'student\.'; without it they are those of this model$"):
        convert.convert(copy, tmp_path / "orbax")
    edit(copy, lambda arrays: arrays.update({"model.norm.weight": arrays["student.model.norm.weight"]}))
    with pytest.raises(UserError, match=r"names begin with 'student\.'"):
        convert.convert(copy, tmp_path / "orbax")
    copy = shutil.copytree(made / "source", tmp_path / "twice")
    edit(copy, lambda arrays: arrays.update({"module.model.norm.weight": arrays["model.norm.weight"]}))
    with pytest.raises(UserError, match=r"module\.model\.norm\.weight: it is the same tensor as model\.norm\.weight"):
        convert.convert(copy, tmp_path / "orbax")
