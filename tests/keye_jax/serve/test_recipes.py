"""The recipes of docs/serve.md are run, and what harnesses send is taken."""

import base64
import dataclasses
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.keye_jax.serve.conftest import Running

PAGE = Path(__file__).parents[3] / "docs" / "serve.md"
RECIPES = re.findall(r"### (\d+)\. .*?```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
AGENT = "9"


class Forced:
    """An engine whose model can only write what is scripted, token by token; all else is the engine's own.

    Args:
      engine: the one inside.
      scripts: of the answers, in order, as Lark rules.
    """

    def __init__(self, engine, scripts):
        self._engine, self._scripts = engine, list(scripts)

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def submit(self, request):
        grammar = json.dumps({"grammars": [{"lark_grammar": f"start: {self._scripts.pop(0)}"}]})
        return self._engine.submit(dataclasses.replace(request, grammar=grammar, thinking_budget=0, max_tokens=300))


def here(code, server):
    return code.replace("http://127.0.0.1:8000", server.url)


def test_there_are_ten():
    assert [number for number, _, _ in RECIPES] == [str(number) for number in range(1, 11)]


def test_those_that_ask_a_model(server, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    names = {}
    for number, kind, code in RECIPES:
        capsys.readouterr()
        if kind == "bash":
            done = subprocess.run(["bash", "-ec", here(code, server)], capture_output=True, text=True, timeout=120)
            assert json.loads(done.stdout)["choices"], done.stderr
        elif number != AGENT:
            exec(here(code, server), names)
            printed = capsys.readouterr().out
            assert printed
            if number == "4":
                assert int(printed.split()[0]) > 0


@pytest.mark.skipif(not importlib.util.find_spec("agents"), reason="needs openai-agents")
def test_the_agent(engine):
    call = json.dumps(json.dumps({"name": "weather", "arguments": {"city": "Rome"}}))
    scripts = [f'<tool_call> "\\n" {call} "\\n" </tool_call>', '"It is sunny."']
    _, _, code = next(each for each in RECIPES if each[0] == AGENT)
    names = {}
    with Running(Forced(engine, scripts)) as server:
        exec(here(code, server).replace("print(", "said = ("), names)
    assert names["said"] == "It is sunny."


@pytest.mark.parametrize("harness", ["lmms-eval", "lmms-eval video", "VLMEvalKit"])
def test_bodies_of_harnesses(server, files, harness):
    picture = "data:image/png;base64," + base64.b64encode((files / "picture.png").read_bytes()).decode()
    video = "data:video/mp4;base64," + base64.b64encode((files / "clip.mp4").read_bytes()).decode()
    shown = {"type": "image_url", "image_url": {"url": picture}}
    text = {"type": "text", "text": "What is it?"}
    body = {
        "lmms-eval": {
            "messages": [{"role": "user", "content": [shown, shown, text]}],
            **{"model": "keye", "max_tokens": 16, "temperature": 0, "stream": False},
        },
        "lmms-eval video": {
            "messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": video}}, text]}],
            **{"model": "keye", "max_tokens": 16, "temperature": 0, "top_p": None},
        },
        "VLMEvalKit": {
            "messages": [
                {"role": "system", "content": "You are helpful."},
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": picture, "detail": "low"}}, text],
                },
            ],
            **{"model": "keye", "max_tokens": 16, "temperature": 0, "n": 1},
        },
    }[harness]
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 0
