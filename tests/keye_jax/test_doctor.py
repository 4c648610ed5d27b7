"""`keye-jax doctor` and `--version`: what is missing or broken is a finding, not an exception."""

import json
import os
import re
import subprocess
import sys

import pytest

from keye_jax import doctor
from keye_jax.cli import app, run
from pallas_kernels.dispatch import OPERATIONS, available


@pytest.fixture(scope="module")
def report():
    return doctor.examine()


def test_versions_are_one_line_each(capsys):
    assert run(app, ["--version"]) == 0
    out, err = capsys.readouterr()
    names = [line.partition(" ")[0] for line in out.splitlines()]
    assert names[:5] == ["keye-jax", "Python", "jax", "jaxlib", "devices:"] and not err
    assert names[5:] in ([], ["ptxas"])


def test_this_machine_runs(report, capsys):
    assert report.runs and report.problems == []
    assert report.operations.keys() == OPERATIONS.keys()
    assert set(report.operations.values()) <= set(available()) and report.refused.keys().isdisjoint(available())
    assert run(app, ["doctor"]) == 0
    out, _ = capsys.readouterr()
    assert out.splitlines()[-1] == "this machine can run `keye-jax generate`"
    assert len(out.splitlines()) <= 45, "it must fit one screen"
    for name in report.refused:
        assert re.search(rf"^not {name} +it needs an? .*; this is {report.devices[0].kind}$", out, re.M)


def test_json_has_all(capsys):
    assert run(app, ["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] and found["devices"][0]["count"] >= 1 and found["devices"][0]["memory"] > 0
    assert found["packages"]["jax"] and found["media_bytes"] == 1 << 30


def test_a_backend_that_does_not_start_is_a_problem():
    command = [sys.executable, "-m", "keye_jax.cli"]
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run([*command, "doctor"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "JAX finds no device with JAX_PLATFORMS=no_such_platform: " in done.stdout
    assert done.stdout.splitlines()[-1] == "this machine can NOT run `keye-jax generate`"
    done = subprocess.run([*command, "--version"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "devices: none, " in done.stdout


def test_each_missing_extra_has_its_command(monkeypatch):
    lines = ["jax>=0.11", "av>=19; extra == 'video'", 'ray[data]>=2.50; extra == "ray"', "pytest>=8; extra == 'dev'"]
    lines += ["jax[cuda13]>=0.11; extra == 'cuda'", "av>=19; extra == 'train'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: lines)
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    monkeypatch.setattr(doctor, "find_ptxas", lambda: None)
    have: dict[str, str] = {"jax": "0.11.2", "av": "18.1"}
    monkeypatch.setattr(doctor, "_version", have.get)
    commands = {extra: f"pip install 'keye-jax[{extra}]'" for extra in ("video", "train", "ray", "cuda")}
    assert [each.remedy for each in doctor._missing()] == [*commands.values(), commands["cuda"]]
    have |= {"av": "19.0.2", "ray": "2.51"}
    assert [each.remedy for each in doctor._missing()] == [commands["cuda"], commands["cuda"]]
    assert list(doctor._wrong_packages()) == []
    have["jax"] = "0.10.9"
    assert list(doctor._wrong_packages()) == [
        doctor.Finding("jax is 0.10.9; it must be >=0.11", "pip install 'jax>=0.11'")
    ]
    del have["jax"]
    assert [each.what for each in doctor._wrong_packages()] == ["jax is not installed"]


@pytest.mark.parametrize(
    ("version", "ranges", "expected"),
    [
        ("0.12.1", "<0.13,>=0.11.2", True),
        ("0.11.10", ">=0.11.2", True),
        ("0.13.0", "<0.13", False),
        ("2.0.0rc1", ">=2", True),
        ("1", "", True),
    ],
)
def test_ranges(version, ranges, expected):
    assert doctor._satisfies(version, ranges) is expected


def test_a_cache_that_cannot_be_written_is_a_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert doctor._cache() == (str(tmp_path / "file" / "cache"), False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "new" / "cache"))
    assert doctor._cache()[1] is True
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/cache")
    assert doctor._cache()[1] is None


def test_a_ptxas_that_does_not_run_is_passed_over(monkeypatch, tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    for file, text in ((bad, "exit 1"), (good, "echo 'Cuda compilation tools, release 13.0, V13.0.48'")):
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    monkeypatch.setattr(doctor, "_ptxas_files", lambda: [str(tmp_path / "none"), str(bad), str(good)])
    doctor.find_ptxas.cache_clear()
    assert doctor.find_ptxas() == f"13.0.48, {good}"
    doctor.find_ptxas.cache_clear()
