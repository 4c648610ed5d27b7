"""What the documentation shows is run."""

import re
from pathlib import Path

from convert import convert
from convert.synthetic import write_checkpoint
from keye_jax.config import KeyeConfig
from keye_jax.testing import write_processor_files

ROOT = Path(__file__).parents[1]


def test_the_python_of_run_md(golden, tmp_path, monkeypatch, capsys):
    config = KeyeConfig.from_file(golden / "a")
    write_checkpoint(tmp_path / "hf", config, seed=0)
    write_processor_files(tmp_path / "hf", config)
    convert(tmp_path / "hf", tmp_path / "keye-orbax")
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "run.md").read_text(encoding="utf-8"), re.S)
    names = {}
    exec(code.replace("max_new_tokens=256", "max_new_tokens=4"), names)
    assert 0 < len(names["answer"].token_ids) <= 4
    assert capsys.readouterr().out == names["answer"].text + "\n"


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), (page.name, target)
