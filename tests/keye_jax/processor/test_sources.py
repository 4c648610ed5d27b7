"""Where media come from: URLs and the servers behind them, `data:` URLs, base64, and paths."""

import base64
import http.server
import io
import socket
import tempfile
import threading
import time
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from keye_jax import __version__
from keye_jax.errors import UnreachableError, UserError
from keye_jax.processor import Processor, media
from keye_jax.processor.data_url import read_bare_base64, read_data_url, split_frames
from keye_jax.processor.media import fetch


def encoded(form="PNG", size=(30, 20), color="red"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, form)
    return file.getvalue()


PNG = encoded()
BASE64 = base64.b64encode(PNG).decode()


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    folder = tmp_path / "downloads"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def serve(downloads):
    """Starts a server that answers with a function of the request's handler; returns its URL."""
    servers = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            do_GET = answer

            def log_message(self, format, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
    assert not list(downloads.iterdir())


def send(handler, content=PNG, status=200, **headers):
    handler.send_response(status)
    for name, value in {"Content_Length": len(content), **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(content)


def read(source, **options):
    found = fetch(source, "image", **{"allow_remote": True, **options})
    if isinstance(found, media.DownloadedFile):
        content = found.path.read_bytes()
        found.close()
        return content
    return found if isinstance(found, bytes) else found.read_bytes()


def refused(source, message, **options):
    with pytest.raises(UserError, match=message) as error:
        read(source, **options)
    assert str(error.value).startswith("image is ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    return error.value


class TestDownload:
    def test_a_file(self, serve):
        seen = {}

        def answer(handler):
            seen.update(handler.headers.items())
            send(handler)

        url = serve(answer)
        assert read(url) == PNG
        assert seen["User-Agent"] == f"keye-jax/{__version__}"
        assert seen["Accept-Encoding"] == "identity"
        assert read(f" \n{url}/a.png\t") == PNG
        assert read(f"{url}/a.png#fragment") == PNG
        assert read(url.replace("http", "HTTP")) == PNG

    def test_chunks_and_no_length(self, serve):
        def answer(handler):
            handler.send_response(200)
            if handler.path == "/chunks":
                handler.send_header("Transfer-Encoding", "chunked")
            else:
                handler.close_connection = True
            handler.end_headers()
            for part in (PNG[:40], PNG[40:]):
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if handler.path == "/chunks" else part)
            if handler.path == "/chunks":
                handler.wfile.write(b"0\r\n\r\n")

        url = serve(answer)
        assert read(f"{url}/chunks") == read(url) == PNG

    @pytest.mark.parametrize("size", [0, 1, len(PNG) - 1])
    def test_content_shorter_than_its_length(self, serve, size):
        def answer(handler):
            send(handler, PNG[:size], Content_Length=len(PNG))
            handler.close_connection = True

        error = refused(serve(answer), f"it cannot be fetched: the connection was closed after {size} of {len(PNG)}")
        assert isinstance(error, UnreachableError)

    @pytest.mark.parametrize(
        "cut", [b"", b"%x\r\n" % len(PNG), b"%x\r\n" % len(PNG) + PNG[:9], b"3\r\nabc\r\n", b"3\r"]
    )
    def test_chunks_that_end_early(self, serve, cut):
        def answer(handler):
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(cut)
            handler.close_connection = True

        refused(serve(answer), "it cannot be fetched: the connection was closed before the end")

    def test_a_connection_that_is_reset(self, serve):
        def answer(handler):
            if handler.path == "/content":
                send(handler, b"abc", Content_Length=1000)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            handler.close_connection = True

        url = serve(answer)
        for path in ("/content", "/"):
            refused(url + path, "it cannot be fetched: ")

    @pytest.mark.parametrize(
        ("status", "reason"), [(403, "Forbidden"), (404, "Not Found"), (429, "Too Many Requests"), (500, "Internal")]
    )
    def test_errors_of_the_server(self, serve, status, reason):
        url = serve(lambda handler: send(handler, b"<html>no</html>", status))
        error = refused(url, f"it cannot be fetched: the server answers {status} {reason}")
        assert isinstance(error, UnreachableError) == (status in (429, 500)), "whether it may pass later"

    def test_redirects(self, serve):
        def answer(handler):
            path = urllib.parse.unquote(handler.path)
            number = path.strip("/")
            if number.isdigit() and int(number):
                send(handler, b"", 302, Location=f"/{int(number) - 1}")
            elif path == "/spaces":
                send(handler, b"", 301, Location="/a b\u00e9.png")
            elif path == "/circle":
                send(handler, b"", 307, Location="/circle")
            elif path == "/nowhere":
                send(handler, b"", 302)
            elif path == "/bad":
                send(handler, b"", 302, Location="http://[1/")
            else:
                send(handler)

        url = serve(answer)
        assert read(f"{url}/5") == read(f"{url}/spaces") == PNG
        for path in ("/circle", "/30"):
            refused(url + path, "it cannot be fetched: the server redirects in a circle or too often")
        refused(f"{url}/nowhere", "the server answers 302")
        refused(f"{url}/bad", "it cannot be fetched: ")

    @pytest.mark.parametrize(
        "name", ["a b.png", "\u4e2d\u6587 \u00e9.png", 'a"<>`{}.png', "100%25.png", "a%20b.png", "a\\b.png"]
    )
    def test_names_are_escaped_as_browsers_do(self, serve, name):
        seen = []

        def answer(handler):
            seen.append(handler.path)
            send(handler)

        url = serve(answer)
        assert read(f"{url}/{name}?q={name[:3]} '\u00e9'&x=1") == PNG
        path, _, query = seen[0].partition("?")
        assert seen[0].isascii() and not set(path) & set(' "<>`{}\\') and not set(query) & set(' "<>')
        assert urllib.parse.unquote(path) == "/" + urllib.parse.unquote(name).replace("\\", "/")
        assert query.endswith("%20%27%C3%A9%27&x=1")

    def test_names_of_hosts_are_encoded(self):
        assert media._escape("http://b\u00fccher.example:81/a") == "http://xn--bcher-kva.example:81/a"
        assert media._escape("http://b%C3%BCcher.example") == "http://xn--bcher-kva.example/"
        assert media._escape("http://[::1]:80/a") == "http://[::1]:80/a"

    @pytest.mark.parametrize(
        "url",
        [
            *("http://host/a\nb", "http://host/a\0", "http://ho\tst/a", "http://host/a\r\nX: y", "http://host/\x7f"),
            *("http://", "http:///a", "http:a", "http://[::1", "http://host:99999/", "http://host:x/", "https://%/"),
            *(
                "http://user:word@host/",
                "http://a b/",
                f"http://{'a' * 300}/",
                "http://\u00fc..example/",
                "http://h/\ud83d",
            ),
        ],
    )
    def test_malformed_urls(self, url, downloads):
        refused(url, "it cannot be fetched: ")

    def test_compressed_content(self, serve):
        url = serve(lambda handler: send(handler, b"x", Content_Encoding=handler.path[1:]))
        refused(f"{url}/gzip", "must be sent as it is, not with the content encoding 'gzip'")
        assert read(f"{url}/identity") == b"x"

    @pytest.mark.parametrize("stage", ["status", "headers", "content", "chunks", "sizes", "no length"])
    def test_a_server_that_drips(self, serve, monkeypatch, stage):
        monkeypatch.setattr(media, "REMOTE_START_S", 0.5)
        monkeypatch.setattr(media, "REMOTE_TIMEOUT_S", 0.5)
        head = {
            "status": b"HTTP/1.1 200 ",
            "headers": b"HTTP/1.1 200 OK\r\nX-A: ",
            "content": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
            "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n186a0\r\n",
            "sizes": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            "no length": b"HTTP/1.1 200 OK\r\n\r\n",
        }

        def answer(handler):
            try:
                handler.wfile.write(head[stage])
                for _ in range(100):
                    handler.wfile.write(b"0")
                    time.sleep(0.1)
            except OSError:
                handler.close_connection = True

        start = time.monotonic()
        refused(serve(answer), "it cannot be fetched: (the content does not begin within|it comes with less than)")
        assert time.monotonic() - start < 4

    def test_a_server_that_is_silent(self, serve, monkeypatch):
        monkeypatch.setattr(media, "REMOTE_TIMEOUT_S", 0.3)
        refused(serve(lambda handler: time.sleep(2)), "it cannot be fetched: timed out")

    def test_the_time_in_all_is_limited(self, serve, monkeypatch):
        monkeypatch.setattr(media, "REMOTE_TOTAL_S", 0.5)

        def answer(handler):
            handler.send_response(200)
            handler.send_header("Content-Length", "100000000")
            handler.end_headers()
            for _ in range(100):
                handler.wfile.write(bytes(50_000))
                time.sleep(0.1)

        refused(serve(answer), "or takes over 0.5 s")


class TestDataUrl:
    @pytest.mark.parametrize(
        "url",
        [
            f"data:image/png;base64,{BASE64}",
            f"data:image/png; base64 ,{BASE64}",
            f"DATA:image/png;BASE64,{BASE64}",
            f" \n data:image/png;base64,{BASE64}\n",
            f"data:;base64,{BASE64}",
            f"data:image/png;charset=utf-8;name=a.png;base64,{BASE64}",
            f"data:image/png;base64;charset=utf-8,{BASE64}",
            f"data:image/png;base64,{BASE64.rstrip('=')}",
            f"data:image/png;base64,{BASE64.replace('+', '-').replace('/', '_')}",
            f"data:image/png;base64,{BASE64[:7]} \n\t{BASE64[7:30]}\r\n{BASE64[30:]}",
            f"data:image/png;base64,{urllib.parse.quote(BASE64, safe='')}",
            f"data:image/png;base64,{BASE64}#fragment",
            "data:image/png," + urllib.parse.quote(PNG),
            "data:," + urllib.parse.quote(PNG),
        ],
    )
    def test_is_read_as_in_browsers(self, url):
        assert read(url) == PNG

    def test_lengths(self):
        for length in range(1, 9):
            data = bytes(range(250, 250 - length, -1))
            for text in (base64.b64encode(data), base64.urlsafe_b64encode(data), base64.b64encode(data).rstrip(b"=")):
                assert read_data_url(f"data:;base64,{text.decode()}", "x") == data

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("data:image/png;base64", "a data: URL must be data:<type>;base64,<data>"),
            ("data:image/png;base64,", "must hold some data"),
            ("data:image/png;base64,a", "must be valid base64"),
            ("data:image/png;base64,a$bc", "must be valid base64"),
            ("data:image/png;base64,a=bc", "must be valid base64"),
            ("data:image/png;base64,\u00e9\ud83dab", "must be valid base64"),
            ("data:image/png;base64," + "$" * 10**6, "must be valid base64"),
        ],
    )
    def test_what_is_malformed(self, url, message):
        refused(url, message)

    def test_a_video_of_frames(self, processor):
        frames = [encoded("JPEG", (60, 40), color) for color in ("red", "green", "blue")]
        texts = [base64.b64encode(frame).decode() for frame in frames]
        url = "data:video/jpeg;base64," + ",".join(texts)
        for head in ("data:video/jpeg;base64,", "data:video/jpeg; base64 ,", "DATA:Video/JPEG;x=1;BASE64,"):
            assert split_frames(head + ",".join(texts)) == [f"data:image/jpeg;base64,{text}" for text in texts]
        assert split_frames("data:video/mp4;base64," + texts[0]) is None
        parts = [
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "video", "data": ",".join(texts), "media_type": "video/jpeg"},
            {"type": "video", "video": frames},
            {"type": "video", "video": [{"type": "image_url", "image_url": {"url": read}} for read in frames]},
            {"type": "video", "video": [{"type": "image", "base64": text} for text in texts]},
        ]
        grids, patches = [], []
        for part in parts:
            inputs = processor.process(processor.plan([{"role": "user", "content": [part]}]))
            grids.append(inputs.video_grids.tolist())
            patches.append(inputs.video_patches)
        assert len(grids[0]) == 3 and all(grid == grids[0] for grid in grids)
        assert all((each == patches[0]).all() for each in patches)
        with pytest.raises(UserError, match=r"video_url.url\[3\] is .*must hold some data"):
            processor.plan([{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url + ","}}]}])


class TestBareBase64:
    @pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000"])
    def test_of_pictures(self, form):
        content = encoded(form)
        text = base64.b64encode(content).decode()
        for spelling in (
            text,
            f" {text}\n",
            text.rstrip("="),
            "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        ):
            assert read(spelling) == content

    def test_of_videos(self, clip):
        content = clip.read_bytes()
        assert read(base64.b64encode(content).decode()) == content
        for head in (b"\x1aE\xdf\xa3", b"RIFF\0\0\0\0AVI ", b"OggS", b"FLV\1", b"\0\0\1\xba", b"G" + bytes(187) + b"G"):
            content = head + bytes(200)
            assert read_bare_base64(base64.b64encode(content).decode()) == content

    @pytest.mark.parametrize(
        "path",
        [
            "a.png",
            "/9j/4AAQ.jpg",
            "iVBORw0KGgo",
            BASE64[:60] + ".png",
            "A" * 100,
            "/9j/4AAQSkZJRgABAQ\u00e9" + "A" * 40,
        ],
    )
    def test_other_texts_are_paths(self, path):
        refused(path, "there is no such file")

    def test_a_file_of_such_a_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "AAAA").write_bytes(b"x")
        assert read("AAAA") == b"x"


class TestPath:
    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("x" * 10**6, "it must be the path of a file"),
            ("/".join(["x"] * 10**5), "it must be the path of a file"),
            ("a\0b", "it must be the path of a file|there is no such file"),
            ("~nobody-of-this-name/a", "it must be the path of a file"),
            ("\ud83d.png", "there is no such file|it must be the path of a file"),
            ("", "it must be a regular file"),
            ("a\nb", "there is no such file"),
            ("file:///no/such", "there is no such file"),
            ("file://[1/a", "it must be the path of a file"),
            ("file:///a%00b", "it must be the path of a file|there is no such file"),
            ("s3://bucket/a.mp4", "it must be a path or a file:, data:, http: or https: URL"),
        ],
    )
    def test_what_is_no_file(self, path, message):
        refused(path, message)

    def test_white_space_belongs_to_a_path_but_not_to_a_url(self, tmp_path):
        (tmp_path / " a ").write_bytes(b"x")
        assert read(f"{tmp_path}/ a ") == b"x"
        assert read(f"  file://{tmp_path}/%20a%20 \n") == b"x"
        assert read(f"file://localhost{tmp_path}/ a%20") == b"x"


def test_a_download_is_used_and_removed(checkpoint, config, serve, clip, downloads):
    processor = Processor.from_checkpoint(checkpoint, config, allow_remote=True)
    url = serve(lambda handler: send(handler, PNG if "png" in handler.path else clip.read_bytes()))
    parts = [{"type": "image", "url": f"{url}/a b.png"}, {"type": "video", "url": f"{url}/a.mp4"}]
    with processor.plan([{"role": "user", "content": parts}]) as made:
        assert len(list(downloads.iterdir())) == 2
        inputs = processor.process(made)
    expected = processor.process(
        processor.plan([{"role": "user", "content": [{"image": PNG}, {"video": clip.read_bytes()}]}])
    )
    np.testing.assert_array_equal(inputs.image_patches, expected.image_patches)
    np.testing.assert_array_equal(inputs.video_patches, expected.video_patches)
