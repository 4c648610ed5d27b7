import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import pytest

from keye_jax.engine.engine import Engine as ModelEngine
from keye_jax.engine.openai import read_chat
from keye_jax.jobs.batch import Batch, open_engine
from keye_jax.jobs.journal import JobStoppedError, Journal
from keye_jax.jobs.lines import Shard, count_lines, read_lines
from keye_jax.jobs.report import Tally
from keye_jax.runtime.sampling import SamplingParams
from tests.keye_jax.jobs.fake import FakeEngine, answer_to, answerer, line
from tests.keye_jax.jobs.test_journal import FullDisk

ROOT = Path(__file__).parents[3]
WHOLE = Shard()


class Silent:
    interval_s = 0.01

    def show(self, tally):
        tally.sentence()

    def close(self, tally):
        pass


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def jobs():
    """The jobs that `run` has run or is running."""
    return []


@pytest.fixture
def run(tmp_path, output, jobs):
    """Runs a job on the content of an input, and returns how it ended and its tally."""

    def call(content, engine=None, *, concurrency=16, grace_s=5.0, shard=WHOLE, reader=read_lines, **options):
        source = tmp_path / "in.jsonl"
        source.write_bytes(content)
        digest, lines = count_lines(source)
        key = {"input": digest, "checkpoint": "", "options": {}}
        with Journal(output, key) as journal, source.open("rb") as file, engine or FakeEngine() as engine:
            tally = Tally(shard.size(lines), journal.succeeded, journal.failures)
            job = Batch(
                answerer(engine, **options),
                journal,
                reader(file, shard),
                tally,
                Silent(),  # pyright: ignore[reportArgumentType]
                concurrency=concurrency,
                grace_s=grace_s,
            )
            jobs.append(job)
            return asyncio.run(job.run()), tally

    return call


def later(seconds, number):
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def records(output):
    return [json.loads(each) for each in output.read_bytes().splitlines()]


def outcomes(output):
    """What each line became, by its id or number, without what differs in every run."""
    found = {}
    for record in records(output):
        error = record["error"]
        key = record["custom_id"] or error["line"]
        assert key not in found, "a line has two results"
        found[key] = error or {
            name: value for name, value in record["response"]["body"].items() if name not in ("id", "created")
        }
    return found


def test_every_line_has_its_answer(run, output):
    ended, tally = run(b"".join(line(f"id{index}", f"question {index}") for index in range(100)))
    assert ended is None and (tally.succeeded, tally.failed, tally.done) == (100, 0, 100)
    for record in records(output):
        number = record["custom_id"].removeprefix("id")
        body = {"messages": [{"role": "user", "content": f"question {number}"}]}
        expected = answer_to(read_chat(body, sampling=SamplingParams()).request)
        assert record.keys() == {"id", "custom_id", "response", "error"}
        assert record["response"]["status_code"] == 200 and record["error"] is None
        assert record["response"]["body"]["choices"][0]["message"]["content"] == expected.choices[0].text
    assert len({record["id"] for record in records(output)}) == 100


def test_failed_lines_carry_their_error_and_the_job_goes_on(run, output):
    content = line("good") + line("media", "media") + line("large", "too_large") + line("defect", "defect")
    content += line("wrong", temperature="hot") + line("deep", [{"type": "sound"}]) + b"not JSON\n" + line("good")
    ended, tally = run(content)
    got = outcomes(output)
    assert ended is None and tally.succeeded == 1
    assert got["media"] == {"code": "media", "message": "it is media"}
    assert got["large"]["code"] == "too_large"
    assert got["defect"] == {"code": "internal", "message": "ZeroDivisionError: a defect"}
    assert got["wrong"] == {"code": "invalid", "message": "temperature is 'hot'; it must be a number"}
    assert "messages[0].content[0].type is 'sound'" in got["deep"]["message"]
    assert got[7]["code"] == "invalid_line" and got[7]["line"] == 7
    assert got[8]["code"] == "duplicate_custom_id" and "line 1 has the same" in got[8]["message"]
    assert tally.failures == Counter(media=1, too_large=1, internal=1, invalid=2, invalid_line=1, duplicate_custom_id=1)


class TestRetries:
    @pytest.mark.parametrize("kind", ["internal", "timeout", "unreachable"])
    def test_what_may_pass_later_is_tried_again(self, run, output, kind):
        engine = FakeEngine()
        _, tally = run(line("a", f"{kind} 2") + line("b", f"{kind} 3"), engine)
        got = outcomes(output)
        assert got["a"]["object"] == "chat.completion" and got["b"]["code"] == kind
        assert len(engine.requests) == 6
        assert tally.report()["run"]["retries"] == 4

    @pytest.mark.parametrize("kind", ["invalid", "media", "too_large"])
    def test_what_never_will_is_not(self, run, output, kind):
        engine = FakeEngine()
        run(line("a", f"{kind} 1"), engine)
        assert outcomes(output)["a"]["code"] == kind and len(engine.requests) == 1

    def test_their_number(self, run, output):
        engine = FakeEngine()
        run(line("a", "internal"), engine, retries=0)
        assert len(engine.requests) == 1


def test_the_engine_has_as_many_as_it_may_and_lines_are_read_as_needed(run, tmp_path, output):
    engine = FakeEngine(0.2, threads=32)  # in which even a busy machine submits 12
    run(b"".join(line(str(index)) for index in range(40)), engine, concurrency=12)
    assert engine.most == 12


def test_a_run_goes_on_where_the_last_one_ended(run, output):
    content = b"".join(line(str(index), "media" if index % 7 == 0 else "hi") for index in range(50)) + b"bad\n"
    run(content)
    whole = output.read_bytes()
    expected = outcomes(output)
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:20]) + lines[20][:30])
    engine = FakeEngine()
    _, tally = run(content, engine)
    assert outcomes(output) == expected and len(lines) == 51
    assert output.read_bytes().startswith(b"".join(lines[:20]))
    assert tally.done == tally.total == 51 and len(engine.requests) <= 31
    engine = FakeEngine()
    run(content, engine)
    assert not engine.requests and outcomes(output) == expected


def test_shards_together_are_the_whole(run, tmp_path, output):
    content = b"".join(line(str(index)) for index in range(23)) + line("3") + b"bad\n"
    run(content)
    expected = outcomes(output)
    got = {}
    for index in range(4):
        output.unlink()
        _, tally = run(content, shard=Shard(index, 4))
        part = outcomes(output)
        assert tally.done == tally.total == len(part) and not part.keys() & got.keys()
        got |= part
    assert got == expected


class TestEnds:
    def test_a_full_disk(self, run, output, monkeypatch):
        content = b"".join(line(str(index)) for index in range(60))
        run(content)
        expected = outcomes(output)
        size = output.stat().st_size
        output.unlink()
        for left in (0, size // 5, size // 3):
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", FullDisk(left))
                with pytest.raises(JobStoppedError, match=r"No space left on device.*the same command resumes it"):
                    run(content, FakeEngine(0.001))
            assert not output.read_bytes() or output.read_bytes().endswith(b"\n")
            assert expected.items() >= outcomes(output).items()
        run(content)
        assert outcomes(output) == expected

    def test_an_engine_that_ends(self, run, output):
        content = b"".join(line(str(index), "closed 1" if index == 20 else "hi") for index in range(60))
        with pytest.raises(JobStoppedError, match=r"the engine ended \(it is closed\); the same command resumes"):
            run(content, FakeEngine(0.001))
        assert len(outcomes(output)) < 60 and "20" not in outcomes(output)

    def test_an_input_that_cannot_be_read(self, run, output):
        def fail(file, shard):
            yield from itertools.islice(read_lines(file, shard), 5)
            raise OSError(5, "Input/output error")

        with pytest.raises(JobStoppedError, match=r"the input cannot be read \(Input/output error\)"):
            run(b"".join(line(str(index)) for index in range(9)), reader=fail)
        assert len(outcomes(output)) == 5

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_lets_running_requests_finish(self, run, output, number):
        content = b"".join(line(str(index)) for index in range(200))
        engine = FakeEngine(0.02, after={40: lambda: os.kill(os.getpid(), number)})
        ended, tally = run(content, engine, concurrency=8)
        assert ended == number
        assert 40 <= tally.done < 200 and len(outcomes(output)) == tally.done == len(engine.requests)
        ended, tally = run(content)
        assert ended is None and len(outcomes(output)) == 200

    def test_requests_that_outlive_the_grace_are_cancelled(self, run, output):
        engine = FakeEngine(after={3: lambda: later(0.1, signal.SIGTERM)})
        ended, _ = run(line("a") + line("b", "hang") + line("c", "hang"), engine, grace_s=0.1)
        assert ended == signal.SIGTERM
        assert outcomes(output).keys() == {"a"}
        engine.__exit__(wait=True)
        assert engine.cancelled == 2

    def test_a_second_signal_does_not_wait(self, run, output):
        def twice():
            later(0.1, signal.SIGINT)
            later(0.3, signal.SIGINT)

        start = time.monotonic()
        ended, _ = run(line("a", "hang"), FakeEngine(after={1: twice}), grace_s=600)
        assert ended == signal.SIGINT and time.monotonic() - start < 60

    def test_a_signal_that_another_process_of_the_job_has_got_too_counts_once(self, run, jobs):
        def everywhere():
            threading.Timer(0.1, lambda: jobs[-1].pass_signal(signal.SIGTERM)).start()
            later(0.3, signal.SIGTERM)

        engine = FakeEngine(2.0, after={1: everywhere})
        ended, tally = run(line("a") + line("b"), engine, concurrency=2)
        assert ended == signal.SIGTERM and tally.done == 2

    def test_a_defect_here_is_not_hidden(self, run, monkeypatch):
        monkeypatch.setattr("keye_jax.jobs.batch.completion_body", lambda *_, **__: 1 / 0)
        with pytest.raises(ExceptionGroup):
            run(line("a"))


@pytest.mark.parametrize("kills, count", [(3, 60), pytest.param(20, 400, marks=pytest.mark.slow)])
def test_a_job_that_is_killed_again_and_again(run, tmp_path, output, kills, count):
    texts = ("hi", "media", "internal 1", "invalid")
    content = b"".join(line(f"id {index}", texts[index % 17 % 4]) for index in range(count))
    content += b"bad\n" + line("id 5") + b"\xff\n"
    run(content)
    expected = outcomes(output)
    again = tmp_path / "again.jsonl"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.keye_jax.jobs.killed", str(tmp_path / "in.jsonl"), str(again), str(kills)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > kills / 2
    assert outcomes(again) == expected and len(expected) == count + 3


ODD = (None, True, 0, -1, 1e999, 10**400, "", "\ud800", [], {}, [[]], {"a": None}, "x" * 5000, float("nan"))


def mutated(draws: random.Random, index: int) -> bytes:
    """A line that may be valid, with a change in its bytes or in its values."""
    part = {"type": "text", "text": "hi"}
    values = {
        "custom_id": f"id{draws.randrange(index + 1) if draws.random() < 0.05 else index}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "messages": [{"role": "user", "content": [part]}],
            **{"temperature": 0.5, "n": 2, "stop": ["a"], "logit_bias": {"3": 1}, "logprobs": True, "top_logprobs": 1},
            **{"seed": 3, "max_tokens": 5, "tools": [], "user": "u", "model": "m", "stream": False},
        },
    }
    if draws.random() < 0.5:
        place: Any = values
        while True:
            key = draws.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or draws.random() < 0.3:
                break
            place = place[key]
        if draws.random() < 0.2 and isinstance(place, dict):
            place["x" + str(key)] = place.pop(key)
        else:
            place[key] = draws.choice(ODD)
        return json.dumps(values).encode() + b"\n"
    content = bytearray(json.dumps(values).encode())
    for _ in range(draws.randint(1, 4)):
        start = draws.randrange(len(content))
        end = start + draws.randint(0, 8)
        match draws.randrange(4):
            case 0:
                content[start:end] = draws.randbytes(draws.randint(1, 8))
            case 1:
                content[start:end] = b"" if len(content) > 20 else b"x"
            case 2:
                content[start:start] = content[start : start + draws.randint(1, 50)]
            case 3:
                content[start:end] = draws.choice([b"[" * 2000, b"9" * 400, b"\xef\xbb\xbf", b"\0", b"\\ud800", b'"'])
    return bytes(content).replace(b"\n", b"?") + b"\n"


def test_10000_mutated_lines_end_with_10000_results(run, output):
    draws = random.Random(0)
    content = b"".join(mutated(draws, index) for index in range(10_000))
    ended, tally = run(content, concurrency=64)
    found = outcomes(output)
    assert ended is None and len(found) == tally.done == 10_000
    codes = Counter(value.get("code") for value in found.values())
    assert codes.keys() == {None, "invalid", "invalid_line", "duplicate_custom_id"}
    assert min(codes.values()) > 100
    assert all("\n" not in value["message"] for value in found.values() if "code" in value)


@pytest.mark.parametrize("fails", [False, True])
def test_an_opened_engine_keeps_programs_and_is_closed_if_it_cannot_warm_up(monkeypatch, tmp_path, fails):
    told = []

    class Opened:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            told.append("closed")

        def warmup(self):
            told.append(jax.config.jax_compilation_cache_dir)
            if fails:
                raise RuntimeError("out of memory")

    monkeypatch.setattr(ModelEngine, "from_checkpoint", lambda *_, **settings: Opened())
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                open_engine("checkpoint")
        else:
            open_engine("checkpoint")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert told == [str(tmp_path / "keye-jax" / "xla"), *(["closed"] if fails else [])]
