"""Files that clients upload, and where messages name them."""

from __future__ import annotations

import contextlib
import json
import mimetypes
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from keye_jax.errors import UserError, shorten
from keye_jax.jobs.journal import write_whole
from keye_jax.serve.errors import Refusal

PURPOSES = ("batch", "vision", "user_data")
OUTPUT_PURPOSE = "batch_output"
NAME_PREFIX = "file-id:"
"""What stands before the id of a file where a message has a URL."""

_ID = re.compile(r"file-[0-9a-f]{24}")
_KEYS = ("image_url", "video_url", "image", "video", "url", "path", "source", "file")
_PIECE = 1 << 20
_MOST_FILENAME = 255


class FileStore:
    """A folder of uploaded files. Any thread may call the methods.

    Each has a folder of its own, with `content` and with `file.json`, the object that clients see.

    Args:
      folder: where they stay between runs; None for a folder that goes with the server.
      max_bytes: of all files together, also of those that are still on their way.
    """

    def __init__(self, folder: Path | None, max_bytes: int):
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="keye-jax-files-")
        self._folder = folder or Path(self._temporary.name)  # pyright: ignore[reportOptionalMemberAccess]
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._files: dict[str, dict[str, Any]] = {}
        self._users: Counter[str] = Counter()  # how many read a file
        self._reserved = 0
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            try:
                self._files[path.name] = json.loads((path / "file.json").read_bytes())
            except FileNotFoundError:  # the server ended while it took or removed a file
                if _ID.fullmatch(path.name.removeprefix("new-")):
                    shutil.rmtree(path, ignore_errors=True)
            except (OSError, ValueError):
                continue  # none of ours, or damaged: it is kept and not shown

    def close(self) -> None:
        """Removes the files that do not stay."""
        if self._temporary is not None:
            self._temporary.cleanup()

    @contextlib.contextmanager
    def room(self) -> Iterator[Room]:
        """Room that is kept for a file until it is in the store, or the context ends."""
        room = Room(self)
        try:
            yield room
        finally:
            room.hold(0)

    def add(
        self, source: BinaryIO, size: int, filename: str, purpose: str, room: Room, file_id: str | None = None
    ) -> dict[str, Any]:
        """Copies a file of `size` bytes into the store; returns the object that clients see.

        Args:
          room: what the file takes of the store.
          file_id: of a file that may be there already, from before a restart; it then stays as it is.

        Raises:
          Refusal: there is no room.
        """
        file_id = file_id or f"file-{uuid.uuid4().hex[:24]}"
        with self._lock:
            if file_id in self._files:
                return self._files[file_id]
        values = {
            "id": file_id,
            "object": "file",
            "bytes": size,
            "created_at": int(time.time()),
            "filename": filename[:_MOST_FILENAME],
            "purpose": purpose,
            "status": "processed",
        }
        room.hold(size)
        made = self._folder / f"new-{file_id}"
        try:
            made.mkdir()
            with (made / "content").open("wb") as file:
                shutil.copyfileobj(source, file, _PIECE)
                os.fsync(file.fileno())
            write_whole(made / "file.json", [json.dumps(values).encode()])
            made.rename(self._folder / file_id)
        except BaseException as error:
            shutil.rmtree(made, ignore_errors=True)
            if isinstance(error, OSError):
                raise not_stored(error) from error
            raise
        with self._lock:
            self._files[file_id] = values
        return values

    def list(self) -> list[dict[str, Any]]:
        """The objects of all files, the newest first."""
        with self._lock:
            return sorted(self._files.values(), key=lambda each: (each["created_at"], each["id"]), reverse=True)

    def get(self, file_id: object) -> dict[str, Any]:
        """The object of a file. Raises Refusal if it is not there."""
        with self._lock:
            found = self._files.get(file_id) if isinstance(file_id, str) else None
        if found is None:
            raise _not_there(file_id)
        return found

    def path(self, file_id: object) -> Path:
        """Where the content of a file is. Raises Refusal if it is not there."""
        return self._folder / self.get(file_id)["id"] / "content"

    @contextlib.contextmanager
    def use(self, file_id: object) -> Iterator[Path]:
        """Where the content of a file is, and stays until the context ends, also if the file is deleted meanwhile.

        Raises Refusal if it is not there.
        """
        with self._lock:
            found = self._files.get(file_id) if isinstance(file_id, str) else None
            if found is not None:
                self._users[found["id"]] += 1
        if found is None:
            raise _not_there(file_id)
        name = found["id"]
        try:
            yield self._folder / name / "content"
        finally:
            with self._lock:
                self._users[name] -= 1
                ended = not self._users[name]
                if ended:
                    del self._users[name]
                unwanted = ended and name not in self._files
            if unwanted:
                shutil.rmtree(self._folder / name, ignore_errors=True)

    def delete(self, file_id: str) -> None:
        """Removes a file. Raises Refusal if it is not there."""
        with self._lock:
            if self._files.pop(file_id, None) is None:
                raise _not_there(file_id)
            in_use = file_id in self._users
        if in_use:  # whoever uses it last removes the rest; without this it is not there after a restart
            (self._folder / file_id / "file.json").unlink(missing_ok=True)
        else:
            shutil.rmtree(self._folder / file_id, ignore_errors=True)

    def resolve(self, value: Any) -> Any:
        """Messages, or a part of them, with paths in the place of the names of files.

        A name stands where a URL would, `file-id:file-...`, or in a part {"type": "file", "file": {"file_id": ...}}.

        Raises:
          UserError: a file is not there.
        """
        if isinstance(value, Mapping):
            part = self._file_part(value)
            if part is not None:
                return part
            return {key: self._source(each) if key in _KEYS else self.resolve(each) for key, each in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return [self.resolve(each) for each in value]
        return value

    def _source(self, value: Any) -> Any:
        """What stands where a URL may be: a text, or objects and lists with texts."""
        if isinstance(value, str):
            name = value.strip()
            return self._named(name.removeprefix(NAME_PREFIX)) if name.startswith(NAME_PREFIX) else value
        if isinstance(value, list):
            return [self._source(each) for each in value]
        return self.resolve(value)

    def _file_part(self, value: Mapping[str, Any]) -> dict[str, Any] | None:
        """A part that names a file by its id, as a part of the file's kind; None if `value` is something else."""
        if value.get("type") not in ("file", "input_file", "input_image", "input_video", "image_file"):
            return None
        inner = value.get("file", value.get("image_file"))
        inner = inner if isinstance(inner, Mapping) else value
        if not isinstance(inner.get("file_id"), str):
            return None
        path = self._named(inner["file_id"])
        kind = "video" if value["type"] == "input_video" else "image" if "image" in value["type"] else None
        if kind is None:
            filename = self.get(inner["file_id"])["filename"]
            kind = (mimetypes.guess_type(filename, strict=False)[0] or "").partition("/")[0]
            if kind not in ("image", "video"):
                name = f"the file {inner['file_id']} has the name {shorten(filename)}"
                raise UserError(f"{name}; it must be that of an image or a video, or stand in a part of such a type")
        options = {key: each for key, each in value.items() if key not in ("type", "file", "image_file", "file_id")}
        return {**options, "type": kind, kind: path}

    def _named(self, file_id: str) -> Path:
        try:
            if not _ID.fullmatch(file_id):
                raise _not_there(file_id)
            return self.path(file_id)
        except Refusal as error:
            raise UserError(str(error)) from error


class Room:
    """What a file that is on its way takes of a store; see `FileStore.room`."""

    def __init__(self, store: FileStore):
        self._store, self._size = store, 0

    def hold(self, size: int) -> None:
        """Holds `size` bytes from now on, in place of those before. Raises Refusal if there is no room for them."""
        store = self._store
        with store._lock:
            used = sum(each["bytes"] for each in store._files.values()) + store._reserved - self._size
            if size and used + size > store._max_bytes:
                message = f"all files together must have at most {store._max_bytes:,} bytes"
                raise Refusal(413, message, code="storage_full")
            store._reserved += size - self._size
            self._size = size


def not_stored(error: OSError) -> Refusal:
    """The refusal of a file for which the disk has no room, or that it does not take."""
    return Refusal(507, f"the file cannot be stored ({error.strerror or error})", code="storage_full")


def _not_there(file_id: object) -> Refusal:
    return Refusal(404, f"there is no file {shorten(file_id)}", code="file_not_found")
