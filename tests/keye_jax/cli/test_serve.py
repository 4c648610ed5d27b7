"""The command as a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from tests.keye_jax.processes import free_port

SMALL = ("--dtype", "float32", "--prefill-chunk", "128", "--rows", "2", "--cache-tokens", "4K", "--max-context", "2048")


def start(inputs, port, *arguments):
    command = [sys.executable, "-m", "keye_jax.cli", "serve", "--checkpoint", inputs / "hf", "--port", port]
    return subprocess.Popen(
        [str(each) for each in (*command, *SMALL, *arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def status(port, path):
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30).status_code
    except httpx.TransportError:
        return None


@pytest.mark.slow
def test_it_serves_drains_and_ends(inputs, tmp_path):
    port = free_port()
    server = start(inputs, port, "--no-warmup", "--state-dir", tmp_path / "state")
    try:
        seen = []
        while (code := status(port, "/ready")) != 200:
            assert server.poll() is None
            if code is not None:  # it loads the model
                seen.append((code, status(port, "/health")))
            time.sleep(0.2)
        assert set(seen) == {(503, 200)}
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=300) as answer:
            texts = answer.iter_text()
            first = next(texts)
            server.send_signal(signal.SIGTERM)
            assert (first + "".join(texts)).rstrip().endswith("data: [DONE]")
        _, log = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["message"] for line in lines] == ["listening", "ready", "draining", "request"]


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
