"""What a cluster is given: manifests by Kubernetes' schemas, commands by the command line, images by the package."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from keye_jax import presets
from keye_jax.cli import app

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
IMAGES = sorted(DEPLOY.glob("Dockerfile.*"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def jobs_of(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What Kubernetes itself has a schema for; of a JobSet, the jobs that it makes."""
    if manifest["kind"] != "JobSet":
        yield manifest
        return
    for job in manifest["spec"]["replicatedJobs"]:
        yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every container, with the name of its manifest."""
    for path in MANIFESTS:
        for document in documents(path):
            for job in jobs_of(document):
                if "template" in job["spec"]:
                    yield from ((path.name, each) for each in job["spec"]["template"]["spec"]["containers"])


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of keye-jax, with the name of its file."""
    for name, container in containers():
        yield name, container["args"]
    for path in IMAGES:
        yield path.name, json.loads(re.findall(r"^CMD (.*)$", path.read_text(), re.M)[-1])
    for path in sorted((DEPLOY / "slurm").glob("*.sh")):
        for line in re.findall(r"keye-jax (.*)$", path.read_text().partition("set -eu")[2], re.M):
            yield path.name, shlex.split(line)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_follow_the_schemas_of_kubernetes(path):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in documents(path):
        for job in jobs_of(document):
            kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("name", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_commands_are_known(name, command):
    group: Any = typer.main.get_command(app)
    subcommand = group.commands[command[0]]
    known = {option: each for each in subcommand.params for option in each.opts + each.secondary_opts}
    options = dict(word.partition("=")[::2] for word in command[1:] if word.startswith("--"))
    assert options, name
    assert not options.keys() - known.keys(), f"{name} has options that {command[0]} does not have"
    required = {each.opts[0] for each in subcommand.params if each.required}
    assert required <= options.keys()
    sharding = options.get("--sharding") or (
        command[command.index("--sharding") + 1] if "--sharding" in command else ""
    )
    assert not sharding or presets.sharding_file(sharding).exists()


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_images_install_what_there_is(path):
    text = path.read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for source in re.findall(r"^COPY (.*) \S+$", text, re.M):
        assert all((ROOT / each).exists() for each in source.split())
    copied = set(" ".join(re.findall(r"^COPY (.*) \S+$", text, re.M)).split())
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]) <= copied
    extras = re.search(r"/src\[(.*)\]", text)
    assert extras and set(extras[1].split(",")) <= project["project"]["optional-dependencies"].keys()


def test_the_grace_of_a_pod_is_longer_than_that_of_its_server():
    found = 0
    for path in MANIFESTS:
        for document in documents(path):
            for job in jobs_of(document):
                pod = job["spec"].get("template", {}).get("spec", {})
                for container in pod.get("containers", ()):
                    grace = [word.partition("=")[2] for word in container["args"] if word.startswith("--grace=")]
                    found += len(grace)
                    assert all(int(each) < pod["terminationGracePeriodSeconds"] for each in grace)
    assert found


def test_probes_ask_for_what_the_server_has():
    from keye_jax.serve import app

    probes = [each for _, container in containers() for name, each in container.items() if "Probe" in name]
    paths = {probe["httpGet"]["path"] for probe in probes}
    source = Path(app.__file__).read_text()
    assert paths == {"/health", "/ready"} and all(f'Route("{path}"' in source for path in paths)


def test_the_board_shows_metrics_that_exist():
    from keye_jax.serve import metrics

    board = (DEPLOY / "monitoring" / "grafana.json").read_text()
    shown = set(re.findall(r"keye_jax_([a-z0-9_]+?)(?:_total|_bucket)?(?=[\[\)\s\"])", board))
    assert len(shown) > 10
    source = Path(metrics.__file__).read_text()
    assert not {name for name in shown if f'"{name}"' not in source}
