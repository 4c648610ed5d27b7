"""Ctrl-C at random moments of every command: `python -m tests.interrupts --tries 30 --seed 0`.

Each try starts a command, waits for a random part of the time that it takes, and interrupts it: alone or with all its
processes, once or twice. It has to end within seconds with one line and exit code 130, or to have ended before, and to
leave no process. What a conversion leaves must be what the next one continues. A server is interrupted while it loads
the model, while it answers, and while nobody asks; a batch and a training also when they have results. Ends with exit
code 1 if a try fails.

The time of a try begins when the command has taken over SIGTERM, which it does together with Ctrl-C and /proc shows.
Before that, Python starts and imports one module of the package, and answers Ctrl-C with a traceback. How long that
took is printed and not tried. So the tool needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import httpx

from convert.synthetic import write_checkpoint
from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.testing import write_clip
from keye_jax.train.report import MEASURES
from keye_jax.train.shapes.files import write_model_files
from tests.compiler_flags import COMPILER_FLAGS
from tests.keye_jax.processes import ROOT, free_port, write_inputs

LIMIT_S = 10.0
"""From the last signal to the end of the process, on a busy machine."""

_PHASE_S = 300.0
_ENDINGS = ("keye-jax: interrupted", "keye-jax: stopped by SIGINT")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of `keye-jax`.

    Attributes:
      arguments: with "{out}" for a path that is new for each try.
      check: takes that path after the command was interrupted; says what is wrong with what is there, or "".
      beside: takes that path, and does something while the command runs; gives a function that says what the command is
        doing.
      order_s: seconds that it may take to end in its own order, after one signal.
      code: its exit code where nobody interrupts it.
      phases: what it can be doing, and the seconds from the beginning of that in which it is interrupted. Without any,
        the moment is one of the time that the whole command takes.
    """

    arguments: Sequence[str]
    check: Callable[[Path], str] = lambda out: ""
    beside: Callable[[Path], AbstractContextManager[Callable[[], str]]] = lambda out: contextlib.nullcontext(lambda: "")
    order_s: float = LIMIT_S
    code: int = 0
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)


def commands(folder: Path) -> dict[str, Command]:
    """The commands, with inputs that are written into a folder."""
    write_inputs(folder)
    write_checkpoint(folder / "small", KeyeConfig.from_file(presets.EMBEDDED), seed=0)
    write_model_files(folder / "small")
    write_clip(folder / "long.mp4", seconds=20, size=(112, 56))
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What moves?"}]}]}
    media = {"type": "video_url", "video_url": {"url": str(folder / "long.mp4")}}
    body["messages"][0]["content"].insert(0, media)
    asked = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    lines = [json.dumps({"custom_id": str(number), **asked}) for number in range(100)]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    given = ("--checkpoint", str(folder / "orbax"))
    golden = ROOT / "tests" / "golden" / "a"

    def can_continue(arguments: Sequence[str], out: Path) -> str:
        code, _, err = _ended(_start([each.format(out=out) for each in arguments])[0])
        if out.is_dir() and code == 2 and "is not empty" in err:
            return ""  # it was whole
        return "" if code == 0 else f"the same command, run again, ends with {code}: {err}"

    converts = ("convert", str(folder / "hf"), "{out}")
    quantizes = ("quantize", str(folder / "hf"), "{out}", "--experts", "int4", "--attention", "int8")

    def has_whole_lines(out: Path) -> str:
        text = out.read_text() if out.exists() else ""
        for line in text.splitlines()[: None if text.endswith("\n") else -1]:
            if json.loads(line)["response"] is None:
                return f"an interrupted request has a result: {line}"
        return ""

    port = free_port()
    small = ("--dtype", "float32", "--prefill-chunk", "128", "--rows", "2", "--cache-tokens", "4K", "--no-warmup")
    return {
        "convert": Command(converts, functools.partial(can_continue, converts)),
        "quantize": Command(quantizes, functools.partial(can_continue, quantizes)),
        "generate": Command(
            ("generate", *given, "--video", str(folder / "long.mp4"), "--prompt", "?", "--max-new-tokens", "20")
        ),
        "batch": Command(
            (
                *("batch", *given, "--input", str(folder / "in.jsonl"), "--output", "{out}", "--max-tokens", "8"),
                *("--rows", "2", "--cache-tokens", "16K", "--grace", "2"),
            ),
            has_whole_lines,
            beside=lambda out: _looking(out, "answering"),
            phases={"loading": 30, "answering": 3},
        ),
        "warmup": Command(("warmup", "batch", *given, "--rows", "2", "--cache-tokens", "16K")),
        "bench": Command(
            (
                *("bench", "--config", str(folder / "hf" / "config.json"), "--prefill", "128", "--decode", ""),
                *("--packed", "", "--unrelated", "", "--repeats", "1", "--no-dense", "--no-fp8", "--no-unions"),
            )
        ),
        "plan": Command(("plan", "--platform", "h200:4", "--sharding", "expert", "--context", "8K", "--no-compile")),
        "verify": Command(("verify", "--checkpoint", str(golden), "--golden", str(golden / "golden.npz"))),
        "inspect": Command(("inspect", str(folder / "orbax"), "--check")),
        "doctor": Command(("doctor",)),
        "eval": Command(("eval", "shapes", "--checkpoint", str(folder / "small"), "--videos", "4"), code=1),
        "frames": Command(("frames", str(folder / "long.mp4"), "--out", "{out}")),
        "train": Command(
            ("train", "--config", "shapes_cpu", "--output", "{out}"),
            beside=lambda out: _looking(out / MEASURES, "training"),
            phases={"loading": 20, "training": 5},
            order_s=60,  # it ends a step and saves
        ),
        "serve": Command(
            ("serve", *given, *small, "--port", str(port)),
            beside=lambda out: _client(port),
            phases={"loading": 8, "idle": 1, "answering": 2},
        ),
    }


@contextlib.contextmanager
def _looking(results: Path, doing: str) -> Iterator[Callable[[], str]]:
    """Gives a function that says "loading", and another word when there are results."""
    yield lambda: doing if results.exists() and results.stat().st_size else "loading"


@contextlib.contextmanager
def _client(port: int) -> Iterator[Callable[[], str]]:
    """Asks a server again and again, with pauses; gives a function that says what the server is doing."""
    doing, over = ["loading"], threading.Event()
    body = {"messages": [{"role": "user", "content": "What moves?"}], "max_tokens": 200, "stream": True}

    def ask() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while not over.wait(0.5):
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/ready").status_code != 200:
                        continue
                    doing[0] = "idle"
                    if over.wait(1):
                        return
                    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                        doing[0] = "answering"
                        answer.read()
                    doing[0] = "idle"

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield lambda: doing[0]
    finally:
        over.set()
        thread.join()


def _start(arguments: Sequence[str]) -> tuple[subprocess.Popen[str], float]:
    """Starts the command at the head of a process group, as a shell does.

    Returns:
      The process, and the seconds that it took to take over signals.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": COMPILER_FLAGS}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / "build" / "compiled"))
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "keye_jax.cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            break
        time.sleep(0.001)
    return process, time.monotonic() - began


def _ended(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; raises TimeoutExpired if the process, or one that it has started, does not end."""
    try:
        out, err = process.communicate(timeout=seconds)  # its children have the same pipes
        return process.returncode, out, err
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise


def interrupt(
    process: subprocess.Popen[str],
    delay: float,
    *,
    group: bool,
    again: float | None,
    doing: Callable[[], str],
    whole: int = 0,
    order_s: float = LIMIT_S,
) -> tuple[str, str]:
    """Interrupts a command once.

    Args:
      process: of the command.
      delay: seconds until then.
      group: whether its children are signalled too, as by a terminal.
      again: seconds from the first signal to a second; None for none.
      doing: says what the command is doing.
      whole: its exit code where nobody interrupts it.
      order_s: how long it may take after one signal; after two it has `LIMIT_S`.

    Returns:
      "interrupted", with what it was doing, or "over", which it was before; and what is wrong, or "".
    """
    time.sleep(delay)
    state = f"interrupted {doing()}".strip()
    for pause in [0.0] + ([] if again is None else [again]):
        time.sleep(pause)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT) if group else process.send_signal(signal.SIGINT)
    began, limit = time.monotonic(), order_s if again is None else LIMIT_S
    try:
        code, _, err = _ended(process, limit)
    except subprocess.TimeoutExpired:
        return state, f"it has not ended after {limit:.0f} s"
    if code == whole:
        return "over", "" if "Traceback" not in err else err
    told = [line for line in err.splitlines() if line.startswith(_ENDINGS)]
    if code != 130 or len(told) != 1 or "Traceback" in err or "Error" in err:
        return state, f"exit code {code} after {time.monotonic() - began:.1f} s: {err}"
    return state, ""


def attempt(command: Command, seconds: float, out: Path, draw: random.Random) -> tuple[str, str]:
    """`interrupt` at a random moment of the `seconds` that the command takes, and a look at what it has left."""
    arguments = [argument.format(out=out) for argument in command.arguments]
    again, group = draw.choice([None, None, 0.05, 0.5]), draw.random() < 0.5
    with command.beside(out) as doing:
        process, start = _start(arguments)
        if command.phases:
            phase, seconds = draw.choice(list(command.phases.items()))
            end = time.monotonic() + _PHASE_S
            while doing() != phase and process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
        delay = draw.uniform(0, seconds)
        state, wrong = interrupt(
            process, delay, group=group, again=again, doing=doing, whole=command.code, order_s=command.order_s
        )
    what = f"{state:21} at {delay:6.2f} of {seconds:6.2f} s after {start:.2f} s" + (
        "" if again is None else f", twice in {again} s"
    )
    return what, wrong or command.check(out)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.interrupts", description=__doc__)
    parser.add_argument("--tries", type=int, default=30, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=20, help="seconds of a command in which it is interrupted")
    parser.add_argument("--only", help="one command")
    options = parser.parse_args()
    # A shell has processes that it starts in the background ignore Ctrl-C, and those of the tries would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder, numbers = Path(name), itertools.count()
        for command_name, command in commands(folder).items():
            if options.only not in (None, command_name):
                continue
            draw, good = random.Random(f"{options.seed} {command_name}"), 0
            seconds = 0.0
            if not command.phases:
                process, _ = _start([a.format(out=folder / "whole") for a in command.arguments])
                began = time.monotonic()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _ended(process, options.longest)
                seconds = time.monotonic() - began
            for _ in range(options.tries):
                out = folder / f"{next(numbers)}"
                what, wrong = attempt(command, seconds, out, draw)
                good += not wrong
                print(f"{command_name:9} {what}{': ' if wrong else ''}{wrong}", flush=True)
            for path in folder.glob("[0-9]*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            print(f"{command_name:9} {good} of {options.tries}", flush=True)
            failures += options.tries - good
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
