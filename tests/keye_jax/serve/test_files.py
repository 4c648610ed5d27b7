"""The store of files, without a server."""

import io

import pytest

from keye_jax.serve.errors import Refusal
from keye_jax.serve.files import FileStore


@pytest.fixture
def store(tmp_path):
    return FileStore(tmp_path, 100)


def add(store, content):
    with store.room() as room:
        return store.add(io.BytesIO(content), len(content), "a", "user_data", room)["id"]


def test_a_file_that_is_deleted_while_it_is_used(store, tmp_path):
    file_id = add(store, b"content")
    with store.use(file_id) as path, store.use(file_id):
        store.delete(file_id)
        assert path.read_bytes() == b"content" and not store.list()
        with pytest.raises(Refusal, match="there is no file"), store.use(file_id):
            pass
    assert not list(tmp_path.iterdir())


def test_one_that_was_deleted_before_the_server_was_killed(store, tmp_path):
    kept, deleted = add(store, b"kept"), add(store, b"deleted")
    using = store.use(deleted)
    using.__enter__()
    store.delete(deleted)
    (tmp_path / "other").mkdir()  # none of its own
    assert [each["id"] for each in FileStore(tmp_path, 100).list()] == [kept]
    assert {each.name for each in tmp_path.iterdir()} == {kept, "other"}


def test_room(store):
    add(store, b"x" * 40)
    with store.room() as first, store.room() as second:
        first.hold(50)
        with pytest.raises(Refusal, match="at most 100 bytes") as caught:
            second.hold(11)
        assert caught.value.status == 413
        second.hold(10)
        first.hold(0)
        second.hold(60)
    add(store, b"x" * 60)
    with pytest.raises(Refusal):
        add(store, b"x")
