"""What file systems refuse is one sentence, before the work where it can be told, and the same command continues."""

import errno
import fcntl
import os
import shutil
import socket

import pytest

import convert
from convert import sinks
from keye_jax.cli import app, run
from keye_jax.errors import UserError
from tests.convert import mounts, stand_in_hub
from tests.convert.convert_helpers import contents, run_python, write

GROUP = 500_000


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    write(directory / "safetensors", layers=1, shard_size=2_000_000)
    convert.convert(directory / "safetensors", directory / "orbax")
    return directory


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(sinks, "LARGE_BYTES", GROUP)
    monkeypatch.setattr(sinks, "GROUP_BYTES", GROUP)


# Disks fill up after a part of the tensors is written.
ON_MOUNTS = """
import sys
from pathlib import Path
import convert
from convert import sinks
from keye_jax.errors import UserError
from tests.convert import mounts

sources, disk, expected = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
sinks.LARGE_BYTES = sinks.GROUP_BYTES = {group}
mounts.separate()

def refused(source, target, progress=None):
    try:
        convert.convert(source, target, progress=progress)
    except UserError as error:
        assert str(error).count("\\n") == 0, error
        return str(error)
    raise AssertionError("it was not refused")

def full(phase, done, total):
    if phase == "convert" and done > total // 3 and not (disk / "filler").exists():
        with (disk / "filler").open("wb", buffering=0) as stream:
            try:
                while stream.write(bytes(1 << 16)):
                    pass
            except OSError:
                pass

def without_inodes(phase, done, total):
    if phase == "convert" and done > total // 3 and not (disk / "0").exists():
        try:
            for number in range(10_000):
                (disk / str(number)).touch()
        except OSError:
            pass

for kind in ("safetensors", "orbax"):
    for fault in (full, without_inodes):
        mounts.mount(disk, "size=64m,nr_inodes=2000")
        print(kind, fault.__name__, refused(sources / kind, disk / "made", fault))
        assert not (disk / "made").exists()
        mounts.remount(disk, "size=128m,nr_inodes=20000")
        assert convert.convert(sources / kind, disk / "made").continued > 0
        checked = disk / "made"
        if kind == "safetensors":
            checked = disk / "back"
            convert.convert(disk / "made", checked)
        for file in expected.glob("*.safetensors"):
            assert (checked / "model.safetensors").read_bytes() == file.read_bytes()
mounts.mount(disk, "size=1m")
print("too small", refused(sources / "safetensors", disk / "made"))
mounts.remount(disk, "", read_only=True)
print("read-only from the start", refused(sources / "safetensors", disk / "made"))
print("mount point", refused(sources / "safetensors", disk))
"""


@pytest.mark.skipif(not mounts.allowed(), reason="this process may not mount")
def test_disks_that_fill_up(source, tmp_path):
    write(tmp_path / "whole", layers=1)
    done = run_python(ON_MOUNTS.format(group=GROUP), source, tmp_path / "disk", tmp_path / "whole")
    said = done.stdout.splitlines()
    assert len(said) == 7
    for line in said[:4]:
        assert "no space left on the disk, or no free inodes" in line, line
        assert line.endswith("keeps the tensors written so far, and the same command continues"), line
    assert "needs 13,714,560 bytes and its filesystem has " in said[4]
    assert "Read-only file system" in said[5] and "is a mount point, which cannot be replaced" in said[6]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_errors_in_the_middle(source, tmp_path, monkeypatch, code):
    """A stand-in for disks that cannot be had here: the third write fails."""
    writes = []
    pwrite = os.pwrite

    def failing(descriptor, data, offset):
        writes.append(offset)
        if len(writes) > 8:
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(UserError, match=r"made\.partial keeps the tensors written so far") as raised:
            convert.convert(source / "orbax", tmp_path / "made")
    assert "\n" not in str(raised.value)
    assert convert.convert(source / "orbax", tmp_path / "made").continued > 0
    assert contents(tmp_path / "made") == contents(source / "safetensors")


def test_a_source_that_cannot_be_read_for_now(source, tmp_path, monkeypatch):
    preadv, reads = os.preadv, []

    def failing(*arguments):
        reads.append(0)
        if len(reads) > 40:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(
            UserError, match=r"^Input/output error: .*model-.*\.safetensors; .* the same command continues$"
        ):
            convert.convert(source / "safetensors", tmp_path / "made")
    assert convert.convert(source / "safetensors", tmp_path / "made").continued > 0


def test_destinations_that_cannot_be_made(source, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "pool")
    (tmp_path / "pool").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    (tmp_path / "link.partial").symlink_to(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for destination, message in (
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / "loop" / "made", "Too many levels of symbolic links"),
        (tmp_path / ("n" * 300), "File name too long"),
        (tmp_path / ("n" * 250), "File name too long"),
        (tmp_path / "file" / "made", "is not a directory"),
        (tmp_path / "link", "link.partial is in the way"),
        (source / "safetensors" / "inside", "lies in SRC"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            convert.convert(source / "safetensors", destination)
        assert "\n" not in str(raised.value)
    for path in (tmp_path / "loop", tmp_path / ("n" * 300)):
        with pytest.raises(UserError, match=r"Too many levels|File name too long"):
            convert.kind_of(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_and_a_missing_parent(source, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    convert.convert(source / "orbax", tmp_path / "link" / "not" / "there" / "made")
    assert contents(tmp_path / "disk" / "not" / "there" / "made") == contents(source / "safetensors")


def test_without_flock(source, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    partial = tmp_path / "made.partial"
    partial.mkdir()
    for host, process in ((socket.gethostname(), os.getppid()), ("another", 1)):
        (partial / "lock.holder").write_text(f"{host} {process}\n")
        with pytest.raises(UserError, match=r"another process is working on this conversion \(.*lock\.holder\)"):
            convert.convert(source / "orbax", tmp_path / "made")
    # Nobody knows who wrote these.
    for content in (b"", b"\xff\xfe" * 99, f"{socket.gethostname()} {'9' * 40}".encode(), b"\n" * 99):
        (partial / "lock.holder").write_bytes(content)
        with pytest.raises(UserError, match=r"another process is working on this conversion \(.*lock\.holder\)$"):
            convert.convert(source / "orbax", tmp_path / "made")
    # A holder on this host that has ended is taken over.
    (partial / "lock.holder").write_text(f"{socket.gethostname()} {2**22 + 1}\n")
    convert.convert(source / "orbax", tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


def test_home_in_quotes(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source / "orbax", tmp_path / "orbax")
    assert run(app, ["convert", "~/orbax", "~/made"]) == 0
    assert run(app, ["inspect", "~/made"]) == 0
    assert run(app, ["plan", "--platform=h100:1", "--context=8K", "--config=~/orbax", "--sharding=~/none.yaml"]) == 2
    assert f"--sharding is '{tmp_path}/none.yaml'" in capsys.readouterr().err
    assert run(app, ["inspect", "~nobody-of-this-name/made"]) == 2
    assert "there is no such user, or no home directory" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "orbax"]


def test_nothing_is_downloaded_for_a_destination_that_is_refused(source, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with stand_in_hub.serve(source / "safetensors") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for destination in ("full", "n" * 300):
            assert run(app, ["convert", "--hf", "owner/name", str(tmp_path / destination)]) == 2
        assert not hub.requests
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 2
