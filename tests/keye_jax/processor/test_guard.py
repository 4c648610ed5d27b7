"""Requests of strangers reach public addresses and files below one folder, and nothing else."""

import http.server
import os
import socket
import threading

import pytest

from keye_jax.errors import UserError
from keye_jax.processor import guard
from keye_jax.processor.guard import MediaGuard, is_public
from keye_jax.processor.media import DownloadedFile, fetch

PUBLIC = "93.184.215.14"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        (PUBLIC, True),
        ("1.1.1.1", True),
        ("2606:4700::1111", True),
        ("::ffff:1.1.1.1", True),
        ("64:ff9b::101:101", True),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),  # shared by a carrier
        ("127.0.0.1", False),
        ("127.255.0.9", False),
        ("169.254.169.254", False),
        ("172.16.0.1", False),
        ("172.31.255.255", False),
        ("192.0.2.1", False),
        ("192.168.1.1", False),
        ("198.18.0.1", False),
        ("203.0.113.7", False),
        ("224.0.0.1", False),
        ("239.255.255.250", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::7f00:1", False),  # an old way to hold 127.0.0.1
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::", False),
        ("2002:a9fe:a9fe::1", False),
        ("2001:0:1:2:3:4:5:6", False),
        ("2001:db8::1", False),
        ("fc00::1", False),
        ("fd12:3456::1", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("4000::1", False),
    ],
)
def test_addresses(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "127.0.1", "0x7f.1", "0x7f000001", "2130706433", "0177.0.0.1", "017700000001", "0"),
        *("[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:7f00:0001]", "[fe80::1]", "[::]"),
        *(
            "localhost",
            "LOCALHOST",
            "localhost.",
            "127.0.0.1.",
            "%31%32%37.0.0.1",
            "\u2460\u2461\u2466.0.0.1",
            "\uff11\uff12\uff17.0.0.1",
            "127\u30020\u30020\u30021",
        ),
        *("user@127.0.0.1", "public.example@127.0.0.1", "public.example:80@127.0.0.1", "169.254.169.254", "10.0.0.1"),
        *("127.0.0.1\\@public.example", "127.0.0.1#@public.example"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "HTTPS"])
def test_odd_spellings_connect_to_nothing(monkeypatch, host, scheme):
    def connect(self, target):
        raise AssertionError(f"connects to {target}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(UserError):
        fetch(f"{scheme}://{host}:9/clip.mp4", "video", allow_remote=True, guard=MediaGuard())


class Answers(http.server.BaseHTTPRequestHandler):
    """Redirects from /to/<what> to http://<what>, and else gives 20 bytes."""

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", f"http://{self.path[4:]}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", "20")
        self.end_headers()
        self.wfile.write(b"x" * 20)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def internet(monkeypatch):
    """A server at PUBLIC, names for it and for others, and the addresses that were connected to."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = {"public.example": [PUBLIC], "inside.example": ["10.0.0.1"], "both.example": [PUBLIC, "127.0.0.1"]}
    names["six.example"] = ["::ffff:127.0.0.1"]
    connected, connect = [], socket.socket.connect

    def look_up(host, port, **_):
        addresses = names.get(host, [host])
        address = addresses.pop(0) if host == "changing.example" else None
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in ([address] if address else addresses)
        ]

    def connects(self, target):
        connected.append(target[0])
        assert target[0] == PUBLIC, f"connects to {target}"
        connect(self, server.server_address)

    monkeypatch.setattr(guard.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket.socket, "connect", connects)
    yield names, connected
    server.shutdown()
    server.server_close()


def get(url, limits=MediaGuard()):  # noqa: B008 (frozen)
    file = fetch(url, "video", allow_remote=True, guard=limits)
    assert isinstance(file, DownloadedFile)
    return file


def test_a_public_address_is_fetched(internet):
    file = get("http://public.example/clip.mp4")
    assert file.path.read_bytes() == b"x" * 20
    file.close()


@pytest.mark.parametrize(
    "target",
    [
        "inside.example/",
        "both.example/",
        "six.example/",
        "127.0.0.1/",
        "0x7f.1/",
        "[::1]/",
        "public.example/to/10.0.0.1/",
    ],
)
def test_redirects_are_judged_too(internet, target):
    with pytest.raises(UserError, match=r"public addresses only|cannot be fetched"):
        get(f"http://public.example/to/{target}")
    assert set(internet[1]) == {PUBLIC}


def test_a_name_that_changes(internet):
    names, connected = internet
    names["changing.example"] = [PUBLIC, "127.0.0.1", "127.0.0.1"]
    get("http://changing.example/").close()  # looked up once: what was checked is what is connected to
    with pytest.raises(UserError, match="public addresses only"):
        get("http://changing.example/")
    names["changing.example"] = [PUBLIC, "127.0.0.1"]
    with pytest.raises(UserError, match="public addresses only"):
        get("http://changing.example/to/changing.example/")
    assert connected == [PUBLIC, PUBLIC]


def test_a_proxy_is_not_asked(internet, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://10.0.0.1:3128")
    get("http://public.example/").close()


def test_limits_of_downloads(internet):
    with pytest.raises(UserError, match="at most 10 bytes"):
        get("http://public.example/clip.mp4", MediaGuard(max_bytes=10))


class TestFiles:
    @pytest.fixture
    def root(self, tmp_path):
        root = tmp_path / "root"
        (root / "below").mkdir(parents=True)
        for path in (root / "clip.mp4", root / "below" / "a b.mp4", tmp_path / "secret", tmp_path / "root2"):
            path.write_bytes(b"x")
        (root / "out").symlink_to(tmp_path)
        (root / "secret").symlink_to(tmp_path / "secret")
        (root / "inside").symlink_to(root / "clip.mp4")
        return root

    @pytest.mark.parametrize("name", ["clip.mp4", "below/a b.mp4", "below/../clip.mp4", "inside", "./clip.mp4"])
    def test_below_the_root(self, root, name):
        limits = MediaGuard(root=root)
        found = (root / name).resolve()
        assert fetch(name, "video", allow_remote=False, guard=limits) == found
        assert fetch(str(root / name), "video", allow_remote=False, guard=limits) == found
        url = (root / name).as_uri()
        assert fetch(url, "video", allow_remote=False, guard=limits) == found

    @pytest.mark.parametrize(
        "name",
        [
            *(
                "../secret",
                "/etc/passwd",
                "below/../../secret",
                "out/secret",
                "secret",
                "../root2",
                "../root/../secret",
            ),
            *(
                "file:///etc/passwd",
                "file://{root}/../secret",
                "file://{root}/%2e%2e/secret",
                "file://{root}/out/secret",
            ),
            *("file://{root}/..%2fsecret", "file:{root}/../secret", "FILE://localhost{root}/../secret", "~root/x", "~"),
            *("file://other{root}/clip.mp4", "below/\0", "..\\secret", "below"),
        ],
    )
    def test_no_way_out(self, root, name):
        with pytest.raises(UserError) as caught:
            fetch(name.format(root=root), "video", allow_remote=False, guard=MediaGuard(root=root))
        assert "\n" not in str(caught.value)

    def test_what_lies_outside_cannot_be_told_from_what_is_not_there(self, root):
        said = set()
        for name in ("../secret", "../nothing"):
            with pytest.raises(UserError) as caught:
                fetch(name, "video", allow_remote=False, guard=MediaGuard(root=root))
            said.add(str(caught.value).replace(name, ""))
        assert len(said) == 1

    def test_without_a_root_no_file_is_read(self, root):
        for name in ("clip.mp4", str(root / "clip.mp4"), (root / "clip.mp4").as_uri()):
            with pytest.raises(UserError, match="may not be read"):
                fetch(name, "video", allow_remote=False, guard=MediaGuard())

    def test_the_root_must_be_a_folder(self, root):
        with pytest.raises(UserError, match="--media-root is"):
            MediaGuard(root=root / "clip.mp4")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="regular file"):
        fetch("pipe", "video", allow_remote=False, guard=MediaGuard(root=tmp_path))
