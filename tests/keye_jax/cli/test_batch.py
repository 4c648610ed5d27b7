"""The command, with an engine that has no model."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from keye_jax.engine.options import EngineOptions
from keye_jax.runtime.sampling import SamplingParams
from tests.keye_jax.jobs.fake import FakeEngine, line
from tests.keye_jax.processes import SHARDING, begin, finish, free_port, write_inputs


@pytest.fixture
def engines(monkeypatch):
    """The class of the engines, and those that were opened: rows (checkpoint, settings, engine)."""
    opened = []

    class Engine(FakeEngine):
        after = None

        @classmethod
        def from_checkpoint(cls, checkpoint, **settings):
            opened.append((checkpoint, settings, cls(after=cls.after)))
            return opened[-1][2]

        def warmup(self):
            pass

    monkeypatch.setattr("keye_jax.engine.engine.Engine", Engine)
    for name in ("JOB_COMPLETION_INDEX", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    opened.append(Engine)
    yield opened


@pytest.fixture
def batch(keye, inputs, engines, tmp_path):
    """Runs `keye-jax batch` on requests."""

    def call(content, *arguments):
        if content is not None:
            (tmp_path / "in.jsonl").write_bytes(content)
            arguments = ("--input", tmp_path / "in.jsonl", *arguments)
        return keye("batch", "--checkpoint", inputs / "hf", "--output", tmp_path / "out.jsonl", *arguments)

    return call


def results(path):
    return {each["custom_id"]: each for each in map(json.loads, path.read_bytes().splitlines())}


def test_a_job(batch, engines, inputs, tmp_path):
    code, out, err = batch(line("a") + line("b", logprobs=True, max_tokens=3))
    assert code == 0 and out == "" and "2 of 2 done, 0 failed" in err
    assert "its cache holds 65,536 tokens" in err
    got = results(tmp_path / "out.jsonl")
    assert got.keys() == {"a", "b"} and got["a"]["response"]["body"]["model"] == "hf"
    assert isinstance(got["b"]["response"]["body"]["choices"][0]["logprobs"]["content"][0]["token"], str)
    report = json.loads((tmp_path / "out.jsonl.report.json").read_bytes())
    assert report["job"] == {"requests": 2, "succeeded": 2, "failed": 0, "not_done": 0, "failures": {}}
    assert (tmp_path / "out.jsonl.report.svg").exists()
    _, (checkpoint, settings, engine) = engines
    assert str(checkpoint) == str(inputs / "hf")
    assert settings["options"].rows == 32 and settings["options"].cache_tokens is None
    assert settings["media"] == {} and settings["allow_remote"] is False
    assert {request.max_tokens for request in engine.requests} == {None, 3}
    assert not list(tmp_path.glob("*.tmp"))


def test_options_are_what_lines_have_that_say_nothing(batch, engines):
    arguments = ("--temperature", 0.25, "--top-p", 0.5, "--top-k", 7, "--seed", 9, "--max-tokens", 5)
    media = ("--fps", 1, "--max-frames", 8, "--end", "1:00", "--max-pixels", 99999)
    engine = ("--rows", 4, "--cache-tokens", "64K", "--frame-cache", "frames", "--prompts-together", 2)
    code, _, err = batch(line("a") + line("b", temperature=1, seed=2), *arguments, *media, *engine)
    assert code == 0, err
    _, (_, settings, engine) = engines
    assert settings["media"] == {"fps": 1.0, "max_frames": 8, "end": "1:00", "max_pixels": 99999}
    assert settings["options"] == EngineOptions(
        rows=4, prompts_together=2, chunks_between=4, cache_tokens=65536, frame_cache=Path("frames")
    )
    first, second = sorted(engine.requests, key=lambda request: request.sampling.temperature)
    assert first.sampling == SamplingParams(temperature=0.25, top_p=0.5, top_k=7, seed=9) and first.max_tokens == 5
    assert second.sampling == SamplingParams(temperature=1.0, top_p=0.5, top_k=7, seed=2)


def test_failures_are_counted_and_a_job_that_is_done_needs_no_engine(batch, engines, tmp_path):
    content = line("a") + line("b", "media") + b"bad\n"
    for run in range(2):
        code, _, err = batch(content)
        assert code == 1 and f"2 of 3 requests failed; see {tmp_path / 'out.jsonl'}" in err
        assert ("all 3 requests have a result in" in err) == (run == 1)
    assert len(engines) == 2
    report = json.loads((tmp_path / "out.jsonl.report.json").read_bytes())
    assert report["run"]["requests"] == 3, "the report is that of the run that did something"


def test_videos_of_a_folder(batch, engines, inputs, tmp_path):
    code, _, err = batch(None, "--videos", f"{inputs}/*.mp4", "--prompt", "What happens?")
    assert code == 0 and "1 videos, whose requests are in" in err
    assert results(tmp_path / "out.jsonl").keys() == {"clip.mp4"}
    assert (tmp_path / "out.requests.jsonl").exists()
    [request] = engines[1][2].requests
    assert request.messages[0]["content"][0]["video_url"]["url"] == str(inputs / "clip.mp4")


def test_a_shard_of_the_environment(batch, tmp_path, monkeypatch):
    content = b"".join(line(str(index)) for index in range(5))
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    code, _, err = batch(content)
    assert code == 2 and "JOB_COMPLETIONS is not set" in err
    monkeypatch.setenv("JOB_COMPLETIONS", "2")
    assert batch(content)[0] == 0
    assert results(tmp_path / "out.1-of-2.jsonl").keys() == {"1", "3"}
    assert batch(content, "--shard", "0/2")[0] == 0
    assert results(tmp_path / "out.0-of-2.jsonl").keys() == {"0", "2", "4"}
    assert batch(content, "--shard", "0/1")[0] == 0
    assert len(results(tmp_path / "out.jsonl")) == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--temperature", 0), "begun with temperature 0.6 (now 0.0); give the same, or another --output"),
        (("--fps", 1), "begun with fps null (now 1.0)"),
        (("--dense-below", 64), "begun with dense_below 0 (now 64)"),
        (("--rows", 8), "begun with rows 32 (now 8)"),
        (("--cache-dtype", "float8_e4m3fn"), 'begun with cache_dtype null (now "float8_e4m3fn")'),
        (("--activation-dtype", "float8_e4m3fn"), 'begun with activation_dtype null (now "float8_e4m3fn")'),
    ],
)
def test_resuming_with_other_options_is_refused(batch, arguments, message):
    assert batch(line("a"))[0] == 0
    code, _, err = batch(line("a"), *arguments)
    assert code == 2 and message in err and err.count("\n") == 1
    assert batch(line("a"), "--retries", 5, "--concurrency", 3, "--grace", 1)[0] == 0


def test_resuming_with_another_input_or_checkpoint_is_refused(batch, keye, copy_of, tmp_path):
    assert batch(line("a"))[0] == 0
    code, _, err = batch(line("b"))
    assert code == 2 and "begun with another input (SHA-256" in err
    assert batch(line("a"))[0] == 0
    again = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert keye("batch", "--checkpoint", copy_of, *again)[0] == 0
    (copy_of / "chat_template.jinja").write_text("{{ messages }}")
    code, _, err = keye("batch", "--checkpoint", copy_of, *again)
    assert code == 2 and "begun with another checkpoint (SHA-256" in err


def test_a_signal_ends_it_with_its_code(batch, engines, tmp_path):
    engines[0].after = {3: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    content = b"".join(line(str(index), "hang" if index == 2 else "hi") for index in range(5))
    code, _, err = batch(content, "--grace", 0.2, "--concurrency", 3)
    done = len(results(tmp_path / "out.jsonl"))
    assert code == 143 and f"stopped by SIGTERM; {5 - done} of 5 requests have no result yet" in err


def test_an_engine_that_ends_can_be_resumed(batch, tmp_path):
    code, _, err = batch(line("a", "closed 1"))
    assert code == 3 and "the engine ended (it is closed); the same command resumes the job" in err


def test_a_report_that_cannot_be_written_does_no_harm(batch, tmp_path):
    (tmp_path / "out.jsonl.report.json").mkdir()
    code, _, err = batch(line("a"))
    assert code == 0 and "the report cannot be written (Is a directory)" in err


def test_no_plot_without_matplotlib(batch, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = batch(line("a"))
    assert code == 0 and "no plot, which needs Matplotlib: pip install 'keye-jax[bench]'" in err
    assert (tmp_path / "out.jsonl.report.json").exists() and not (tmp_path / "out.jsonl.report.svg").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "give either --input or --videos"),
        (("--input", "none.jsonl"), "--input is 'none.jsonl'; it must be a file that is there"),
        (("--input", "x", "--videos", "y"), "give either --input or --videos"),
        (("--videos", "none/*.mp4", "--prompt", "?"), "--videos is 'none/*.mp4'; at least one file must match it"),
        (("--videos", "none/*.mp4"), "--videos and --prompt go together"),
        (("--input", "x", "--prompt", "?"), "--videos and --prompt go together"),
        (("--input", "x", "--shard", "2/2"), "--shard is '2/2'; it must be i/n with i from 0 to n - 1"),
        (("--input", "x", "--rows", 0), "--rows is 0; it must be at least 1"),
        (("--input", "x", "--retries", -1), "--retries is -1; it must be at least 0"),
        (("--input", "x", "--concurrency", 0), "--concurrency is 0; it must be at least 1"),
        (("--input", "x", "--max-tokens", 0), "--max-tokens is 0; it must be at least 1"),
        (("--input", "x", "--temperature", -1), "temperature is -1.0; it must be 0 (greedy) or more"),
        (("--input", "x", "--grace", "nan"), "--grace is nan; it must be at least 0"),
        (("--input", "x", "--fps", -1), "fps is -1.0; it must be a positive number"),
        (("--input", "x", "--ray", 0), "--ray is 0; it must be at least 1"),
        (("--input", "x", "--ray", 1, "--process-id", 0), "--process-id do not go with --ray"),
        (("--input", "x", "--coordinator", "host:1"), "--processes and --process-id must be given too"),
    ],
)
def test_a_wrong_option_is_refused(batch, tmp_path, arguments, message):
    code, _, err = batch(None, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
def test_with_a_model(keye, inputs, tmp_path, quick_to_compile):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "clip.mp4").write_bytes((inputs / "clip.mp4").read_bytes())
    arguments = ("--videos", f"{tmp_path}/*.mp4", "--prompt", "What?", "--output", tmp_path / "out.jsonl")
    small = ("--rows", 2, "--cache-tokens", "4K", "--prefill-chunk", 512, "--no-warmup", "--max-tokens", 4)
    small += ("--cache-dtype", "float8_e4m3fn")
    for _ in range(2):
        code, _, err = keye("batch", "--checkpoint", inputs / "orbax", *arguments, *small)
        assert code == 1 and "1 of 2 requests failed" in err
    got = results(tmp_path / "out.jsonl")
    assert got["broken.mp4"]["error"]["code"] == "media"
    body = got["clip.mp4"]["response"]["body"]
    assert body["usage"]["completion_tokens"] == 4 and body["usage"]["prompt_tokens_details"]["video_tokens"] > 0
    assert body["choices"][0]["finish_reason"] == "length" and body["choices"][0]["message"]["reasoning"]


@pytest.mark.slow
def test_two_processes_one_of_which_is_killed(tmp_path):
    write_inputs(tmp_path)
    video = [{"type": "video", "video": str(tmp_path / "clip.mp4")}, {"type": "text", "text": "What moves?"}]
    content = b"".join(line(str(index), max_tokens=50) for index in range(12))
    content += line("video", video) + line("broken", [{"type": "image", "image": "/nowhere.png"}])
    (tmp_path / "in.jsonl").write_bytes(content)
    command = ("-m", "keye_jax.cli", "batch", "--checkpoint", tmp_path / "orbax", "--input", tmp_path / "in.jsonl")
    command += ("--output", tmp_path / "out.jsonl", "--rows", 2, "--cache-tokens", "4K", "--prefill-chunk", 256)
    command += ("--no-warmup", "--max-tokens", 4, "--sharding", SHARDING, "--processes", 2)

    def start():
        address = f"127.0.0.1:{free_port()}"
        return [begin(*command, "--coordinator", address, "--process-id", number) for number in range(2)]

    workers = start()
    try:
        while not (tmp_path / "out.jsonl").exists() or not (tmp_path / "out.jsonl").stat().st_size:
            assert all(worker.poll() is None for worker in workers), finish(workers[0])[2]
            time.sleep(0.05)
        workers[1].kill()
        code, _, err = finish(workers[0])
        assert code == 3 and f"keye-jax: process 1 ({socket.gethostname()}) is lost" in err, err
        assert 0 < len(results(tmp_path / "out.jsonl")) < 14
        for _ in range(2):  # the rest, and nothing
            workers = start()
            (code, _, err), (other, _, _) = [finish(worker) for worker in workers]
            assert (code, other) == (1, 0) and "1 of 14 requests failed" in err, err
    finally:
        for worker in workers:
            worker.kill()
    got = results(tmp_path / "out.jsonl")
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == len(got) == 14
    assert [name for name, result in got.items() if result["error"]] == ["broken"]
    assert got["video"]["response"]["body"]["usage"]["prompt_tokens_details"]["video_tokens"] > 0
