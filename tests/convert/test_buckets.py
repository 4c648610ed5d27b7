"""Checkpoints in buckets of both kinds, in stand-ins that answer as their servers do."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import convert
from convert import buckets, sinks, synthetic
from convert.inspection import inspect
from convert.orbax_layout import flatten
from convert.storage import BucketError
from keye_jax.cli import app, run
from keye_jax.errors import UserError
from tests.compiler_flags import COMPILER_FLAGS
from tests.convert import stand_in_buckets
from tests.convert.convert_helpers import ROOT, contents, greedy_tokens, small_config, write

GROUP = 500_000


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    write(directory / "safetensors", layers=1)
    (directory / "safetensors" / "tokenizer_config.json").write_text("{}")
    return directory / "safetensors"


@pytest.fixture(scope="module")
def expected(source):
    return flatten(convert.load_params(source, small_config(1)))


@pytest.fixture(params=["gs", "s3"])
def bucket(request, tmp_path, monkeypatch):
    with stand_in_buckets.serve(request.param) as served:
        for name, value in served.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(sinks, "LARGE_BYTES", GROUP)
        monkeypatch.setattr(sinks, "GROUP_BYTES", GROUP)
        yield served


def check_equal(params, expected):
    found = flatten(params)
    assert found.keys() == expected.keys()
    assert all(isinstance(array, jax.Array) for array in found.values())
    assert all(np.array_equal(np.asarray(found[path]), np.asarray(expected[path])) for path in expected)


def test_there_and_back(bucket, source, expected, tmp_path):
    place = f"{bucket.scheme}://made/some where"
    done = convert.convert(source, f"{place}/orbax")
    assert (done.destination, done.kind) == (f"{place}/orbax", "orbax")
    assert bucket.writes[0] == "some where/orbax/conversion.json"
    assert bucket.writes[-1] == "some where/orbax/checkpoint.json"
    # Orbax itself reads a copy of what was written.
    bucket.download("some where/orbax", tmp_path / "copy")
    check_equal(convert.load_params(tmp_path / "copy", small_config(1), verify_checksums=True), expected)
    check_equal(convert.load_params(f"{place}/orbax", small_config(1), verify_checksums=True), expected)
    # Shards of 1 MB, and one larger tensor.
    convert.convert(f"{place}/orbax/", f"{place}/back", shard_size=1_000_000)
    check_equal(convert.load_params(f"{place}/back", small_config(1)), expected)
    assert {convert.kind_of(f"{place}/{name}") for name in ("orbax", "back")} == {"orbax", "safetensors"}
    assert [inspect(f"{place}/{name}", check=True).problems for name in ("orbax", "back")] == [[], []]
    convert.convert(f"{place}/back", tmp_path / "orbax")
    convert.convert(f"{place}/orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    assert (tmp_path / "back" / "tokenizer_config.json").read_text() == "{}"
    convert.convert(source, f"{place}/back", overwrite=True)
    assert convert.kind_of(f"{place}/back") == "orbax"


def test_a_conversion_that_breaks_off_continues(bucket, source, tmp_path):
    url = f"{bucket.scheme}://made/orbax"
    bucket.fail_after = 12
    with pytest.raises(UserError, match=rf"access is denied.*{url} keeps the tensors written so far"):
        convert.convert(source, url)
    bucket.fail_after = None
    with pytest.raises(UserError, match=f"{url} is an unfinished conversion"):
        convert.load_params(url, small_config(1))
    write(tmp_path / "other", layers=1, seed=5)
    with pytest.raises(UserError, match="an unfinished conversion of another source"):
        convert.convert(tmp_path / "other", url)
    kept = {name for name in bucket.objects if "/d/" in name}
    done = convert.convert(source, url)
    assert done.continued > 0 and kept & bucket.objects.keys()
    bucket.download("orbax", tmp_path / "copy")
    convert.convert(tmp_path / "copy", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_two_at_once(bucket, source, monkeypatch):
    from convert.bucket_sink import BucketStaging

    url = f"{bucket.scheme}://made/orbax"
    first = BucketStaging(buckets.Bucket(url), "one", overwrite=False)
    BucketStaging(buckets.Bucket(url), "one", overwrite=False)
    with pytest.raises(UserError, match="another process is working on this conversion"):
        first.record(["a"], None)


def test_damage_in_a_bucket(bucket, source):
    url = f"{bucket.scheme}://made/a"
    bucket.upload("a", source)
    convert.convert(url, f"{bucket.scheme}://made/orbax")
    largest = max(
        (name for name in bucket.objects if name.startswith("orbax/")), key=lambda n: len(bucket.objects[n][0])
    )
    url, name = f"{bucket.scheme}://made/orbax", largest.removeprefix("orbax/")
    whole = bucket.objects[largest][0]
    load = functools.partial(convert.load_params, url, small_config(1))
    for data, message in (
        (whole[:1000] + bytes([whole[1000] ^ 4]) + whole[1001:], "its content is damaged"),
        (whole + b"1", "it is too long|bytes; it must have"),
        (whole[:-1], "it is truncated"),
        (None, "it is missing"),
    ):
        del bucket.objects[largest]
        if data is not None:
            bucket.put(largest, data)
        for verify in (True, False) if data is None or len(data) != len(whole) else (True,):
            with pytest.raises(UserError, match=f"^{url}: {name}: .*({message})[^\n]*$"):
                load(verify_checksums=verify)


def test_a_truncated_safetensors_file(bucket, source):
    bucket.upload("a", source)
    bucket.put("a/model.safetensors", bucket.objects["a/model.safetensors"][0][:-7])
    with pytest.raises(UserError, match=r"model.safetensors: it is truncated"):
        convert.load_params(f"{bucket.scheme}://made/a", small_config(1))


def test_commands(bucket, source, capsys):
    url = f"{bucket.scheme}://made/a"
    bucket.upload("a", source)
    assert run(app, ["inspect", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "safetensors"
    for arguments, message in (
        (["inspect", f"{bucket.scheme}://made/nothing"], "made/nothing does not exist, or nothing is in it"),
        (["inspect", "foo://made/a"], "foo://made/a has the scheme foo://"),
        (["convert", url, f"{url}/b"], "overlap"),
        (["convert", url, "hdfs://made/b"], "the scheme hdfs://"),
        (["convert", url, f"{bucket.scheme}://made"], "names no place in a bucket"),
        (["verify", "--checkpoint", url, "--golden", f"{url}/x.npz"], "must be a path of this machine"),
    ):
        assert run(app, arguments) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and message in err, err


def test_what_a_stranger_put_there(bucket, source, tmp_path):
    """Damaged and hostile small files are one sentence, also those that only this project writes."""
    bucket.upload("a", source)
    url = f"{bucket.scheme}://made"
    convert.convert(f"{url}/a", f"{url}/orbax")
    deep = b"[" * 100_000
    huge = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1%s]}}' % (b"0" * 30)
    names = next(name for name in bucket.objects if name.endswith("/_METADATA"))
    for name, data, message in (
        ("a/model.safetensors", len(huge).to_bytes(8, "little") + huge, "model.safetensors: it is truncated"),
        ("a/model.safetensors", len(deep).to_bytes(8, "little") + deep, "model.safetensors: it is truncated"),
        ("a/config.json", deep, "config.json has lists or objects 100,000 levels deep"),
        ("orbax/checkpoint.json", deep, "checkpoint.json has lists or objects 100,000 levels deep"),
        ("orbax/checkpoint.json", None, ""),
        (names, b"{}", "_METADATA does not say the names of the arrays"),
        (names, b'{"tree_metadata": {"(": 1}}', "_METADATA does not say the names of the arrays"),
    ):
        before = bucket.objects.pop(name)[0]
        if data is None:
            continue
        bucket.put(name, data)
        with pytest.raises(UserError, match=message):
            convert.convert(f"{url}/{name.partition('/')[0]}", tmp_path / "to")
        bucket.put(name, before)
    bucket.put("b/conversion.json", deep)
    with pytest.raises(UserError, match=f"{url}/b/conversion.json is in the way"):
        convert.convert(f"{url}/a", f"{url}/b")
    # What a console makes of a new folder is nothing.
    bucket.put("c/", b"")
    convert.convert(f"{url}/a", f"{url}/c")
    # The marker of a directory of the cache says nothing elsewhere.
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / buckets.MARKER).write_text(json.dumps({"url": f"{url}/orbax"}))
    bucket.requests.clear()
    convert.load_params(copy, small_config(1))
    assert buckets.shown(copy) == str(copy) and not bucket.requests


def test_a_server_that_is_lost(bucket, source, capsys, monkeypatch):
    """Whatever the command is doing, the end is one line."""
    bucket.upload("a", source)
    url = f"{bucket.scheme}://made"
    convert.convert(source, f"{url}/orbax")

    def lost(*_):
        raise BucketError("the server is lost")

    for method, arguments in (
        ("sizes", ["inspect", f"{url}/orbax"]),
        ("read_into", ["convert", "--check-finite", f"{url}/a", f"{url}/to"]),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(buckets.Bucket, method, lost)
            assert run(app, arguments) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and "the server is lost" in err


LOAD = """
import json, sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from convert import load_params
from convert.orbax_layout import flatten
from keye_jax.config import KeyeConfig
from keye_jax.model.params import parameter_shardings
from keye_jax.runtime import distributed
from keye_jax.sharding import MeshRules, ShardingConfig
from tests.convert.convert_helpers import greedy_tokens

url, config, port, process, out = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
distributed.start(f"localhost:{port}", 4, int(process))
config = KeyeConfig.from_file(config)
rules = {"experts": "a", "vocab": "a"}
sharding = ShardingConfig.from_dict({"mesh": {"a": 4}, "rules": rules})
rules = MeshRules.create(sharding, config)
params = load_params(url, config, shardings=parameter_shardings(config, rules))
whole = {
    ".".join(path): multihost_utils.process_allgather(array, tiled=True) for path, array in flatten(params).items()
}
if process == "0":
    np.savez(out, **whole)
print(json.dumps(greedy_tokens(config, params, rules)[0]), file=open(f"{out}.{process}", "w"))
distributed.finish()
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_four_processes_restore_a_checkpoint_read_their_parts_and_answer_alike(scheme, tmp_path):
    """Prints the bytes that each process read, with `-s`."""
    config = dataclasses.replace(small_config(1), hidden_size=512, moe_intermediate_size=512, num_experts=8)
    synthetic.write_checkpoint(tmp_path / "source", config, dtype="float32")
    params = convert.load_params(tmp_path / "source", config)
    expected, (tokens, leads) = flatten(params), greedy_tokens(config, params)
    # The tokens are the same on any machine: each is ahead by more than the rounding.
    assert min(leads) > 1e-3
    with contextlib.ExitStack() as opened:
        # Each process has a door of its own to the same bucket, which counts what goes through it.
        doors = [opened.enter_context(stand_in_buckets.serve(scheme)) for _ in range(4)]
        for door in doors[1:]:
            door.share(doors[0])
        given = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILER_FLAGS, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        environment = os.environ | given
        url = f"{scheme}://made/orbax"
        command = [sys.executable, "-m", "convert", str(tmp_path / "source"), url]
        subprocess.run(command, env=environment | doors[0].environment, cwd=ROOT, check=True, timeout=200)
        total = sum(len(data) for data, _ in doors[0].objects.values())
        with socket.socket() as held:
            held.bind(("localhost", 0))
            port = held.getsockname()[1]
        for door in doors:
            door.sent.clear()
        arguments = [url, str(tmp_path / "source" / "config.json"), str(port)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", LOAD, *arguments, str(number), str(tmp_path / "whole.npz")],
                env=environment | door.environment | {"PYTHONPATH": str(ROOT)},
                cwd=ROOT,
            )
            for number, door in enumerate(doors)
        ]
        assert [process.wait(timeout=600) for process in processes] == [0] * 4
        read = [sum(door.sent.values()) for door in doors]
        print(f"{scheme}: {total:,} bytes in the bucket; read by each process: {', '.join(f'{n:,}' for n in read)}")
    with np.load(tmp_path / "whole.npz") as whole:
        assert len(whole.files) == len(expected)
        for path, array in expected.items():
            assert np.array_equal(whole[".".join(path)], np.asarray(array)), path
    answers = [json.loads((tmp_path / f"whole.npz.{number}").read_text()) for number in range(4)]
    print(f"{scheme}: tokens {tokens} of one process; of the four: {answers}")
    assert answers == [tokens] * 4
    assert max(read) < 0.45 * total
