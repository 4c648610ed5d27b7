"""A conversion is killed at every kind of moment, and the same call continues it."""

import json
import os

import pytest

import convert
from convert import journal, sinks, staging
from convert.inspection import inspect
from convert.reader import SafetensorsSource
from keye_jax.errors import UserError
from tests.convert.convert_helpers import contents, run_python, write

GROUP = 700_000

# Runs conversions in small groups. Each runs in a process that kills itself, as a power cut would, at the given moment.
# These processes are forks of one process, which has done the imports.
KILLED = """
import json, os, shutil, signal, sys, threading
from convert import conversion, orbax_io, sinks, staging, writer

sinks.LARGE_BYTES, sinks.GROUP_BYTES = {group}, {group}
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

def run(source, destination, moment, overwrite):
    progress, calls = None, []
    if moment in ("after_groups", "then_damaged"):
        progress = lambda *call: die() if len(calls) == 4 else call[0] == "convert" and calls.append(call)
    elif moment == "before_record":
        record = staging.Staging.record
        def stop(*arguments):
            calls.append(0)
            die() if len(calls) == 3 else record(*arguments)
        staging.Staging.record = stop
    elif moment == "in_a_write":
        # Another thread kills the process while the main thread writes.
        progress = lambda phase, done, total: phase == "convert" and done and threading.Timer(0.01, die).start()
    elif moment == "in_the_merge":
        def stop(self, path):
            groups = sorted((path.parent / "params.partial_save").iterdir())
            shutil.rmtree(groups[0])
            die()
        orbax_io.OrbaxWriter._merge = stop
    elif moment == "after_the_merge":
        orbax_io.OrbaxWriter.finish = lambda self, to, finish=orbax_io.OrbaxWriter.finish: [finish(self, to), die()]
    elif moment == "in_the_index":
        writer.ShardWriter.close = die
    elif moment == "before_commit":
        staging.Staging.commit = die
    elif moment == "between_renames":
        rename = staging.Path.rename
        staging.Path.rename = lambda self, target: die() if str(target) == destination else rename(self, target)
    conversion.convert(source, destination, progress=progress, overwrite=overwrite)

for case in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        run(*case)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, case
"""

TO_ORBAX = ["after_groups", "before_record", "in_a_write", "in_the_merge", "after_the_merge", "before_commit"]
TO_SAFETENSORS = ["after_groups", "before_record", "in_the_index", "before_commit", "between_renames"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    write(directory / "safetensors", shard_size=2_000_000)
    convert.convert(directory / "safetensors", directory / "orbax")
    write(directory / "other", seed=5)
    return directory


@pytest.fixture(scope="module")
def killed(source, tmp_path_factory):
    """Destinations of killed conversions, by the kind of the source and the moment of the kill."""
    cases = [("safetensors", moment) for moment in TO_ORBAX] + [("orbax", moment) for moment in TO_SAFETENSORS]
    cases += [("other", "after_groups"), ("safetensors", "then_damaged"), ("orbax", "then_damaged")]
    destinations = {case: tmp_path_factory.mktemp("killed") / "made" for case in cases}
    write(destinations["orbax", "between_renames"], seed=9)
    commands = [
        (str(source / kind), str(made), moment, moment == "between_renames")
        for (kind, moment), made in destinations.items()
    ]
    run_python(KILLED.format(group=GROUP), json.dumps(commands))
    return destinations


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(sinks, "LARGE_BYTES", GROUP)
    monkeypatch.setattr(sinks, "GROUP_BYTES", GROUP)


@pytest.mark.parametrize("moment", TO_ORBAX)
def test_to_orbax(source, killed, tmp_path, moment, monkeypatch):
    destination = killed["safetensors", moment]
    partial = staging.staging_directory(destination)
    assert not destination.exists()
    for path in (partial, partial / "result"):
        for look in (convert.kind_of, inspect):
            with pytest.raises(UserError, match="is an unfinished conversion"):
                look(path)
    with pytest.raises(UserError, match="does not exist"):
        convert.kind_of(destination)
    read = []
    read_tensor = SafetensorsSource.read_tensor
    monkeypatch.setattr(
        SafetensorsSource, "read_tensor", lambda self, tensor: [read.append(tensor), read_tensor(self, tensor)][1]
    )
    done = convert.convert(source / "safetensors", destination)
    assert done.continued > 0
    assert done.continued + 2 * sum(tensor.size for tensor in read) == done.nbytes
    assert not partial.exists()
    convert.convert(destination, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source / "safetensors")


@pytest.mark.parametrize("moment", TO_SAFETENSORS)
def test_to_safetensors(source, killed, moment):
    destination = killed["orbax", moment]
    partial = staging.staging_directory(destination)
    assert not destination.exists()
    assert (partial / "replaced" / "config.json").exists() == (moment == "between_renames")
    with pytest.raises(UserError, match="is an unfinished conversion"):
        convert.kind_of(partial / "result")
    done = convert.convert(source / "orbax", destination)
    assert done.continued > 0 and not partial.exists()
    assert contents(destination) == contents(source / "safetensors")


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << 4
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_what_is_damaged_between_two_runs_is_written_again(source, killed, tmp_path, kind):
    destination = killed[kind, "then_damaged"]
    partial = staging.staging_directory(destination)
    text = (partial / staging.JOURNAL).read_bytes()
    groups = journal.from_json((journal.decode(text, "") or {})["groups"])
    assert len(groups) >= 4
    whole = sum(extent.length for group in groups for extent in group.extents)
    largest = max(groups[0].extents, key=lambda extent: extent.length)
    flip(partial / largest.file, largest.offset + largest.length // 2)
    lost = partial / groups[2].extents[0].file
    if kind == "safetensors":  # in the other direction all groups may be in one file
        lost.unlink()
    # A name that is another tensor's, say.
    flip(partial / staging.JOURNAL, text.index(b"layers.0") + len("layers."))
    with pytest.raises(UserError, match=r"is in the way: .* or its conversion.json is damaged"):
        convert.convert(source / kind, destination)
    (partial / staging.JOURNAL).write_bytes(text)
    phases = []
    done = convert.convert(source / kind, destination, progress=lambda *call: phases.append(call))
    assert 0 < done.continued <= whole - largest.length
    assert [call[2] for call in phases if call[0] == "verify"][-1] == whole
    assert inspect(destination, check=True).problems == []
    made = destination
    if kind == "safetensors":
        convert.convert(destination, made := tmp_path / "back")
    assert contents(made) == contents(source / "safetensors")


def test_another_source_is_not_mixed_in(source, killed, tmp_path):
    destination = killed["other", "after_groups"]
    for kind in ("safetensors", "orbax"):
        with pytest.raises(UserError, match="is an unfinished conversion of another source"):
            convert.convert(source / kind, destination)
    os.utime(source / "other" / "model.safetensors", ns=(1, 1))
    with pytest.raises(UserError, match="another source"):
        convert.convert(source / "other", destination)
    done = convert.convert(source / "safetensors", destination, overwrite=True)
    assert done.continued == 0
    convert.convert(destination, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source / "safetensors")


def test_two_at_once(source, tmp_path):
    held = staging.Staging(tmp_path / "made", "someone else's", overwrite=False)
    with pytest.raises(UserError, match="another process is working"):
        convert.convert(source / "safetensors", tmp_path / "made", overwrite=True)
    held.discard()
    convert.convert(source / "safetensors", tmp_path / "made")


@pytest.mark.parametrize("name", ["conversion.json", "thesis.txt"])
def test_what_is_not_ours_is_left_alone(source, tmp_path, name):
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / name).write_text("not JSON")
    with pytest.raises(UserError, match="is in the way"):
        convert.convert(source / "safetensors", tmp_path / "made", overwrite=True)
    assert [path.name for path in (tmp_path / "made.partial").iterdir()] == [name]


def test_interrupt_says_how_to_continue(source, tmp_path, capsys, monkeypatch):
    from keye_jax.cli import app, run

    def interrupt(*_):
        raise KeyboardInterrupt

    arguments = ["convert", str(source / "safetensors"), str(tmp_path / "made")]
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "commit", interrupt)
        assert run(app, arguments) == 130
    assert capsys.readouterr().err == "keye-jax: interrupted; the same command continues where this one stopped\n"
    assert run(app, arguments) == 0
    assert "bytes were there from an earlier run" in capsys.readouterr().out
