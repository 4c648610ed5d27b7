"""The benchmark of training, with a small model."""

import json
import re
import sys

import pytest

from keye_jax.bench.train import main
from tests.keye_jax.golden_models import GOLDEN

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_to_compile")]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command on one layer and 256 tokens; returns what it prints."""

    def run(*arguments: str) -> str:
        config = str(GOLDEN / "a" / "config.json")
        command = ["bench.train", "--config", config, "--layers", "1", "--length", "256", "--repeats", "1", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        main()
        return capsys.readouterr().out

    return run


def test_a_step_is_timed(run, tmp_path):
    printed = run("--stage", "indexer_warmup", "--json", str(tmp_path / "figures.json"))
    timed = r"^step [\d,]+ ms, its forward pass alone [\d,]+ ms\n[\d,]+ tokens a second\nit needs .*TFLOP/s"
    assert re.search(timed, printed, re.M)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["tokens"] == 256
    assert figures["step"] > 0 and figures["forward"] > 0


@pytest.mark.parametrize("stage", ["indexer_warmup", "sparse_adaptation"])
def test_memory_is_that_of_the_compiled_step(run, stage: str):
    printed = run("--stage", stage, "--compile-only")
    sizes = re.fullmatch(
        rf"{stage}, 1 layers, 256 tokens, .*: (\d+\.\d\d) GiB of weights, moments and batch, (\d+\.\d\d) GiB besides\n",
        printed,
    )
    assert sizes is not None, printed
