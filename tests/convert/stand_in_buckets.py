"""Local HTTP servers that answer as Google Cloud Storage (JSON API) and S3 (REST) do, for what tensorstore asks."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any
from xml.sax.saxutils import escape


@dataclasses.dataclass
class StandInBucket:
    """The bucket `made` of a stand-in.

    Attributes:
      scheme: "gs" or "s3".
      objects: content by name, with the number of its generation.
      sent: bytes of content that were sent, by name of the object.
      writes: names in the order in which they were written.
      fail_after: when so many more writes are done, every later one is refused with the status 403; None for never.
      requests: method and path of every request.
    """

    scheme: str
    url: str = ""
    objects: dict[str, tuple[bytes, int]] = dataclasses.field(default_factory=dict)
    sent: dict[str, int] = dataclasses.field(default_factory=dict)
    writes: list[str] = dataclasses.field(default_factory=list)
    fail_after: int | None = None
    requests: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self._generation = 1000

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables by which a process finds the stand-in."""
        if self.scheme == "gs":
            return {"TENSORSTORE_GCS_HTTP_URL": self.url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "stand-in"}
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "stand-in",
            "AWS_SECRET_ACCESS_KEY": "stand-in",
        }

    def share(self, other: StandInBucket) -> None:
        """Makes this another server of the bucket that `other` has."""
        self.objects, self.lock = other.objects, other.lock

    def put(self, name: str, data: bytes) -> int:
        self._generation += 1
        self.objects[name] = (data, self._generation)
        self.writes.append(name)
        return self._generation

    def may_write(self) -> bool:
        if self.fail_after is None:
            return True
        self.fail_after -= 1
        return self.fail_after >= 0

    def upload(self, prefix: str, directory: Any) -> None:
        """Puts all files below `directory` under `prefix`."""
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(directory).as_posix()}", path.read_bytes())

    def download(self, prefix: str, directory: Any) -> None:
        """Writes all objects under `prefix` as files below `directory`."""
        for name, (data, _) in self.objects.items():
            if name.startswith(f"{prefix}/"):
                path = directory / name.removeprefix(f"{prefix}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)


@contextlib.contextmanager
def serve(scheme: str) -> Iterator[StandInBucket]:
    """Runs a stand-in for the scheme "gs" or "s3" until the context ends."""
    bucket = StandInBucket(scheme)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _gcs(bucket) if scheme == "gs" else _s3(bucket))
    server.daemon_threads = True
    bucket.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body in one packet: otherwise each answer waits for an acknowledgement.
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    bucket: StandInBucket

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output clean."""

    def handle_expect_100(self) -> bool:
        # A client with a long body waits for this, up to a second.
        going_on = super().handle_expect_100()
        self.wfile.flush()
        return going_on

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if (length := self.headers.get("Content-Length")) is not None:
            return self.rfile.read(int(length))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def content(self, name: str, data: bytes, **headers: str) -> None:
        """Answers with an object, or the range of it that is asked for."""
        start, stop, status = 0, len(data), 200
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            first, last = match.groups()
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(len(data), int(last) + 1) if first and last else len(data)
            status = 206
            if start >= len(data):
                self.answer(416, b"", Content_Range=f"bytes */{len(data)}")
                return
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        if self.command == "GET":
            with self.bucket.lock:
                self.bucket.sent[name] = self.bucket.sent.get(name, 0) + stop - start
        self.answer(status, data[start:stop], **headers)

    def note(self) -> tuple[str, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        self.bucket.requests.append((self.command, self.path))
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        return urllib.parse.unquote(url.path), query


def _gcs(bucket: StandInBucket) -> type[_Handler]:
    class Handler(_Handler):
        def do_GET(self) -> None:
            path, query = self.note()
            if path == "/storage/v1/b/made/o":
                self._list(query)
                return
            name = path.removeprefix("/storage/v1/b/made/o/")
            with bucket.lock:
                found = bucket.objects.get(name)
            if found is None or name == path:
                self.answer(404, b"{}")
            elif query.get("ifGenerationNotMatch") == str(found[1]):
                self.answer(304)
            else:
                generation = {"x_goog_generation": str(found[1])}
                self.content(name, found[0], **generation)

        def do_POST(self) -> None:
            _, query = self.note()
            data = self.body()
            with bucket.lock:
                now = bucket.objects.get(query["name"], (b"", 0))[1]
                if query.get("ifGenerationMatch", str(now)) != str(now):
                    self.answer(412, b"{}")
                elif not bucket.may_write():
                    self.answer(403, b"{}")
                else:
                    made = {"name": query["name"], "generation": str(bucket.put(query["name"], data))}
                    self.answer(200, json.dumps(made).encode(), Content_Type="application/json")

        def do_DELETE(self) -> None:
            path, query = self.note()
            name = path.removeprefix("/storage/v1/b/made/o/")
            with bucket.lock:
                now = bucket.objects.get(name, (b"", 0))[1]
                if query.get("ifGenerationMatch", str(now)) != str(now):
                    self.answer(412, b"{}")
                else:
                    self.answer(204 if bucket.objects.pop(name, None) else 404)

        def _list(self, query: dict[str, str]) -> None:
            names = sorted(name for name in list(bucket.objects) if name.startswith(query.get("prefix", "")))
            first, last = query.get("startOffset", ""), query.get("endOffset")
            names = [name for name in names if name >= first and (not last or name < last)]
            items = [{"name": name, "size": str(len(bucket.objects[name][0]))} for name in names]
            self.answer(200, json.dumps({"items": items}).encode(), Content_Type="application/json")

    Handler.bucket = bucket
    return Handler


def _s3(bucket: StandInBucket) -> type[_Handler]:
    class Handler(_Handler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path, query = self.note()
            name = path.removeprefix("/made").removeprefix("/")
            if not name:
                self._list(query)
                return
            with bucket.lock:
                found = bucket.objects.get(name)
            if found is None:
                self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            elif self.headers.get("If-None-Match") == _tag(found[1]):
                self.answer(304, ETag=_tag(found[1]))
            else:
                self.content(name, found[0], ETag=_tag(found[1]))

        def do_PUT(self) -> None:
            path, _ = self.note()
            name, data = path.removeprefix("/made/"), self.body()
            with bucket.lock:
                now = bucket.objects.get(name)
                wanted, unwanted = self.headers.get("If-Match"), self.headers.get("If-None-Match")
                if (wanted and (now is None or _tag(now[1]) != wanted)) or (unwanted == "*" and now is not None):
                    self.answer(412)
                elif not bucket.may_write():
                    self.answer(403)
                else:
                    self.answer(200, ETag=_tag(bucket.put(name, data)))

        def do_DELETE(self) -> None:
            path, _ = self.note()
            with bucket.lock:
                bucket.objects.pop(path.removeprefix("/made/"), None)
            self.answer(204)

        def _list(self, query: dict[str, str]) -> None:
            names = sorted(name for name in list(bucket.objects) if name.startswith(query.get("prefix", "")))
            names = [name for name in names if name > query.get("start-after", "")]
            items = "".join(f"<Contents><Key>{escape(name)}</Key></Contents>" for name in names)
            text = f"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>{len(names)}</KeyCount>{items}"
            self.answer(200, f"{text}</ListBucketResult>".encode(), Content_Type="application/xml")

    Handler.bucket = bucket
    return Handler


def _tag(generation: int) -> str:
    return f'"{generation}"'
