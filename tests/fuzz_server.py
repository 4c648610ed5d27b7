"""`python -m tests.fuzz_server`: mutated requests to a server with a tiny model, on Linux and a CPU.

Bodies of all interfaces are changed at random: values of other types, missing and additional fields, broken bytes, odd
headers and paths. Some clients go away in the middle. No answer may have a status of 5xx, and each error has one
sentence. At the end the engine holds no request and no page of the cache, and there are as many open files, processes
and temporary files as before.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import contextlib
import copy
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from convert.synthetic import write_checkpoint
from keye_jax.config import KeyeConfig
from keye_jax.engine.checkpoint import load
from keye_jax.engine.engine import Engine
from keye_jax.engine.options import EngineOptions
from keye_jax.processor.guard import MediaGuard
from keye_jax.testing import write_clip, write_picture, write_processor_files

GOLDEN = Path(__file__).parent / "golden" / "a"
OPTIONS = EngineOptions(
    rows=8, cache_tokens=16384, max_context=2048, small_chunk=64, media_workers=2, selection_heat=True
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, 1e308, -1e308, 2**63, 10**30, "", "x", "auto", "none", "required", "\ud800"),
    *(
        "\0",
        "a\nb",
        "<|im_end|>",
        "file:///etc/passwd",
        "http://127.0.0.1/x",
        "file-id:file-0",
        "data:,x",
        [],
        {},
        [[]],
    ),
    *([{}], {"type": "object"}, {"url": "x"}, "x" * 5000, [0] * 500, {"a": {"b": {"c": []}}}),
)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def bodies(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Requests that are answered, by their paths."""
    picture = base64.b64encode((folder / "picture.png").read_bytes()).decode()
    clip = base64.b64encode((folder / "clip.mp4").read_bytes()).decode()
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    video = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{clip}", "fps": 1}}
    text = {"type": "text", "text": "What is it?"}
    user = [{"role": "user", "content": "hello"}]
    short = {"max_tokens": 3}
    chat = "/v1/chat/completions"
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    return [
        (chat, {"messages": user, **short, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["z"], "n": 2}),
        (chat, {"messages": user, **short, "stream": True, "stream_options": {"include_usage": True}}),
        (chat, {"messages": user, **short, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}}),
        (chat, {"messages": user, **short, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}),
        (
            chat,
            {"messages": user, **short, "response_format": form, "chat_template_kwargs": {"enable_thinking": False}},
        ),
        (chat, {"messages": user, **short, "thinking_budget": 2, "selection_heat": True}),
        (chat, {"messages": [{"role": "user", "content": [shown, text]}], **short}),
        (chat, {"messages": [{"role": "user", "content": [video, text]}], **short, "stream": True}),
        ("/v1/completions", {"prompt": ["a", "b"], **short, "logprobs": 1, "stream": True}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 3, "instructions": "be short", "stream": True}),
        (
            "/v1/responses",
            {
                "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}],
                "tools": [],
                "include": ["message.output_text.logprobs"],
                "top_logprobs": 1,
            },
        ),
        ("/tokenize", {"messages": user, "return_token_strs": True}),
        ("/detokenize", {"tokens": [5, 6, 7]}),
        ("/v1/frames", {"media": f"data:video/mp4;base64,{clip}", "options": {"fps": 1}}),
        ("/v1/batches", {"input_file_id": "file-0", "endpoint": chat, "completion_window": "24h"}),
    ]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values inside of `value`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, each in inner for found in places(each, (*path, key)))]


def mutated(draws: random.Random, body: dict[str, Any]) -> Any:
    """A copy of a body with one to three changes."""
    body = copy.deepcopy(body)
    for _ in range(draws.randint(1, 3)):
        path: tuple[Any, ...] = draws.choice(places(body)[1:] or [()])
        if not path:
            return copy.deepcopy(draws.choice(VALUES))
        holder: Any = body
        for key in path[:-1]:
            holder = holder[key]
        kind = draws.random()
        if kind < 0.6:
            holder[path[-1]] = copy.deepcopy(draws.choice(VALUES))
        elif kind < 0.8:
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[draws.choice(("n", "grammar", "guided_json", "media_io_kwargs", "x" * 99))] = copy.deepcopy(
                draws.choice(VALUES)
            )
        else:
            holder.append(copy.deepcopy(draws.choice((*VALUES, holder[path[-1]]))))
        if not isinstance(body, dict) or not body:
            break
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if type(body.get(name)) is int and 3 < body[name] < 10**6:
                body[name] = 3
    return body


def damaged(draws: random.Random, content: bytes) -> bytes:
    """A body of bytes with some of them changed, cut off or doubled."""
    kind = draws.randrange(3)
    place = draws.randrange(len(content) + 1)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + draws.randbytes(draws.randint(1, 8)) + content[place + 1 :]
    return content + content[place:]


class Fuzz:
    """Sends requests and looks at the answers.

    Args:
      server: what runs; see tests/keye_jax/serve/conftest.py.
      asked: bodies by their paths.
    """

    def __init__(self, server: Any, asked: list[tuple[str, dict[str, Any]]], seed: int):
        self._server, self._asked, self._seed = server, asked, seed
        self.codes: Counter[int | str] = Counter()
        self.faults: list[str] = []
        self._client = httpx.Client(timeout=120, limits=httpx.Limits(max_connections=16))

    def send(self, number: int) -> None:
        """Sends the request of a number, which is always the same."""
        draws = random.Random(f"{self._seed} {number}")
        path, body = draws.choice(self._asked)
        body = mutated(draws, body) if draws.random() < 0.9 else body
        content = json.dumps(body).encode()
        if draws.random() < 0.15:
            content = damaged(draws, content)
        path = draws.choice((path,) * 20 + (f"{path}/", f"{path}/x", path.upper(), "/v1/files/..%2f..", "/%00", "//"))
        method = draws.choice(("POST",) * 30 + ("GET", "DELETE", "PUT", "OPTIONS"))
        headers = {"content-type": draws.choice(("application/json", "text/plain", "multipart/form-data; boundary=x"))}
        if draws.random() < 0.1:
            headers["x-request-id"] = draws.choice(("a b", "x" * 500, "{}"))
        if draws.random() < 0.1:
            self._leave(draws, method, path, content)
            return
        try:
            answer = self._client.request(method, f"{self._server.url}{path}", content=content, headers=headers)
        except httpx.TransportError as error:
            self.faults.append(f"{number}: {method} {path} has no answer ({error!r})")
            return
        self.codes[answer.status_code] += 1
        told = answer.text
        if answer.status_code >= 500 or '"code":"internal"' in told:
            self.faults.append(f"{number}: {method} {path} {content[:300]!r} has {answer.status_code} {told[:300]}")
        elif answer.status_code >= 400 and method in ("GET", "POST") and "/x" not in path:
            try:
                message = answer.json()["error"]["message"]
                assert isinstance(message, str) and message and "\n" not in message
            except (ValueError, KeyError, TypeError, AssertionError):
                self.faults.append(f"{number}: {method} {path} is refused without a sentence: {told[:300]}")

    def _leave(self, draws: random.Random, method: str, path: str, content: bytes) -> None:
        """Goes away in the middle of a request or of its answer."""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        sent = (
            (head + content)[: draws.randrange(len(head) + len(content) + 1)]
            if draws.random() < 0.5
            else head + content
        )
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._server.port), 30) as connection:
            connection.sendall(sent)
            time.sleep(draws.random() * 0.05)
        self.codes["left"] += 1

    def run(self, numbers: range) -> None:
        """Sends requests, some at once."""
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for _ in pool.map(self.send, numbers):
                pass
        self._client.close()


def held() -> dict[str, int]:
    """What this process holds of the system."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    temporary = [path for path in Path(tempfile.gettempdir()).glob("keye-jax-*") if path.is_file()]
    return {
        "open files": len(list(Path("/proc/self/fd").iterdir())),
        "processes": len(children),
        "temporary files": len(temporary),
    }


def check_end(server: Any, engine: Engine, before: dict[str, int]) -> list[str]:
    """What is left when all clients are gone, a sentence each."""
    end = time.monotonic() + 60
    while True:
        pool, stats = engine.stats().scheduler, engine.stats()
        used = pool.pages - pool.free_pages - pool.cached_pages
        left = {"requests": stats.requests, "pages": used, "answers": server.service.outstanding}
        # The connection of the client that looks, and the pages of a pool of processes, come and go.
        now = held()
        grown = {name: now[name] - before[name] for name in before if now[name] > before[name]}
        found = [f"{count} {name} are left" for name, count in (left | grown).items() if count]
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.2)


def warm(server: Any, asked: list[tuple[str, dict[str, Any]]]) -> None:
    """Asks everything once, so that what is made at the first use is there."""
    with httpx.Client(timeout=120) as client:
        for path, body in asked:
            answer = client.post(f"{server.url}{path}", json=body)
            assert answer.status_code == 200 or path == "/v1/batches", f"{path}: {answer.text}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one request")
    arguments = parser.parse_args()
    from tests.keye_jax.serve.conftest import Running

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = KeyeConfig.from_file(GOLDEN)
        write_checkpoint(folder / "checkpoint", config, seed=0)
        write_processor_files(folder / "checkpoint", config)
        write_clip(folder / "clip.mp4", seconds=2, size=(112, 112))
        write_picture(folder / "picture.png", size=(84, 56))
        settings = {"dtype": "float32", "prefill_chunk": 128, "media": {"max_pixels": 200704}}
        loaded = load(folder / "checkpoint", **settings, guard=MediaGuard())
        with Engine(*loaded, options=OPTIONS) as engine:
            engine.warmup()
            with Running(engine, max_tokens=8, stall_s=5) as server:
                asked = bodies(folder)
                warm(server, asked)
                before = held()
                fuzz = Fuzz(server, asked, arguments.seed)
                only = arguments.only
                fuzz.run(range(arguments.requests) if only is None else range(only, only + 1))
                faults = [*fuzz.faults, *check_end(server, engine, before)]
            compiled = engine.stats().compilations
    print(f"{sum(fuzz.codes.values()):,} requests: {dict(fuzz.codes.most_common())}, {compiled} compilations")
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
