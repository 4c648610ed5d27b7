"""`python -m tests.mixed_requests`: many requests of all kinds to one engine with a tiny model, on Linux and a CPU.

Texts, pictures and videos of 5 to 120 seconds come between requests that are cancelled, malformed, too large, broken,
that crash their decoder, or that never end. Each must be answered, or refused for what it is. Some of those that were
answered are asked again, alone and of an engine without a cache, and must have the same tokens. Memory is counted as
requests end: it must not grow by more than the cache of embeddings may take. At the end no page may be held.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import http.server
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.synthetic import write_checkpoint
from keye_jax.config import KeyeConfig
from keye_jax.engine.checkpoint import load_runtime
from keye_jax.engine.engine import Engine
from keye_jax.engine.generation_config import GenerationDefaults
from keye_jax.engine.handle import Handle
from keye_jax.engine.options import EngineOptions
from keye_jax.engine.request import Request, RequestError, Result
from keye_jax.runtime.sampling import SamplingParams
from keye_jax.testing import write_clip, write_picture, write_processor_files
from tests.keye_jax.engine.media.faults import FaultyProcessor

GOLDEN = Path(__file__).parent / "golden" / "a"
SECONDS = (5, 15, 30, 60, 120)
PICTURES = ((84, 56), (112, 112), (300, 200))
EMBEDDING_BYTES = 4 << 20
SPARE_BYTES = 48 << 20
"""What memory may grow by beside the cache of embeddings: allocators keep what was freed."""

OPTIONS = EngineOptions(
    rows=32,
    cache_tokens=65536,
    small_chunk=64,
    chunks_between=8,
    media_workers=2,
    media_bytes=64 << 20,
    media_timeout=20,
    embedding_cache_bytes=EMBEDDING_BYTES,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A request and what should become of it.

    Attributes:
      name: the kind of request.
      request: itself.
      refusal: the kind of its RequestError; None if it is to be answered.
      cancel_after: pieces of the answer after which it is cancelled; None if it is not.
    """

    name: str
    request: Request
    refusal: str | None = None
    cancel_after: int | None = None


class _Endless(http.server.BaseHTTPRequestHandler):
    """A video that never ends."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(bytes(1 << 10))
                time.sleep(0.05)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Requests:
    """Draws requests about the files of a folder.

    Args:
      folder: where the files are written.
      url: of an endless video.
    """

    def __init__(self, folder: Path, url: str, draws: random.Random):
        self._folder, self._url, self._draws = folder, url, draws
        for seconds in SECONDS:
            write_clip(folder / f"{seconds}.mp4", seconds=seconds, fps=4, size=(112, 112))
        for number, size in enumerate(PICTURES):
            write_picture(folder / f"{number}.png", size=size)
        whole = (folder / "15.mp4").read_bytes()
        (folder / "cut.mp4").write_bytes(whole[: len(whole) // 3])
        (folder / "broken.png").write_bytes(b"no picture")

    def cases(self, count: int) -> list[Case]:
        """In any order, with some of each kind."""
        answered = (self._text, self._text, self._picture, self._video, self._video, self._cancelled)
        cases = [self._draws.choice(answered)() for _ in range(count)]
        refused = self._refused()
        for place, case in zip(self._draws.sample(range(count), min(count // 2, len(refused))), refused, strict=False):
            cases[place] = case
        return cases

    def _ask(self, *parts: dict[str, Any], **others: Any) -> Request:
        draws = self._draws
        words = " ".join(str(draws.randrange(10_000)) for _ in range(draws.randint(1, 60)))
        content = [*parts, {"type": "text", "text": words}]
        greedy = draws.random() < 0.5
        sampling = SamplingParams(temperature=0.0) if greedy else SamplingParams(seed=draws.randrange(1000))
        values = {"max_tokens": draws.randint(1, 48), "sampling": sampling, **others}
        return Request(messages=[{"role": "user", "content": content}], **values)

    def _text(self) -> Case:
        return Case("text", self._ask(n=self._draws.choice((1, 1, 1, 3))))

    def _picture(self) -> Case:
        names = self._draws.choices(range(len(PICTURES)), k=self._draws.randint(1, 3))
        return Case("picture", self._ask(*(self._image(f"{name}.png") for name in names)))

    def _video(self) -> Case:
        seconds = self._draws.choice(SECONDS)
        start = self._draws.randrange(seconds - 4) if self._draws.random() < 0.5 else 0
        return Case("video", self._ask(self._clip(f"{seconds}.mp4", start=start, fps=self._draws.choice((0.5, 1)))))

    def _cancelled(self) -> Case:
        case = self._draws.choice((self._text, self._picture, self._video))()
        request = dataclasses.replace(case.request, n=1, max_tokens=400)
        return Case(f"cancelled {case.name}", request, cancel_after=self._draws.randint(0, 20))

    def _refused(self) -> list[Case]:
        image, clip, ask = self._image, self._clip, self._ask
        crash, hang = ({"options": {"fault": f"decode {what}"}} for what in ("crash", "hang"))
        return [
            *(Case("no role", Request(messages=[{"role": "nobody", "content": "?"}]), "invalid") for _ in range(4)),
            *(Case("no messages", Request(messages=3), "invalid") for _ in range(2)),  # pyright: ignore
            *(Case("wrong option", ask(clip("5.mp4", fps=-1)), "invalid") for _ in range(4)),
            *(Case("no token", ask(logit_bias={10**7: 1.0}), "invalid") for _ in range(4)),
            *(Case("long answer", ask(max_tokens=10**6), "too_large") for _ in range(4)),
            *(Case("long text", ask({"type": "text", "text": "a b " * 9000}), "too_large") for _ in range(2)),
            *(Case("long video", ask(clip("120.mp4", fps=4)), "too_large") for _ in range(4)),
            *(Case("no file", ask(image("none.png")), "media") for _ in range(4)),
            *(Case("no picture", ask(image("broken.png")), "media") for _ in range(4)),
            *(Case("cut video", ask(clip("cut.mp4")), "media") for _ in range(4)),
            *(Case("no server", ask({"type": "image", "image": "http://127.0.0.1:9/a"}), "unreachable") for _ in "ab"),
            *(Case("crash", ask(clip("5.mp4"), **crash), "media") for _ in range(4)),
            *(Case("hang", ask(clip("5.mp4"), **hang), "timeout") for _ in range(3)),
            *(Case("endless", ask({"type": "video", "video": self._url}), "timeout") for _ in range(3)),
        ]

    def _image(self, name: str) -> dict[str, Any]:
        return {"type": "image", "image": str(self._folder / name)}

    def _clip(self, name: str, **options: Any) -> dict[str, Any]:
        return {"type": "video", "video": str(self._folder / name), **options}


def outcome(case: Case, handle: Handle) -> Result | RequestError:
    """Waits for what becomes of a request, and cancels it if it is to be."""
    try:
        if case.cancel_after is not None:
            pieces = iter(handle)
            for _ in range(case.cancel_after):
                next(pieces, None)
            handle.cancel()
        return handle.result(600)
    except RequestError as error:
        return error


def mistake(case: Case, found: Result | RequestError) -> str | None:
    """What is wrong with an outcome; None if it is as it should be."""
    if isinstance(found, RequestError):
        wanted = "cancelled" if case.cancel_after is not None else case.refusal
        return None if found.kind == wanted else f"{found.kind} ({found}) in place of {wanted or 'an answer'}"
    if case.refusal is not None:
        return f"an answer in place of {case.refusal}"
    reasons = {choice.finish_reason for choice in found.choices}
    allowed = {"stop", "length"} if case.cancel_after is None else {"stop", "length", "cancelled"}
    return None if reasons <= allowed else f"it ended by {reasons}"


def differs(found: Result, alone: Result) -> bool:
    """Whether an answer has other tokens than alone; of one that was cancelled, its beginning is compared."""
    for choice, expected in zip(found.choices, alone.choices, strict=True):
        count = len(choice.token_ids) if choice.finish_reason == "cancelled" else None
        if choice.token_ids != expected.token_ids[:count]:
            return True
    return False


def memory() -> tuple[int, int]:
    """MiB of this process, and of it and its workers together, where what they share counts once (Pss)."""
    children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
    found = []
    for pid in ("self", *children):
        with contextlib.suppress(OSError):  # it has ended
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            found.append(sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) >> 10)
    return found[0], sum(found)


def run(engine: Engine, cases: list[Case], outstanding: int) -> Iterator[tuple[int, Result | RequestError]]:
    """Asks all, so many at once, and yields the number and the outcome of each as it ends."""
    ended: collections.deque[tuple[int, Result | RequestError]] = collections.deque()
    slots, done = threading.Semaphore(outstanding), threading.Semaphore(0)

    def ask(number: int, case: Case) -> None:
        ended.append((number, outcome(case, engine.submit(case.request))))
        slots.release()
        done.release()

    def feed() -> None:
        for number, case in enumerate(cases):
            slots.acquire()
            threading.Thread(target=ask, args=(number, case)).start()

    threading.Thread(target=feed).start()
    for _ in cases:
        done.acquire()
        yield ended.popleft()


def main() -> int:
    """Parses the command line, asks, compares and prints; returns 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.mixed_requests", description=__doc__)
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="how many")
    parser.add_argument("--outstanding", type=int, default=64, metavar="N", help="how many the engine has at once")
    parser.add_argument("--alone", type=int, default=24, metavar="N", help="how many are asked again, alone")
    parser.add_argument("--seed", type=int, default=0, help="other requests for another seed")
    arguments = parser.parse_args()
    draws, findings = random.Random(arguments.seed), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="keye-jax-") as directory:
        folder = Path(directory)
        config = KeyeConfig.from_file(GOLDEN)
        write_checkpoint(folder, config, seed=0)
        write_processor_files(folder, config)
        media = {"min_pixels": 4 * 784, "max_pixels": 16 * 784}
        processor = FaultyProcessor.from_checkpoint(folder, config, allow_remote=True, defaults=media)
        loaded = load_runtime(folder, config, dtype="float32", prefill_chunk=256), processor
        defaults = GenerationDefaults.from_checkpoint(folder)
        url = f"http://127.0.0.1:{server.server_address[1]}/a.mp4"
        cases = Requests(folder, url, draws).cases(arguments.requests)
        found: dict[int, Result | RequestError] = {}
        memories: list[int] = []
        with Engine(*loaded, defaults, OPTIONS) as engine:
            print(f"warm after {engine.warmup():.0f} s; memory {memory()[1]:,} MiB", flush=True)
            begun = time.monotonic()
            for number, each in run(engine, cases, arguments.outstanding):
                found[number] = each
                if len(found) % max(1, len(cases) // 4) == 0:
                    own, whole = memory()
                    memories.append(whole)
                    seconds = time.monotonic() - begun
                    text = f"{len(found)} requests after {seconds:.0f} s: {own:,} MiB, with workers {whole:,} MiB"
                    print(text, flush=True)
            engine.drain()
            counts = engine.stats()
        growth = (memories[-1] - memories[0]) << 20
        if growth > EMBEDDING_BYTES + SPARE_BYTES:
            findings.append(f"memory grew by {growth >> 20:,} MiB from the first quarter to the end")
        if counts.scheduler.free_pages + counts.scheduler.cached_pages != counts.scheduler.pages:
            findings.append(f"pages are held: {counts.scheduler}")
        if counts.compilations:
            findings.append(f"{counts.compilations} programs were compiled after warmup")
        kinds: collections.Counter[str] = collections.Counter()
        for number, each in sorted(found.items()):
            case = cases[number]
            became = each.kind if isinstance(each, RequestError) else each.choices[0].finish_reason
            kinds[f"{case.name}: {became}"] += 1
            if (wrong := mistake(case, each)) is not None:
                findings.append(f"request {number} ({case.name}): {wrong}")
        for name, count in sorted(kinds.items()):
            print(f"{count:4}  {name}")
        answered = [number for number, each in found.items() if isinstance(each, Result)]
        again = draws.sample(sorted(answered), min(arguments.alone, len(answered)))
        without = dataclasses.replace(OPTIONS, prefix_cache=False, embedding_cache_bytes=0)
        with Engine(*loaded, defaults, without) as engine:
            for number in again:
                together, alone = found[number], engine.submit(cases[number].request).result(600)
                if isinstance(together, Result) and differs(together, alone):
                    findings.append(f"request {number} ({cases[number].name}): other tokens than alone")
        print(f"{len(again)} asked again, alone: {collections.Counter(cases[number].name for number in again)}")
    server.shutdown()
    for finding in findings:
        print(finding)
    print(f"{len(findings)} findings in {len(cases)} requests, seed {arguments.seed}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
