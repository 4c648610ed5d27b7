"""Agents as they are, against the server. What the model draws is scripted; they parse it, call tools and go on."""

import asyncio
import dataclasses
import importlib.util
import json

import pytest

from convert.synthetic import write_checkpoint
from keye_jax.config import KeyeConfig
from keye_jax.engine.checkpoint import load
from keye_jax.engine.engine import Engine
from keye_jax.engine.options import EngineOptions
from keye_jax.testing import write_processor_files
from tests.keye_jax.serve.conftest import Running
from tests.keye_jax.serve.scripted_tokens import scripted_tokens

pytestmark = pytest.mark.slow


THOUGHT = "I see.</think>"


def call(name, **arguments):
    """What the model writes to call a tool."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, golden):
    """A tiny checkpoint that takes the long prompts of agents."""
    if not any(importlib.util.find_spec(name) for name in ("agents", "smolagents", "minisweagent")):
        pytest.skip("no agent is installed")
    directory = tmp_path_factory.mktemp("agents")
    config = dataclasses.replace(KeyeConfig.from_file(golden / "a"), max_position_embeddings=65536)
    write_checkpoint(directory, config, seed=0)
    write_processor_files(directory, config)
    return directory


@pytest.fixture(scope="module")
def engine(checkpoint):
    options = EngineOptions(rows=2, cache_tokens=98304, max_context=49152, small_chunk=512, media_workers=0)
    with Engine(*load(checkpoint, dtype="float32", prefill_chunk=2048), options=options) as engine:
        engine.warmup()
        yield engine


@pytest.fixture
def server(engine):
    with Running(engine) as running:
        yield running


def test_openai_agents(server, engine, checkpoint):
    agents = pytest.importorskip("agents")
    asked = []

    @agents.function_tool
    def frames_of(video: str) -> str:
        """How many frames a video has.

        Args:
            video: Its name.
        """
        asked.append(video)
        return "24"

    agents.set_tracing_disabled(True)

    def agent():
        model = agents.OpenAIResponsesModel("tiny", openai_client=server.async_client())
        return agents.Agent("counter", instructions="Count frames.", model=model, tools=[frames_of])

    script = [THOUGHT + call("frames_of", video="a.mp4"), THOUGHT + "It has 24 frames."]
    with scripted_tokens(engine, checkpoint, script) as left:
        result = asyncio.run(agents.Runner.run(agent(), "How many frames does a.mp4 have?"))
    assert (result.final_output, asked, left) == ("It has 24 frames.", ["a.mp4"], [])

    async def stream():
        run = agents.Runner.run_streamed(agent(), "And b.mp4?")
        kinds = [event.type async for event in run.stream_events()]
        return kinds, run.final_output

    script = [THOUGHT + call("frames_of", video="b.mp4"), THOUGHT + "24 too."]
    with scripted_tokens(engine, checkpoint, script) as left:
        kinds, answer = asyncio.run(stream())
    assert "raw_response_event" in kinds and (answer, asked[1:], left) == ("24 too.", ["b.mp4"], [])


def test_smolagents(server, engine, checkpoint):
    smolagents = pytest.importorskip("smolagents")
    asked = []

    @smolagents.tool
    def frames_of(video: str) -> int:
        """How many frames a video has.

        Args:
            video: Its name.
        """
        asked.append(video)
        return 24

    model = smolagents.OpenAIModel("tiny", api_base=f"{server.url}/v1", api_key="any")
    agent = smolagents.ToolCallingAgent(tools=[frames_of], model=model, max_steps=3, verbosity_level=0)
    script = [
        THOUGHT + call("frames_of", video="a.mp4"),
        THOUGHT + call("final_answer", answer="It has 24 frames."),
    ]
    with scripted_tokens(engine, checkpoint, script) as left:
        answer = agent.run("How many frames does a.mp4 have?")
    assert (answer, asked, left) == ("It has 24 frames.", ["a.mp4"], [])


def test_mini_swe_agent(server, engine, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("MSWEA_SILENT_STARTUP", "1")
    monkeypatch.setenv("MSWEA_GLOBAL_CONFIG_DIR", str(tmp_path))
    minisweagent = pytest.importorskip("minisweagent")
    yaml = pytest.importorskip("yaml")
    default = pytest.importorskip("minisweagent.agents.default")
    local = pytest.importorskip("minisweagent.environments.local")
    litellm_model = pytest.importorskip("minisweagent.models.litellm_model")

    settings = yaml.safe_load((minisweagent.package_dir / "config" / "mini.yaml").read_text())
    fields = default.DefaultAgent.__init__.__kwdefaults__["config_class"].model_fields
    chosen = {name: value for name, value in settings["agent"].items() if name in fields}
    kwargs = {"api_base": f"{server.url}/v1", "api_key": "any"}
    model = litellm_model.LitellmModel(model_name="openai/tiny", model_kwargs=kwargs, cost_tracking="ignore_errors")
    agent = default.DefaultAgent(model, local.LocalEnvironment(cwd=str(tmp_path)), **chosen)
    script = [
        THOUGHT + "I write the file." + call("bash", command="echo 24 > frames.txt"),
        THOUGHT + "Done." + call("bash", command="echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && cat frames.txt"),
    ]
    with scripted_tokens(engine, checkpoint, script) as left:
        result = agent.run("Write the number of frames of a.mp4, 24, to frames.txt.")
    assert (tmp_path / "frames.txt").read_text() == "24\n"
    assert (result["exit_status"], result["submission"].strip(), left) == ("Submitted", "24", [])
