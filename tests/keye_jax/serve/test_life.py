"""A server that is asked to end, whose clients leave, whose workers die, and whose engine hangs or fails."""

import concurrent.futures
import contextlib
import json
import logging
import os
import re
import signal
import threading
import time

import httpx
import pytest

from keye_jax.serve import frames
from tests.keye_jax.serve.conftest import Running, wait_for

ASK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


def ask(server, body=ASK):
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


@pytest.fixture
def hanging(engine, monkeypatch):
    """An event for which every step of the engine waits."""
    event, run = threading.Event(), engine._stepper.run

    def hang(*arguments):
        event.wait(60)
        return run(*arguments)

    monkeypatch.setattr(engine._stepper, "run", hang)
    yield event
    event.set()


class TestDisconnect:
    @pytest.mark.parametrize("stream", [False, True])
    def test_the_answer_is_cancelled(self, server, engine, long_ask, stream):
        body = {**long_ask, "stream": stream}
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=2.0) as response,
        ):
            next(response.iter_bytes())
        wait_for(lambda: not server.service.outstanding)
        wait_for(lambda: not engine._jobs)
        steps = engine.stats().steps
        time.sleep(0.3)
        assert engine.stats().steps <= steps + 2  # nobody goes on writing


class TestHeartbeat:
    def test_silence_is_filled_with_comments(self, serving, engine, long_ask):
        server, body = serving(heartbeat_s=0.05), {**long_ask, "stream": True}

        def ask_long():
            return httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60)

        with contextlib.ExitStack() as stack:
            for _ in range(4):  # all rows
                stack.enter_context(ask_long())
            lines = stack.enter_context(ask_long()).iter_lines()
            assert next(lines).startswith(":")
        wait_for(lambda: not server.service.outstanding)


class TestDrain:
    def test_no_accepted_answer_is_lost(self, engine):
        with Running(engine) as server, concurrent.futures.ThreadPoolExecutor(16) as pool:
            sent, ended = threading.Barrier(9), []

            def keep_asking(number):
                """Asks again and again, whole and streamed, until it is refused."""
                sent.wait()
                with httpx.Client(timeout=60) as client:
                    while True:
                        body = {**ASK, "max_tokens": 12, "stream": number % 2 == 0}
                        try:
                            answer = client.post(f"{server.url}/v1/chat/completions", json=body)
                        except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                            return "closed"  # at a moment when nothing was accepted
                        if answer.status_code == 503:
                            assert int(answer.headers["retry-after"]) > 0
                            return "refused"
                        assert answer.status_code == 200
                        last = answer.text.rstrip()
                        assert last.endswith("data: [DONE]") if number % 2 == 0 else json.loads(last)["usage"]
                        ended.append(number)

            asking = [pool.submit(keep_asking, number) for number in range(8)]
            sent.wait()
            wait_for(lambda: len(ended) > 8)
            before = server.service.outstanding
            server.server.drain()
            wait_for(lambda: server.service.draining)
            with contextlib.suppress(httpx.TransportError):  # it may end meanwhile
                assert httpx.get(f"{server.url}/ready").status_code == 503
            outcomes = [each.result() for each in asking]
            server.join()
            assert before > 0 and "refused" in outcomes
            assert not server.server.failed

    def test_the_grace_ends(self, engine, long_ask, hanging):
        server = Running(engine, grace_s=0.2, heartbeat_s=0.1)
        with server, httpx.Client(timeout=60) as client:
            with client.stream(
                "POST", f"{server.url}/v1/chat/completions", json={**long_ask, "stream": True}
            ) as answer:
                assert answer.status_code == 200
                server.server.drain()
                with contextlib.suppress(httpx.RemoteProtocolError):
                    assert "data: [DONE]" not in "".join(answer.iter_text())
            server.join()
            assert server.server.failed
        hanging.set()
        wait_for(lambda: not engine.stats().requests)


class TestFaults:
    def test_a_media_worker_that_is_killed(self, server, client, engine, files):
        file = client.files.create(file=files / "clip.mp4", purpose="vision")
        video = {"type": "video_url", "video_url": {"url": f"file-id:{file.id}", "fps": 1.7}}
        content = [video, {"type": "text", "text": "What is it?"}]
        for pid in engine._media.worker_pids:
            os.kill(pid, signal.SIGKILL)
        answers = [ask(server, {**ASK, "messages": [{"role": "user", "content": content}]}) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200] * 4, [answer.text for answer in answers]

    def test_the_process_that_shows_frames_is_killed(self, server, client, files):
        file = client.files.create(file=files / "clip.mp4", purpose="vision")
        asked = {"media": f"file-id:{file.id}", "options": {"num_frames": 3}}
        first = httpx.post(f"{server.url}/v1/frames", json=asked, timeout=60).json()
        assert [each["frame"] for each in first["frames"]] == [0, 1, 2] and first["kind"] == "video"
        os.kill(server.service.frames.pid, signal.SIGKILL)
        picture = httpx.post(f"{server.url}/v1/frames/picture", json={**asked, "frame": 2, "width": 40}, timeout=60)
        assert picture.headers["content-type"] == "image/jpeg" and picture.content[:2] == b"\xff\xd8"
        outside = httpx.post(f"{server.url}/v1/frames/picture", json={**asked, "frame": 3}, timeout=60)
        assert (outside.status_code, outside.json()["error"]["message"]) == (400, "frame is 3; it must be from 0 to 2")

    def test_the_process_that_shows_frames_hangs(self, server, client, files, monkeypatch):
        """Only the request that it hangs with fails, and not those that wait behind it."""
        file = client.files.create(file=files / "clip.mp4", purpose="vision")
        asked = {"media": f"file-id:{file.id}", "options": {"num_frames": 3}}
        arrived, hung, show = threading.Event(), threading.Event(), frames._Process.ask

        def hang(process, *call, timeout):
            if hung.is_set():
                return show(process, *call, timeout=timeout)
            hung.set()
            arrived.wait(60)
            raise TimeoutError

        monkeypatch.setattr(frames._Process, "ask", hang)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            first = pool.submit(httpx.post, f"{server.url}/v1/frames", json=asked, timeout=60)
            wait_for(hung.is_set)
            second = pool.submit(httpx.post, f"{server.url}/v1/frames", json=asked, timeout=60)
            wait_for(lambda: server.service.frames._turns._work_queue.qsize())
            arrived.set()
            assert "takes too long" in first.result().json()["error"]["message"]
            assert second.result().json()["kind"] == "video"

    def test_the_engine_hangs(self, engine, long_ask, request):
        """While there is work and no step ends, the server is not healthy; when steps end again, it is."""
        with Running(engine, watchdog_s=0.6, heartbeat_s=0.1) as server:
            assert httpx.get(f"{server.url}/health").status_code == 200  # nothing to do, and no steps
            hanging = request.getfixturevalue("hanging")
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**long_ask, "stream": True}):
                wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503)
                assert ask(server).status_code == 503
                hanging.set()
                wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 200)
            wait_for(lambda: not server.service.outstanding)


class TestLog:
    def test_it_has_no_prompts_unless_asked(self, serving, caplog):
        caplog.set_level(logging.INFO, "keye_jax.serve")
        secret = {**ASK, "messages": [{"role": "user", "content": "the launch code is 1234"}]}
        assert ask(serving(), secret).status_code == 200
        wait_for(lambda: any(record.message == "request" for record in caplog.records))  # after the answer
        line = next(record.fields for record in caplog.records if record.message == "request")
        assert line["path"] == "/v1/chat/completions" and line["prompt_tokens"] > 5 and line["completion_tokens"] > 0
        assert not any("1234" in str(vars(record)) for record in caplog.records)
        assert ask(serving(log_prompts=True), secret).status_code == 200
        wait_for(lambda: any("1234" in str(vars(record)) for record in caplog.records))


class TestMetrics:
    def test_names_and_counts(self, server):
        def counts():
            lines = httpx.get(f"{server.url}/metrics").text.splitlines()
            return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

        before = counts()
        assert ask(server).status_code == 200
        after = counts()
        name = 'keye_jax_request_success_total{finished_reason="length"}'
        assert float(after[name]) == float(before.get(name, 0)) + 1
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
            name = f"keye_jax_{name}_count"
            assert float(after[name]) == float(before[name]) + 1
        assert float(after["keye_jax_ready"]) == 1

    def test_failures_by_kind(self, serving, long_ask):
        """Also of requests that never come to the engine."""
        server = serving()
        assert ask(server, {"messages": 7}).status_code == 400
        assert ask(server, {**ASK, "n": 128, "max_tokens": 5000}).status_code == 400
        assert httpx.get(f"{server.url}/nowhere").status_code == 404
        missing = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        for stream in (True, False):
            body = {**ASK, "messages": [{"role": "user", "content": [missing]}], "stream": stream}
            assert ask(server, body).status_code == 400
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**long_ask, "stream": True}) as answer:
            next(answer.iter_bytes())
        wait_for(lambda: not server.service.outstanding)

        def counts():
            lines = httpx.get(f"{server.url}/metrics").text.splitlines()
            found = (re.fullmatch(r'keye_jax_request_failure_total\{kind="(\w+)"\} (.*)', line) for line in lines)
            return {each[1]: float(each[2]) for each in found if each}

        wait_for(lambda: "client_gone" in counts())
        assert counts() == {"invalid": 1, "too_large": 1, "not_found": 1, "media": 2, "client_gone": 1}


def test_a_trace(serving, tmp_path, long_ask):
    server = serving(profile_dir=tmp_path / "traces")
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**long_ask, "stream": True}):
        written = httpx.post(f"{server.url}/debug/profile", json={"steps": 3}, timeout=120).json()
    assert written["steps"] >= 3
    assert list((tmp_path / "traces").rglob("*.xplane.pb"))
    assert httpx.post(f"{server.url}/debug/profile", json={"steps": 0}).status_code == 400
