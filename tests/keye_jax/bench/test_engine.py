"""The benchmarks of the engine, of the server and of jobs, with one layer of a tiny model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convert.synthetic import with_layers
from keye_jax import presets
from keye_jax.bench.train import warmup_flops
from keye_jax.config import KeyeConfig

pytestmark = pytest.mark.slow


def run(module, *options):
    command = [sys.executable, "-m", f"keye_jax.bench.{module}"]
    command += ["--config", str(presets.TINY), "--layers", "1", *options]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles faster
    done = subprocess.run(command, cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_engine(tmp_path):
    options = ["--rows", "2", "--cache-tokens", "8192", "--cells", "1x600,2x600", "--tokens", "16", "--promise"]
    out = run("engine", *options, "--json", str(tmp_path / "found.json"))
    assert "compilations after warm-up: 0" in out
    assert re.search(r"^one request of 600 tokens: \d\.\d\d of a batch of one row", out, re.M)
    assert "alone and beside others: 2 of 2 requests" in out
    cells = json.loads((tmp_path / "found.json").read_text())["cells"]
    assert [(cell["requests"], cell["context"]) for cell in cells] == [(1, 600), (2, 600)]
    assert all(cell["tokens_per_second"] > 0 and cell["bare_tokens_per_second"] > 0 for cell in cells)


def test_masks():
    command = [sys.executable, "-m", "keye_jax.bench.masks", "--rows", "2", "--steps", "5", "--vocab", "600"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    assert re.search(r"^masks of 2 rows in a step, microseconds: median \d", done.stdout, re.M)


def test_jobs():
    out = run("jobs", "--lines", "6", "--words", "20", "60", "--tokens", "4", "--rows", "2", "--traced-lines", "2")
    assert json.loads(next(line for line in out.splitlines() if line.startswith("{")))["job"]["succeeded"] == 6
    assert "\n6 lines in " in out and "\ncompilations after warm-up: 0\n" in out


def test_serve(tmp_path):
    options = ["--streams", "1,2", "--rows", "2", "--prompt", "100", "--tokens", "8", "--rounds", "2"]
    out = run("serve", *options, "--json", str(tmp_path / "found.json"))
    assert "compilations after warm-up: 0" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(each["streams"], each["over"]) for each in found["latencies_ms"]] == [
        *((1, "engine"), (1, "http"), (2, "engine"), (2, "http")),
    ]
    assert all(0 < each["first"][0] <= each["first"][1] and each["bare_step"] > 0 for each in found["latencies_ms"])
    assert found["heat"]["with_ms"] > 0 and found["masks"]["with_ms"] > 0


def test_what_a_steps_products_are_of():
    """Against sums written out for one layer of the tiny model and three tokens."""
    config = with_layers(KeyeConfig.from_file(presets.TINY), 1)
    sa, pairs, tokens = config.sa_config, 6, 3
    heads, dim, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
    q_and_o, k_and_v = 2 * hidden * heads * dim, 2 * hidden * config.num_key_value_heads * dim
    indexer = hidden * (sa.indexer_num_heads * sa.indexer_head_dim + sa.indexer_num_heads + sa.indexer_head_dim)
    experts = hidden * (config.num_experts + config.num_experts_per_tok * 3 * config.moe_intermediate_size)
    dots, index_dots = pairs * heads * dim, pairs * sa.indexer_num_heads * sa.indexer_head_dim
    forward = tokens * (q_and_o + k_and_v + indexer + experts) + 2 * dots + index_dots
    backward = dots + 3 * index_dots + tokens * indexer
    assert warmup_flops(config, tokens) == 2 * (forward + backward)
