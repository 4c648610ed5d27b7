"""Jobs with a model: `keye-jax batch` in processes that are killed, or that find the disk full."""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.keye_jax.jobs.fake import line

ROOT = Path(__file__).parents[3]
LINES = 120

pytestmark = pytest.mark.slow


def real_lines(directory: Path, count: int) -> bytes:
    """Lines about texts, a clip, a picture, and a picture that is not there. Half of them are sampled."""
    media = {0: ("video", directory / "clip.mp4"), 1: ("image", directory / "picture.png"), 2: ("image", "/none.png")}
    lines = []
    for index in range(count):
        parts: list[dict[str, object]] = [{"type": "text", "text": f"What is {index}?"}]
        if index % 6 in media:
            kind, path = media[index % 6]
            parts.insert(0, {"type": f"{kind}_url", f"{kind}_url": {"url": str(path)}})
        lines.append(line(str(index), parts, max_tokens=12, temperature=index // 6 % 2, seed=index))
    return b"".join(lines) + b"bad\n"


@pytest.fixture(scope="module")
def start(files, tmp_path_factory):
    """Starts the command."""
    source = tmp_path_factory.mktemp("input") / "in.jsonl"
    source.write_bytes(real_lines(files, LINES))
    engine = ("--rows", 4, "--cache-tokens", "8K", "--prefill-chunk", 128, "--dtype", "float32", "--no-warmup")
    media = ("--max-pixels", 50176, "--media-workers", 1)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def call(output: Path) -> subprocess.Popen[str]:
        job = ("--checkpoint", files / "checkpoint", "--input", source, "--output", output)
        command = [sys.executable, "-m", "keye_jax.cli", "batch", *map(str, (*job, *engine, *media))]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    return call


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and what was said."""
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def answers(output: Path) -> dict[str | int, object]:
    """The answers, or the error, of each line; each has one result."""
    found = {}
    for record in map(json.loads, output.read_bytes().splitlines()):
        key = record["custom_id"] or record["error"]["line"]
        assert key not in found, "a line has two results"
        found[key] = record["error"] or record["response"]["body"]["choices"]
    return found


def wait_for(output: Path, process: subprocess.Popen[str], lines: int, seconds: float = math.inf) -> None:
    """Waits until there are so many results, the time is over, or the process has ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < lines):
        if time.monotonic() > end:
            return
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """The answers of a run that nothing happens to, and the seconds until it has the first one."""
    output, begun = tmp_path_factory.mktemp("undisturbed") / "out.jsonl", time.monotonic()
    process = start(output)
    wait_for(output, process, 2)  # the bad line needs no engine
    first = time.monotonic() - begun
    code, err = ended(process)
    assert code == 1 and "21 of 121 requests failed" in err
    return answers(output), first


def test_a_job_that_is_killed_again_and_again(start, undisturbed, tmp_path):
    """At any moment: while it starts, and while it answers."""
    expected, first = undisturbed
    output, draws, killed = tmp_path / "out.jsonl", random.Random(0), 0
    for number in range(20):
        before = output.read_bytes().count(b"\n") if output.exists() else 0
        process = start(output)
        wait_for(output, process, before + draws.randint(1, 4), draws.uniform(0, first) if number % 2 else math.inf)
        time.sleep(draws.uniform(0, 0.02))
        process.kill()
        ended(process)
        killed += process.returncode == -signal.SIGKILL
    assert killed > 10
    code, err = ended(start(output))
    assert code == 1 and "of 121 requests failed" in err
    assert answers(output) == expected and len(expected) == LINES + 1


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="files of another process can be limited on Linux only")
def test_a_full_disk(start, undisturbed, tmp_path):
    expected, _ = undisturbed
    output = tmp_path / "out.jsonl"
    process = start(output)
    wait_for(output, process, 10)
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (output.stat().st_size + 3000, hard))
    code, err = ended(process)
    assert code == 3 and "cannot be written (File too large); the same command resumes it" in err
    some = answers(output)
    assert 10 <= len(some) <= LINES and some.items() <= expected.items()
    assert ended(start(output))[0] == 1
    assert answers(output) == expected
