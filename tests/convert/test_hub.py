"""Downloads from a local server that answers as the hubs do."""

import sys

import pytest

import convert
from convert import hub
from keye_jax.errors import UserError
from tests.convert.convert_helpers import contents, run_cli, write
from tests.convert.stand_in_hub import COMMIT, serve

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    write(directory)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "modeling.py").write_text("")
    return directory


def environment(server, tmp_path):
    home = str(tmp_path / "home")
    return {
        "HF_ENDPOINT": server.url,
        "MODELSCOPE_ENDPOINT": server.url,
        "HF_HOME": home,
        "MODELSCOPE_CACHE": home,
        "HOME": home,
        "NO_PROXY": "127.0.0.1",
    }


@pytest.mark.parametrize(("option", "library"), [("--hf", "huggingface_hub"), ("--modelscope", "modelscope")])
def test_a_broken_download_is_continued(source, tmp_path, option, library):
    pytest.importorskip(library)
    size = (source / WEIGHTS).stat().st_size
    arguments = (option, "owner/name", "--revision", "released", "--cache-dir", tmp_path / "cache", tmp_path / "made")
    with serve(source) as server:
        server.breaks[WEIGHTS] = size // 2
        server.others_arrived = lambda: len(list((tmp_path / "cache").rglob("*.json"))) == 2
        failed = run_cli(*arguments, **environment(server, tmp_path))
        assert failed.returncode == 2 and not failed.stdout
        last = failed.stderr.splitlines()[-1]
        assert last.startswith(f"keye-jax: {option} owner/name at revision 'released' could not be downloaded: ")
        assert not (tmp_path / "made").exists() and not (tmp_path / "made.partial").exists()

        server.down = False
        server.requests.clear()
        done = run_cli(*arguments, **environment(server, tmp_path))
        assert done.returncode == 0, done.stderr
        assert server.ranges(WEIGHTS) == [f"bytes={size // 2}-"]
        assert server.sent[WEIGHTS] == size
        assert not server.ranges("modeling.py")
        assert not server.ranges("config.json") and not server.ranges("tokenizer.json")
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        *("config.json", "tokenizer.json", "params", "checkpoint.json")
    }
    convert.convert(tmp_path / "made", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def hugging_face(server, tmp_path, monkeypatch):
    library = pytest.importorskip("huggingface_hub")
    api = library.HfApi(endpoint=server.url)
    monkeypatch.setattr(library, "HfApi", lambda: api)
    page = library.hf_hub_url
    monkeypatch.setattr(library, "hf_hub_url", lambda *args, **options: page(*args, **options, endpoint=server.url))
    return lambda **options: hub.download(hf="owner/name", cache_dir=tmp_path / "cache", **options)


def test_a_connection_that_breaks_is_taken_up_at_once(source, tmp_path, monkeypatch):
    with serve(source) as server:
        download = hugging_face(server, tmp_path, monkeypatch)
        server.breaks[WEIGHTS] = 100_000
        server.stays_up = True
        monkeypatch.setattr("convert.download._status", lambda error: None)
        calls = []
        directory = download(progress=lambda *call: calls.append(call))
        assert directory == tmp_path / "cache" / "owner--name" / COMMIT
        assert server.ranges(WEIGHTS) == [None, "bytes=100000-"]
        total = sum((source / name).stat().st_size for name in (WEIGHTS, "config.json", "tokenizer.json"))
        assert calls[0] == ("download", 0, total) and calls[-1] == ("download", total, total)
        assert (directory / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()

        server.requests.clear()
        assert download() == directory
        assert not server.ranges(WEIGHTS)


def test_wrong_content_is_not_kept(source, tmp_path, monkeypatch):
    with serve(source) as server:
        download = hugging_face(server, tmp_path, monkeypatch)
        directory = tmp_path / "cache" / "owner--name" / COMMIT
        directory.mkdir(parents=True)
        (directory / f"{WEIGHTS}.part").write_bytes(bytes(1000))
        with pytest.raises(UserError, match="the downloaded content is not the file"):
            download()
        assert not (directory / WEIGHTS).exists() and not (directory / f"{WEIGHTS}.part").exists()
        download()
        assert (directory / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


def test_unknown_revision(source, tmp_path, monkeypatch):
    with serve(source) as server:
        download = hugging_face(server, tmp_path, monkeypatch)
        with pytest.raises(UserError, match="--hf owner/name at revision 'nowhere' could not be downloaded"):
            download(revision="nowhere")


@pytest.mark.parametrize(("option", "library"), [("hf", "huggingface_hub"), ("modelscope", "modelscope")])
def test_missing_extra(monkeypatch, option, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r"pip install 'keye-jax\[hub\]'"):
        hub.download(hf="owner/name") if option == "hf" else hub.download(modelscope="owner/name")
