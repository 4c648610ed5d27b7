"""Files and batches, also over a restart."""

import errno
import json

import httpx
import openai
import pytest

from keye_jax.jobs.lines import ENDPOINT
from keye_jax.serve import batches
from tests.keye_jax.serve.conftest import Running, wait_for


def lines(count, **fields):
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, **fields}
    rows = [
        {"custom_id": f"r{i}", "method": "POST", "url": ENDPOINT, "body": {**body, "seed": i}} for i in range(count)
    ]
    return "\n".join(map(json.dumps, rows)).encode()


def create(client, content):
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata={"a": "b"})


def ended(client, batch):
    wait_for(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed", "cancelled"))
    return client.batches.retrieve(batch.id)


def results(client, file_id):
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


class TestFiles:
    def test_their_life(self, client):
        made = client.files.create(file=("clip \u00e9/..\\.mp4", b"content"), purpose="user_data")
        assert (made.bytes, made.purpose, made.status) == (7, "user_data", "processed")
        assert "/" not in made.filename and "\\" not in made.filename
        assert made.id in [each.id for each in client.files.list()]
        assert client.files.retrieve(made.id) == made
        assert client.files.content(made.id).read() == b"content"
        assert client.files.delete(made.id).deleted
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            client.files.content(made.id)

    @pytest.mark.parametrize("name", ["../../etc/passwd", "file-000000000000000000000000", "%2e%2e"])
    def test_what_is_not_there(self, client, name):
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(name)

    def test_pages_of_the_list(self, client):
        made = {client.files.create(file=("a", b"x"), purpose="user_data").id for _ in range(3)}
        assert made <= {each.id for each in client.files.list(limit=2)}

    def test_a_wrong_purpose(self, client):
        with pytest.raises(openai.BadRequestError, match="purpose is 'evil'") as caught:
            client.files.create(file=("a", b"x"), purpose="evil")
        assert caught.value.param == "purpose"

    def test_one_that_is_deleted_while_it_is_sent(self, server, client):
        file, size = client.files.create(file=("large", bytes(64 << 20)), purpose="user_data"), 0
        with httpx.stream("GET", f"{server.url}/v1/files/{file.id}/content", timeout=60) as answer:
            pieces = answer.iter_bytes()
            size = len(next(pieces))  # sockets do not hold the rest
            client.files.delete(file.id)
            size += sum(map(len, pieces))
        assert (answer.status_code, size) == (200, 64 << 20)
        wait_for(lambda: not (server.service.files._folder / file.id).exists())


class TestBatches:
    def test_one(self, client, files):
        clip = client.files.create(file=files / "clip.mp4", purpose="vision")
        part = {"type": "video_url", "video_url": {"url": f"file-id:{clip.id}"}}
        asked = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
        video = {"custom_id": "video", "method": "POST", "url": ENDPOINT, "body": asked}
        bad = {"custom_id": "bad", "method": "POST", "url": ENDPOINT, "body": {"messages": 1}}
        batch = ended(client, create(client, b"\n".join([lines(2), *(json.dumps(x).encode() for x in (video, bad))])))
        assert (batch.status, batch.metadata) == ("completed", {"a": "b"})
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (4, 3, 1)
        answered = {each["custom_id"]: each for each in results(client, batch.output_file_id)}
        assert set(answered) == {"r0", "r1", "video"}
        assert answered["video"]["response"]["body"]["usage"]["prompt_tokens_details"]["video_tokens"] > 0
        (failed,) = results(client, batch.error_file_id)
        assert (failed["custom_id"], failed["error"]["code"]) == ("bad", "invalid")
        with pytest.raises(openai.ConflictError, match="the batch is completed"):
            client.batches.cancel(batch.id)

    def test_a_restart_loses_nothing_and_does_nothing_twice(self, engine, tmp_path):
        with Running(engine, state_dir=tmp_path, grace_s=20) as server:
            batch = create(server.client(), lines(30))
            kept = tmp_path / "batches" / f"{batch.id}.jsonl"
            wait_for(lambda: kept.exists() and kept.read_bytes().count(b"\n") > 3)
            server.server.drain()
            server.join()
        before = kept.read_bytes()
        assert 3 < before.count(b"\n") < 30
        with Running(engine, state_dir=tmp_path) as server:
            client = server.client()
            batch = ended(client, batch)
            assert batch.status == "completed"
            names = [each["custom_id"] for each in results(client, batch.output_file_id)]
            assert sorted(names) == sorted(f"r{i}" for i in range(30))
            assert kept.read_bytes().startswith(before)
        with Running(engine, state_dir=tmp_path) as server:
            assert len(results(server.client(), batch.output_file_id)) == 30

    def test_one_that_is_cancelled(self, client, long_ask):
        batch = create(client, lines(10, **{name: long_ask[name] for name in ("logit_bias", "max_tokens")}))
        wait_for(lambda: client.batches.retrieve(batch.id).status == "in_progress")
        client.batches.cancel(batch.id)
        assert ended(client, batch).status == "cancelled"
        assert batch.id in [each.id for each in client.batches.list()]

    def test_a_failure_that_cannot_be_stored(self, server, client, monkeypatch):
        """It is told all the same, and others go on."""
        store, refused = batches.write_whole, []

        def full(path, pieces):
            if b'"status": "failed"' in (content := b"".join(pieces)):
                refused.append(path)
                raise OSError(errno.ENOSPC, "No space left on device")
            store(path, [content])

        monkeypatch.setattr(batches, "write_whole", full)
        failed = ended(client, create(client, b"\n"))
        assert failed.status == "failed" and "no lines" in failed.errors.data[0].message and len(refused) == 1
        assert ended(client, create(client, lines(1))).status == "completed"

    def test_one_that_cannot_be_stored(self, client, monkeypatch):
        def full(path, pieces):
            raise OSError(errno.ENOSPC, "No space left on device")

        before = [each.id for each in client.batches.list()]
        with monkeypatch.context() as patch, pytest.raises(openai.APIStatusError) as caught:
            patch.setattr(batches, "write_whole", full)
            create(client, lines(1))
        assert caught.value.status_code == 507
        assert [each.id for each in client.batches.list()] == before

    def test_what_is_refused(self, client):
        empty = ended(client, create(client, b"\n"))
        assert empty.status == "failed" and "no lines" in empty.errors.data[0].message
        other = client.files.create(file=("a", b"x"), purpose="vision")
        for fields, param in (
            ({"endpoint": "/v1/embeddings"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"input_file_id": other.id}, "input_file_id"),
        ):
            whole = {"endpoint": ENDPOINT, "completion_window": "24h", "input_file_id": other.id, **fields}
            with pytest.raises(openai.BadRequestError) as caught:
                client.batches.create(**whole)
            assert caught.value.param == param
