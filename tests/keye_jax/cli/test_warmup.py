"""What is compiled beforehand, a job finds in the cache."""

import json
import os
import subprocess
import sys

import pytest

from tests.keye_jax.jobs.fake import line

SETTINGS = (
    "--dtype",
    "float32",
    "--prefill-chunk",
    "128",
    "--rows",
    "2",
    "--cache-tokens",
    "4K",
    "--max-pixels",
    "3136",
)


@pytest.mark.slow
def test_a_job_after_it_compiles_nothing(inputs, tmp_path):
    cache = tmp_path / "cache"
    environment = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiles faster

    def run(*command):
        arguments = [str(each) for each in (*command, "--checkpoint", inputs / "orbax", *SETTINGS)]
        done = subprocess.run(
            [sys.executable, "-m", "keye_jax.cli", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | environment,
        )
        assert done.returncode == 0, done.stderr
        return {path.name for path in cache.iterdir() if path.name.endswith("-cache")}

    compiled = run("warmup", "batch")
    assert compiled
    picture = {"type": "image_url", "image_url": {"url": str(inputs / "picture.png")}}
    asked = [{"role": "user", "content": [picture, {"type": "text", "text": "What is there?"}]}]
    (tmp_path / "in.jsonl").write_bytes(line("a", messages=asked, max_tokens=3) + line("b", max_tokens=3))
    output = tmp_path / "out.jsonl"
    # Each program that is compiled is written into the cache.
    assert run("batch", "--input", tmp_path / "in.jsonl", "--output", output) == compiled
    assert all("response" in json.loads(each) for each in output.read_bytes().splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "COMMAND is 'train'; it must be serve or batch"),
        (["batch", "--max-context", "8K"], "--max-context is an option of serve; batch has none"),
        (["serve", "--rows", "0"], "--rows is 0; it must be at least 1"),
    ],
)
def test_mistakes(keye, inputs, arguments, message):
    code, out, err = keye("warmup", *arguments, "--checkpoint", inputs / "hf")
    assert (code, out) == (2, "") and message in err
