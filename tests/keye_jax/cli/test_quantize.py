"""Commands that run a model, with a checkpoint that `keye-jax quantize` has made."""

import json

import pytest

from convert.detect import read_config
from keye_jax.quantization.schemes import standard
from tests.keye_jax.cli.test_serve import start, wait_until_ready, whole_answer
from tests.keye_jax.jobs.fake import line
from tests.keye_jax.processes import free_port


@pytest.fixture
def smaller(keye, inputs, tmp_path):
    """A checkpoint of int4 experts, with all files of a served one."""
    arguments = ("--experts", "int4", "--group", 32, "--attention", "int8")
    assert keye("quantize", inputs / "orbax", tmp_path / "smaller", *arguments)[0] == 0
    return tmp_path / "smaller"


@pytest.mark.slow
def test_generate_and_batch(keye, smaller, inputs, tmp_path, quick_to_compile):
    asked = ("--video", inputs / "clip.mp4", "--prompt", "What?", "--greedy", "--json", "--max-new-tokens", 4)
    code, out, err = keye("generate", "--checkpoint", smaller, *asked)
    assert code == 0 and json.loads(out)["tokens"]["completion"] == 4, err
    (tmp_path / "in.jsonl").write_bytes(line("a") + line("b", temperature=1.0, seed=2))
    small = ("--rows", 2, "--cache-tokens", "4K", "--prefill-chunk", 256, "--no-warmup", "--max-tokens", 4)
    job = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    code, _, err = keye("batch", "--checkpoint", smaller, *job, *small)
    assert code == 0 and "2 of 2 done, 0 failed" in err


@pytest.mark.slow
def test_serve(smaller):
    port = free_port()
    server = start(smaller.parent, port, "--no-warmup", name=smaller.name)
    try:
        wait_until_ready(port, server)
        assert whole_answer(port, max_tokens=3)["usage"]["completion_tokens"] <= 3
    finally:
        server.kill()
        server.communicate()


@pytest.mark.slow
def test_bench_of_random_weights(keye, smaller, inputs, quick_to_compile):
    """The schemes are those of config.json, or those that are asked for."""
    assert read_config(smaller).quantization.experts == standard("int4", 32)
    small = ("--layers", 1, "--prefill", "64", "--decode", "1x128", "--prefill-chunk", 64, "--repeats", 1)
    less = ("--no-dense", "--no-fp8", "--no-unions", "--unrelated", "", "--packed", "")
    for arguments in (("--config", smaller / "config.json"), ("--config", inputs / "hf", "--experts", "fp8")):
        code, out, err = keye("bench", *arguments, *small, *less)
        assert code == 0 and "decode, 1 x 128, sparse" in out, err
    code, _, err = keye("bench", "--config", smaller, "--experts", "fp8", *small, *less)
    assert code == 2 and "--experts" in err
