"""A server in a thread of this process, with the engine of a tiny model, and clients of it."""

import asyncio
import contextlib
import threading
import time

import httpx
import openai
import pytest

from keye_jax.engine.checkpoint import load
from keye_jax.engine.engine import Engine
from keye_jax.engine.options import EngineOptions
from keye_jax.processor.guard import MediaGuard
from keye_jax.serve.batches import Batches
from keye_jax.serve.files import FileStore
from keye_jax.serve.options import ServeOptions
from keye_jax.serve.server import Server, listen
from keye_jax.serve.service import Service


@pytest.fixture(scope="session")
def engine(files):
    options = EngineOptions(
        selection_heat=True, rows=4, cache_tokens=8192, max_context=2048, small_chunk=64, media_workers=2
    )
    guard = MediaGuard(max_seconds=10, max_pixels=640 * 480)
    settings = {"dtype": "float32", "prefill_chunk": 128, "media": {"max_pixels": 100352}, "allow_remote": True}
    with Engine(*load(files / "checkpoint", **settings, guard=guard), options=options) as engine:
        engine.warmup()
        yield engine


class Running:
    """A server that runs in a thread.

    Attributes:
      url: where it listens.
      service: its state.
    """

    def __init__(self, engine, **options):
        self.options = ServeOptions(port=0, **options)
        self.service: Service
        self.server: Server
        self._ready = threading.Event()
        self.engine, self.error = engine, None
        self.done = True
        self._listener = listen(self.options.host, 0)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        async def run():
            folder = self.options.state_dir
            files = FileStore(folder and folder / "files", self.options.max_stored_bytes)
            self.service = Service(self.options, "tiny", files)
            batches = Batches(self.service, folder and folder / "batches", lambda: "checkpoint")
            self.server = Server(self.service, batches)
            self._ready.set()
            await self.server.run(self._listener, self)  # pyright: ignore
            self.service.close()
            batches.close()

        asyncio.run(run())

    def __enter__(self):
        self._thread.start()
        self._ready.wait()
        wait_for(lambda: httpx.get(f"{self.url}/ready", timeout=30).status_code == 200)
        return self

    def __exit__(self, *_):
        if self._thread.is_alive():
            self.server.drain()
            self.server.drain()
        self.join()

    def join(self):
        self._thread.join(30)
        assert not self._thread.is_alive()

    def client(self, **settings):
        """An official client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", **{"max_retries": 0, "timeout": 120, **settings})

    def async_client(self):
        """An official client for asyncio."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=300)


def wait_for(condition, seconds=60):
    """Waits until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(engine):
    with Running(engine) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture
def serving(engine):
    """Starts servers with options of their own."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(Running(engine, **options))


@pytest.fixture(scope="session")
def long_ask(engine):
    """The body of a request whose answer does not end by itself for a while."""
    ends = {str(token): -100 for token in engine.defaults.end_tokens}
    return {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1500, "logit_bias": ends}
