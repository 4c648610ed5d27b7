"""The command as a process of its own."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.keye_jax.processes import SHARDING, begin, finish, free_port, write_inputs

SMALL = ("--dtype", "float32", "--prefill-chunk", "128", "--rows", "2", "--cache-tokens", "4K", "--max-context", "2048")


def start(inputs, port, *arguments, name="hf"):
    command = [sys.executable, "-m", "keye_jax.cli", "serve", "--checkpoint", inputs / name, "--port", port]
    return subprocess.Popen(
        [str(each) for each in (*command, *SMALL, *arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # compiles faster
    )


def status(port, path):
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30).status_code
    except httpx.TransportError:
        return None


def wait_until_ready(port, *servers):
    """Waits for a server; returns what /ready and /health say meanwhile."""
    seen = set()
    while (code := status(port, "/ready")) != 200:
        assert all(server.poll() is None for server in servers)
        if code is not None:  # it loads the model
            seen.add((code, status(port, "/health")))
        time.sleep(0.2)
    return seen


def no_end(checkpoint):
    """Fields of a request whose answer ends at its limit alone."""
    ends = json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"]
    return {"logit_bias": {str(token): -100 for token in ends}}


def stream(port, **fields):
    """The text of a streamed answer; its beginning is told by `begun`, if it is among the fields."""
    begun = fields.pop("begun", None)
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True, **fields}
    text = ""
    with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=300) as answer:
        assert answer.status_code == 200, answer.read()
        for piece in answer.iter_text():
            text += piece
            if begun is not None:
                begun.set()
    return text


def whole_answer(port, **fields):
    body = {"messages": [{"role": "user", "content": "hello"}], **fields}
    return httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=300).json()


@pytest.mark.slow
def test_it_serves_drains_and_ends(inputs, tmp_path):
    """All that was accepted before SIGTERM is answered: streams that run, and requests that wait for a row."""
    port = free_port()
    server = start(inputs, port, "--no-warmup", "--state-dir", tmp_path / "state", "--heartbeat", 0.2)
    asked = {"max_tokens": 200, **no_end(inputs / "hf")}
    try:
        assert wait_until_ready(port, server) == {(503, 200)}
        stream(port, max_tokens=2)  # everything is compiled
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            begun = [threading.Event() for _ in range(6)]  # of which two have rows, and the others get comments
            answers = [pool.submit(stream, port, **asked, seed=i, begun=each) for i, each in enumerate(begun)]
            whole = pool.submit(whole_answer, port, **asked)
            for each in begun:
                assert each.wait(120)
            server.send_signal(signal.SIGTERM)
            refused = None
            while refused is None and server.poll() is None:
                late = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json={}, timeout=60)
                refused = late if late.status_code == 503 else None
            assert refused is not None and refused.json()["error"]["code"] == "draining"
            assert int(refused.headers["retry-after"]) > 0
            for answer in answers:
                text = answer.result()
                assert text.rstrip().endswith("data: [DONE]") and '"finish_reason":"length"' in text.replace(": ", ":")
            assert whole.result()["usage"]["completion_tokens"] == 200
        _, log = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0
    lines = [json.loads(line)["message"] for line in log.splitlines()]
    assert [line for line in lines if line != "request"] == ["listening", "ready", "draining"]


@pytest.mark.slow
def test_two_processes_with_one_model(tmp_path):
    """Process 0 serves. SIGTERM to the other one drains it all the same."""
    write_inputs(tmp_path)
    port, coordinator = free_port(), f"127.0.0.1:{free_port()}"
    command = ("-m", "keye_jax.cli", "serve", "--checkpoint", tmp_path / "orbax", "--port", port, "--no-warmup")
    command += (*SMALL, "--sharding", SHARDING, "--processes", 2, "--coordinator", coordinator, "--heartbeat", 0.2)
    servers = [begin(*command, "--process-id", number) for number in range(2)]
    try:
        wait_until_ready(port, *servers)
        assert whole_answer(port, max_tokens=3)["usage"]["completion_tokens"] <= 3
        asked = {"max_tokens": 100, **no_end(tmp_path / "hf")}
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            begun = [threading.Event() for _ in range(4)]
            answers = [pool.submit(stream, port, **asked, seed=i, begun=each) for i, each in enumerate(begun)]
            for each in begun:
                assert each.wait(120)
            servers[1].send_signal(signal.SIGTERM)
            for answer in answers:
                assert answer.result().rstrip().endswith("data: [DONE]")
        (code, _, log), (other, _, _) = [finish(server) for server in servers]
    finally:
        for server in servers:
            server.kill()
    assert (code, other) == (0, 128 + signal.SIGTERM), log
    assert "process 1" in log and "draining" in log


class TestMistakes:
    @pytest.fixture
    def refused(self, keye, inputs):
        def call(*arguments):
            code, out, err = keye("serve", "--checkpoint", inputs / "hf", *arguments)
            assert (code, out, err.count("\n")) == (2, "", 1)
            return err

        return call

    def test_a_port_in_use(self, refused):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert f"--port is {port}; they must be free to listen on" in refused("--port", port)

    def test_values(self, refused, tmp_path):
        (tmp_path / "key").write_text("two words\n")
        for arguments, said in (
            (("--host", "0.0.0.0"), "--host is '0.0.0.0', which others can reach"),
            (("--host", "no.such.host.invalid"), "unless an API key is given"),
            (("--port", 70000), "--port is 70000"),
            (("--api-key-file", tmp_path / "none"), "it must be a file that can be read"),
            (("--api-key-file", tmp_path / "key"), "one line of visible ASCII"),
            (("--media-root", tmp_path / "none"), "--media-root is"),
            (("--max-queue", -1), "--max-queue is -1"),
            (("--heartbeat", 0), "--heartbeat is 0"),
            (("--rows", 0), "--rows is 0"),
            (("--max-body", 0), "--max-body is 0"),
        ):
            assert said in refused(*arguments)

    def test_a_host_that_is_not_here(self, refused, monkeypatch):
        monkeypatch.setenv("KEYE_JAX_API_KEY", "sesame")
        assert "--host is '192.0.2.1'" in refused("--host", "192.0.2.1")
