"""What a server refuses: strangers, other pages, what is too large, too slow or too much."""

import concurrent.futures
import contextlib
import errno
import http.client
import resource
import socket
import time

import httpx
import openai
import pytest
from starlette.datastructures import UploadFile

from keye_jax.errors import UserError
from keye_jax.serve.options import ServeOptions
from keye_jax.serve.server import allow_connections
from keye_jax.testing import write_clip, write_picture
from tests.keye_jax.serve.conftest import wait_for

ASK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


def ask(server, body=ASK, **settings):
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60, **settings)


class TestKey:
    def test_it_is_asked_for_everywhere(self, serving):
        server = serving(api_key=b"sesame-1")
        for path in ("/health", "/ready", "/metrics"):
            assert httpx.get(f"{server.url}{path}").status_code == 200
        for path in ("/v1/models", "/v1/files", "/v1/batches"):
            assert httpx.get(f"{server.url}{path}").status_code == 401
        for key in ("sesame", "sesame-12", "Sesame-1", "x", "\u00e9"):
            assert ask(server, headers={b"authorization": f"Bearer {key}".encode()}).status_code == 401
        assert ask(server, headers={"authorization": "bearer sesame-1"}).status_code == 200
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            server.client().models.list()

    def test_without_one_nobody_else_can_reach_the_server(self):
        for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
            with pytest.raises(UserError, match=r"--host is .*unless an API key is given"):
                ServeOptions(host=host)
            ServeOptions(host=host, api_key=b"key")
        for host in ("127.0.0.1", "::1", "localhost", "127.0.0.2"):
            ServeOptions(host=host)

    def test_pages_of_others_are_refused(self, server):
        origin = {"origin": "https://evil.example"}
        assert ask(server, headers=origin).status_code == 403
        assert ask(server, headers={"origin": server.url}).status_code == 200
        # A name of theirs that leads here, of a page that is its own origin.
        rebound = {"host": "evil.example", "origin": "http://evil.example"}
        assert ask(server, headers=rebound).status_code == 403
        assert ask(server, headers={"host": "["}).status_code == 403

    def test_origins_that_are_allowed(self, server, serving):
        asked = {"origin": "https://good.example", "access-control-request-method": "POST"}
        asked["access-control-request-headers"] = "authorization,x-stainless-lang"
        assert "access-control-allow-origin" not in httpx.options(f"{server.url}/v1/models", headers=asked).headers
        open_one = serving(cors_origins=("https://good.example",))
        answer = httpx.options(f"{open_one.url}/v1/models", headers=asked)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        assert ask(open_one, headers={"origin": "https://good.example"}).status_code == 200
        assert ask(open_one, headers={"origin": "https://evil.example"}).status_code == 403


class TestLimits:
    def test_a_body_that_is_too_large(self, serving):
        server = serving(max_body_bytes=10_000, max_file_bytes=20_000, max_stored_bytes=25_000)
        large = ask(server, {**ASK, "user": "x" * 20_000})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")

        def endless():
            for _ in range(1000):
                yield b" " * 1000

        answer = httpx.post(f"{server.url}/v1/chat/completions", content=endless())
        assert answer.status_code == 413
        client = server.client()
        client.files.create(file=("a.mp4", b"x" * 15_000), purpose="vision")
        with pytest.raises(openai.APIStatusError, match="all files together") as caught:
            client.files.create(file=("b.mp4", b"x" * 15_000), purpose="vision")
        assert caught.value.status_code == 413
        with pytest.raises(openai.APIStatusError, match="at most 20,000 bytes"):
            client.files.create(file=("c.mp4", b"x" * 21_000), purpose="vision")
        assert ask(server).status_code == 200

    def test_uploads_for_which_there_is_no_room(self, serving):
        """They are refused before they come, or while they do, and count from their beginning."""
        server = serving(max_stored_bytes=100_000, max_file_bytes=1 << 30)
        client, boundary = server.client(), "--x\r\n"
        head = "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"

        def begin(length):
            connection = socket.create_connection(("127.0.0.1", server.port), 30)
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n{boundary}".encode())
            return connection

        with begin(300_000) as refused:
            assert b" 413 " in refused.recv(4096)

        def pieces():
            yield f'{boundary}Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'.encode()
            for _ in range(100):
                yield bytes(10_000)

        kind = {"content-type": "multipart/form-data; boundary=x"}
        answer = httpx.post(f"{server.url}/v1/files", content=pieces(), headers=kind)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "storage_full")
        with begin(150_000):
            wait_for(lambda: server.service.outstanding == 0 and server.service.files._reserved)
            with pytest.raises(openai.APIStatusError, match="all files together"):
                client.files.create(file=("a", bytes(50_000)), purpose="user_data")
        wait_for(lambda: not server.service.files._reserved)
        client.files.create(file=("a", bytes(100_000)), purpose="user_data")

    def test_a_full_disk(self, client, monkeypatch):
        async def full(file, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(UploadFile, "write", full)
        with pytest.raises(openai.APIStatusError, match=r"cannot be stored \(No space left") as caught:
            client.files.create(file=("a", b"x"), purpose="user_data")
        assert caught.value.status_code == 507

    def test_media_that_are_too_large(self, client, tmp_path):
        write_clip(tmp_path / "long.mp4", seconds=12, fps=2, size=(112, 112))
        write_picture(tmp_path / "large.png", size=(700, 700))
        for name, kind, words in (("long.mp4", "video", "12 seconds"), ("large.png", "image", "700x700 pixels")):
            file = client.files.create(file=tmp_path / name, purpose="vision")
            part = {"type": f"{kind}_url", f"{kind}_url": {"url": f"file-id:{file.id}"}}
            with pytest.raises(openai.BadRequestError, match=words):
                client.chat.completions.create(model="x", messages=[{"role": "user", "content": [part]}])

    def test_addresses_that_are_not_public(self, client):
        """The whole table is in tests/keye_jax/processor/test_guard.py."""
        for url in ("http://127.0.0.1:1/a.png", "http://[::ffff:10.0.0.1]/a.png", "http://169.254.169.254/a.png"):
            part = {"type": "image_url", "image_url": {"url": url}}
            with pytest.raises(openai.BadRequestError, match="public addresses only"):
                client.chat.completions.create(model="x", messages=[{"role": "user", "content": [part]}])

    def test_more_tokens_than_are_allowed(self, serving):
        server = serving(max_tokens=5)
        assert ask(server, {**ASK, "max_tokens": 6}).status_code == 400
        body = {name: value for name, value in ASK.items() if name != "max_tokens"}
        assert ask(server, body).json()["usage"]["completion_tokens"] <= 5

    def test_a_full_queue(self, serving, long_ask):
        server = serving(max_queue=1, heartbeat_s=0.1)  # and 4 rows
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                opened = stack.enter_context(
                    httpx.stream(
                        "POST", f"{server.url}/v1/chat/completions", json={**long_ask, "stream": True}, timeout=60
                    )
                )
                assert opened.status_code == 200
            refused = ask(server)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            assert 'request_failure_total{kind="queue_full"} 1.0' in httpx.get(f"{server.url}/metrics").text
            assert httpx.get(f"{server.url}/health").status_code == 200
            assert ask(server, {**ASK, "n": 6}).status_code == 400  # never possible here
        wait_for(lambda: not server.service.outstanding)
        assert ask(server).status_code == 200

    def test_headers_of_answers(self, server):
        headers = httpx.get(f"{server.url}/health").headers
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
        assert "server" not in headers
        given = httpx.get(f"{server.url}/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"]
        assert given == "mine-1"
        forged = httpx.get(f"{server.url}/health", headers={"x-request-id": "a b"}).headers["x-request-id"]
        assert forged.startswith("req_")

    def test_an_uploaded_page_is_no_page_of_this_server(self, server, client):
        file = client.files.create(file=("a.html", b"<script>alert(1)</script>"), purpose="user_data")
        headers = httpx.get(f"{server.url}/v1/files/{file.id}/content").headers
        assert headers["content-type"] == "application/octet-stream"
        assert headers["content-disposition"].startswith("attachment")
        assert headers["content-security-policy"] == "sandbox"


class TestConnections:
    """Clients that hold connections open and do nothing."""

    @pytest.fixture
    def impatient(self, serving):
        return serving(stall_s=2.0)

    @pytest.fixture
    def connect(self, impatient):
        with contextlib.ExitStack() as stack:

            def connect(sent=b""):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", impatient.port), 30))
                connection.sendall(sent)
                return connection

            yield connect

    def test_heads_and_bodies_that_do_not_come(self, impatient, connect):
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        silent, half_head = connect(), connect(head)
        half_body = connect(head + b"Content-Length: 100\r\n\r\n{")
        second = connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answered = b""
        while not answered.endswith(b"}\n"):
            answered += second.recv(4096)
        second.sendall(b"GET /hea")  # and no more
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(1) == b""
        with contextlib.suppress(ConnectionResetError):
            assert half_head.recv(1) == b""
        assert b" 408 " in half_body.recv(4096)
        with contextlib.suppress(ConnectionResetError):
            assert second.recv(1) == b""
        assert time.monotonic() - began < 20
        assert ask(impatient).status_code == 200

    def test_a_body_that_drips(self, connect):
        """Each byte comes in time, and all of them too late."""
        dripping = connect(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        dripping.settimeout(0.2)
        answer, end = b"", time.monotonic() + 20
        while not answer and time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                dripping.sendall(b" ")
                answer = dripping.recv(4096)
        assert b" 408 " in answer

    def test_there_may_be_as_many_as_are_allowed(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            low = min(512, hard - 1)
            resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
            allow_connections(low)
            assert low < resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            allow_connections(0)
            assert low < resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_probes_are_answered_beside_too_many_connections(self, serving):
        """Or else an orchestrator would end a server that is only busy."""
        server = serving(max_connections=3)
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
            wait_for(lambda: server.service.connections() > 3)
            assert [httpx.get(f"{server.url}{path}").status_code for path in ("/health", "/ready", "/metrics")] == [
                *(200, 200, 200),
            ]
            refused = ask(server)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
            assert int(refused.headers["retry-after"]) >= 1 and refused.headers["connection"] == "close"
        wait_for(lambda: server.service.connections() < 3)
        assert ask(server).status_code == 200

    def test_a_client_that_does_not_read(self, impatient, connect):
        server = impatient  # sockets hold some MiB for it
        file = server.client().files.create(file=("large", bytes(64 << 20)), purpose="user_data")
        stuck = connect(f"GET /v1/files/{file.id}/content HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        wait_for(lambda: server.server.server_state.tasks)
        wait_for(lambda: not server.server.server_state.tasks, seconds=20)
        with contextlib.suppress(ConnectionResetError):
            received = 0
            while data := stuck.recv(1 << 20):
                received += len(data)
            assert received < 64 << 20

    def test_a_slow_reader_gets_all(self, impatient):
        server = impatient
        file = server.client().files.create(file=("large", bytes(4 << 20)), purpose="user_data")
        slow = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        slow.request("GET", f"/v1/files/{file.id}/content")
        response = slow.getresponse()
        size = 0
        while data := response.read(256 << 10):
            size += len(data)
            time.sleep(0.2)  # 3.2 s in all, longer than it may stand still
        assert size == 4 << 20

    def test_two_hundred_at_once(self, server):
        with (
            httpx.Client(limits=httpx.Limits(max_connections=200), timeout=300) as client,
            concurrent.futures.ThreadPoolExecutor(200) as pool,
        ):

            def one(number):
                body = {**ASK, "max_tokens": 1, "stream": number % 2 == 0}
                return client.post(f"{server.url}/v1/chat/completions", json=body)

            answers = list(pool.map(one, range(200)))
        assert {answer.status_code for answer in answers} == {200}
        assert all(answer.text.rstrip().endswith(("}", "data: [DONE]")) for answer in answers)
