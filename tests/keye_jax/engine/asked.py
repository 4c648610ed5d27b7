"""Asks an engine several things at once, in one process or in several: `python -m tests.keye_jax.engine.asked`.

The arguments are a directory of `processes.write_inputs`; a sharding file, or "-"; the port, the number of processes,
and which one this is. Process 0 prints an object: for each request the token ids and by how much each token is ahead of
the second likeliest, its text if it is bound to a grammar, or how else it ended. With the further argument "on" it then
goes on asking for ever.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llguidance import LLMatcher

from keye_jax.engine.request import Request, RequestError
from keye_jax.runtime import distributed
from keye_jax.runtime.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def ask(content, *, tokens: int, **others) -> Request:
    return Request(messages=[{"role": "user", "content": content}], max_tokens=tokens, sampling=GREEDY, **others)


def requests(files: Path) -> dict[str, Request]:
    """What is asked, by name."""
    video = {"type": "video", "video": str(files / "clip.mp4")}
    picture = {"type": "image", "image": str(files / "picture.png")}
    scores = {"top_logprobs": 2}
    return {
        "text": ask("What is a ball?", tokens=12, **scores),
        "long": ask(" ".join(str(number) for number in range(70)), tokens=12, **scores),
        "picture": ask([picture, {"type": "text", "text": "What is it?"}], tokens=12, **scores),
        "video": ask([video, {"type": "text", "text": "What happens?"}], tokens=12, **scores),
        "bound": ask("hello", tokens=40, grammar=LLMatcher.grammar_from_lark('start: "a ball"'), thinking_budget=3),
        "raw": Request(prompt="hello", max_tokens=12, sampling=GREEDY, top_logprobs=2),
        "stopped": ask("hello", tokens=1000, stop=("zzz",)),
        "missing": ask([{"type": "image", "image": "/nowhere.png"}], tokens=4),
        "broken": ask([{"type": "video", "video": "data:video/mp4;base64,AAAA"}], tokens=4),
        "too large": ask("hello", tokens=100_000),
    }


def main() -> None:
    files, sharding = Path(sys.argv[1]), sys.argv[2]
    port, count, number = map(int, sys.argv[3:6])
    if count > 1:
        distributed.start(f"127.0.0.1:{port}", count, number)
    said = distributed._job.errors if distributed._job else sys.stdout

    from keye_jax.config import KeyeConfig
    from keye_jax.engine.engine import Engine
    from keye_jax.engine.options import EngineOptions
    from keye_jax.sharding import MeshRules, ShardingConfig

    rules = None
    if sharding != "-":
        rules = MeshRules.create(ShardingConfig.from_file(sharding), KeyeConfig.from_file(files / "orbax"))
    options = EngineOptions(
        rows=4, cache_tokens=8192, max_context=2048, small_chunk=64, media_workers=1, media_bytes=1 << 26
    )
    loading = {"dtype": "float32", "prefill_chunk": 128, "media": {"max_pixels": 100352}}
    with Engine.from_checkpoint(files / "orbax", rules=rules, options=options, **loading) as engine:
        if engine.takes_requests:
            print(json.dumps(answers(engine, files)), file=said, flush=True)
            if sys.argv[6:] == ["on"]:
                while True:
                    engine.submit(ask("hello", tokens=200)).result()


def answers(engine, files: Path) -> dict:
    handles = {name: engine.submit(request) for name, request in requests(files).items()}
    next(iter(handles["stopped"]))
    handles["stopped"].cancel()
    found = {}
    for name, handle in handles.items():
        try:
            (choice,) = handle.result(300).choices
        except RequestError as error:
            found[name] = error.kind
            continue
        if handle is handles["bound"]:
            found[name] = choice.text
            continue
        leads = [each.top[0][1] - each.top[1][1] for each in choice.logprobs or ()]
        found[name] = [choice.token_ids, leads] if leads else choice.finish_reason
    return found


if __name__ == "__main__":
    main()
