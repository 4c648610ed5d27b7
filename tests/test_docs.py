"""What the documentation shows is run."""

import re
from pathlib import Path

import pytest

from convert import convert
from convert.synthetic import write_checkpoint
from keye_jax.config import KeyeConfig
from keye_jax.testing import write_processor_files

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_python_of_run_md(golden, tmp_path, monkeypatch, capsys):
    config = KeyeConfig.from_file(golden / "a")
    write_checkpoint(tmp_path / "hf", config, seed=0)
    write_processor_files(tmp_path / "hf", config)
    convert(tmp_path / "hf", tmp_path / "keye-orbax")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "run.md").read_text(encoding="utf-8"), re.S)
    names = {}
    for code in blocks:
        exec(code.replace("max_tokens=256", "max_tokens=4"), names)
    assert len(names["inputs"].input_ids) == names["plan"].num_tokens
    assert 0 < len(names["answer"].token_ids) <= 4
    assert capsys.readouterr().out == names["answer"].text + "\n"


def test_the_python_of_kernels_md(capsys):
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code, {})
    assert f"`{capsys.readouterr().out.strip()}`" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """Every path below a top-level folder, in text and in commands; `<name>` and `*` stand for any."""
    folders = "|".join(["keye_jax", "pallas_kernels", "convert", "tests", "configs", "docs", r"\.ci"])
    text = re.sub(r"https?://\S+", "", page.read_text(encoding="utf-8"))
    paths = set(re.findall(rf"(?<![\w/.:-])(?:{folders})/[\w./*<>-]*[\w*>]", text))
    assert not [path for path in paths if not any(ROOT.glob(re.sub("<[^>]*>", "*", path)))]


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in PAGES:
        for block in re.findall(r"`[^`]*`|```.*?```", page.read_text(encoding="utf-8"), re.S):
            for target in re.findall(r"(?:^|[`\n])make ([\w-]+)", block):
                assert target in targets, (page.name, target)
