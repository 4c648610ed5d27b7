"""Times of prefill on TPUs: their figures are those of the documentation, and a plan adds them up."""

import dataclasses
from pathlib import Path

import pytest

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.planning.hardware import CHIPS, Platform
from keye_jax.planning.plan import plan
from keye_jax.planning.tpu_times import KERNELS, kernel_seconds
from keye_jax.sharding import ShardingConfig

ROOT = Path(__file__).parents[3]
ROWS = {
    "scores": "| `indexer_scores` | 1 x 2048 queries, 128K |",
    "unions": "| `select_unions`, thresholds and lists | 2048 queries, 128K |",
    "attention": "| `union_attention` | 2048 queries, unions of 16K |",
    "pages": "| `union_attention`, whole pages | 2048 queries, 128K |",
}


@pytest.mark.parametrize("name", ROWS)
def test_figures_are_those_of_the_documentation(name):
    lines = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(ROWS[name]))
    cells = line.removeprefix(ROWS[name]).split("|")
    assert [getattr(KERNELS[kind], name) for kind in ("v5e", "v5p", "v6e", "tpu7x")] == [*map(float, cells[:4])]


def test_short_contexts_read_whole_pages():
    times = KERNELS["v5p"]
    whole = (times.scores + times.unions + times.pages) / 4
    assert kernel_seconds("v5p", 2048, 2**15) == pytest.approx(whole * 1e-3)
    listed = times.scores + times.unions + 2 * times.attention
    assert kernel_seconds("v5p", 1024, 2**17) == pytest.approx(listed / 2 * 1e-3)


def test_a_plan_adds_them_up():
    config = dataclasses.replace(KeyeConfig.from_file(presets.RELEASED), num_hidden_layers=1)
    sharding = ShardingConfig.from_file(ROOT / "configs" / "sharding" / "one_device.yaml")
    job = {"context": 2**17, "compile_programs": False}
    found = plan(config, sharding, Platform.parse("v6e:1x1"), **job)
    bandwidth = CHIPS["v6e"].bandwidth
    assert bandwidth and found.prefill and found.prefill.estimated_seconds and found.decode
    rest = found.prefill.estimated_seconds - kernel_seconds("v6e", found.prefill.tokens, 2**17)
    read = (found.weights - 2 * config.vocab_size * config.hidden_size) / bandwidth
    assert 0.1 * read < rest <= read
    assert found.decode.estimated_seconds is None
    float8 = plan(config, sharding, Platform.parse("v6e:1x1"), indexer_dtype="float8_e4m3fn", **job)
    others = plan(config, sharding, Platform.parse("h100:1"), **job)
    assert [step and step.estimated_seconds for step in (float8.prefill, others.prefill)] == [None, None]
    assert float8.prefill and others.prefill
