"""A local HTTP server that answers the requests of the hubs' libraries for one checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandInHub:
    """Serves the files of `directory` as the model `owner/name`, in its revision `released`.

    Attributes:
      breaks: by file name, the number of bytes sent before the connection breaks, once.
      broken: names of the files whose connection broke.
      stays_up: whether the server answers a second request for a broken file; if not, it goes down with that request.
        By then the client has read all that was sent.
      others_arrived: whether the client has the other files. The server waits for them before it goes down.
      down: whether the server refuses every request.
      requests: method, path and Range header of every request.
      sent: bytes sent of each file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.breaks: dict[str, int] = {}
        self.broken: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.sent: dict[str, int] = {}
        self.down = False
        self.stays_up = False
        self.others_arrived: Callable[[], bool] = lambda: True
        self.url = ""

    def files(self) -> list[Path]:
        return sorted(path for path in self.directory.iterdir() if path.is_file())

    def ranges(self, name: str) -> list[str | None]:
        """The Range headers of the GET requests for a file; None for a request without that header."""
        return [header for method, path, header in self.requests if method == "GET" and name in path]


@contextlib.contextmanager
def serve(directory: Path) -> Iterator[StandInHub]:
    """Runs a stand-in hub until the context ends."""
    hub = StandInHub(directory)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _handler(hub: StandInHub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the test's output clean."""

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range")))
            url = urllib.parse.urlsplit(self.path)
            query = urllib.parse.parse_qs(url.query)
            if hub.down:
                self._send(404, b"{}")
            elif re.fullmatch(r"/api/models/owner/name(/revision/(main|released))?", url.path):
                siblings = [{"rfilename": path.name} for path in hub.files()]
                self._json({"id": "owner/name", "sha": COMMIT, "siblings": siblings, "private": False})
            elif url.path.startswith("/api/models/owner/name/tree/"):
                tree = [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _sha256(path)[:40]}
                    for path in hub.files()
                ]
                self._json(tree)
            elif match := re.fullmatch(r"/owner/name/resolve/\w+/(.+)", url.path):
                self._file(match.group(1))
            elif url.path == "/api/v1/models/owner/name/repo/files" and query.get("Revision") in (
                ["master"],
                ["released"],
            ):
                files = [
                    {
                        "Path": path.name,
                        "Name": path.name,
                        "Type": "blob",
                        "Size": path.stat().st_size,
                        "Sha256": _sha256(path),
                        "Revision": COMMIT,
                    }
                    for path in hub.files()
                ]
                self._json({"Code": 200, "Success": True, "Data": {"Files": files}})
            elif url.path == "/api/v1/models/owner/name/repo" and "FilePath" in query:
                self._file(query["FilePath"][0])
            elif match := re.fullmatch(r"/models/owner/name/resolve/\w+/(.+)", url.path):
                self._file(match.group(1))
            elif url.path == "/api/v1/models/owner/name/revisions":
                names = [{"Revision": "master"}, {"Revision": "released"}]
                self._json({"Code": 200, "Success": True, "Data": {"RevisionMap": {"Branches": names, "Tags": []}}})
            elif url.path == "/api/v1/models/owner/name":
                self._json({"Code": 200, "Success": True, "Data": {"Path": "owner", "Name": "name"}})
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def _file(self, name: str) -> None:
            path = hub.directory / urllib.parse.unquote(name)
            if path not in hub.files():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            if self.command == "GET" and name in hub.broken and not hub.stays_up:
                hub.broken.remove(name)
                while not hub.others_arrived():
                    time.sleep(0.01)
                hub.down = True
                self._send(404, b"{}")
                return
            data = path.read_bytes()
            headers = {"ETag": f'"{_sha256(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            start, stop, status = 0, len(data), 200
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                start, status = int(match.group(1)), 206
                stop = int(match.group(2)) + 1 if match.group(2) else stop
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            body = data[start:stop]
            if self.command == "GET" and name in hub.breaks:
                hub.broken.add(name)
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                part = body[: hub.breaks.pop(name)]
                hub.sent[name] = hub.sent.get(name, 0) + len(part)
                self.wfile.write(part)
                self.close_connection = True
                return
            if self.command == "GET":
                hub.sent[name] = hub.sent.get(name, 0) + len(body)
            self._send(status, body, headers)

    return Handler
