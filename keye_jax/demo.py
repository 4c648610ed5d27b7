"""The main job on a model small enough for any machine: `python -m keye_jax.demo DIR`.

It converts and plans the model that comes with the package, draws a clip at random, asks five questions about it, and
prints the truth beside the answers.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError

if TYPE_CHECKING:
    from keye_jax.train.shapes.questions import Question
    from keye_jax.train.shapes.scene import Scene

MARKER = ".keye-jax-demo"
"""A file that tells a later demo that it may replace what this one wrote."""

_WRITTEN = ("orbax", "orbax.partial", "clip.mp4")


def prepare(directory: Path) -> None:
    """Makes `directory`, or deletes what an earlier demo wrote there. Other files stay.

    Raises:
      UserError: `directory` is a file, or it holds files and no demo made it.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{str(directory)!r} is a file; it must be a new folder, an empty one, or that of another demo")
    marker = directory / MARKER
    if directory.is_dir() and any(directory.iterdir()) and not marker.is_file():
        raise UserError(
            f"{str(directory)!r} holds files and was not made by the demo; it must be a new folder, an empty one, or "
            "that of another demo"
        )
    directory.mkdir(parents=True, exist_ok=True)
    marker.write_text("`python -m keye_jax.demo` made this folder and may replace what it wrote here.\n")
    for path in (directory / name for name in _WRITTEN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


ASKED = ("attributes", "counts", "order", "when", "clock")
"""Kinds of questions about the clip, one of each."""


def answer_questions(directory: Path, seed: int) -> None:
    """Converts and plans the package's model, and asks it about a clip, all in this process.

    Args:
      directory: the folder to write to.
      seed: of the clip and the questions.

    Raises:
      CalledProcessError: a command failed.
    """
    import rich
    from rich.table import Table

    from keye_jax import cli
    from keye_jax.engine.engine import Engine
    from keye_jax.engine.options import EngineOptions
    from keye_jax.eval.shapes import Clip, answers
    from keye_jax.runtime.compilation_cache import enable_compilation_cache
    from keye_jax.train.shapes.video import write_video

    def command(*arguments: str) -> None:
        print(f"\n$ keye-jax {shlex.join(arguments)}", flush=True)
        if code := cli.run(cli.app, list(arguments)):
            raise subprocess.CalledProcessError(code, arguments)

    start = time.perf_counter()
    enable_compilation_cache()
    converted, video = directory / "orbax", directory / "clip.mp4"
    command("convert", str(presets.EMBEDDED_CHECKPOINT), str(converted))
    command("plan", "--platform", "h100:1", "--config", str(converted), "--context", "4K", "--no-compile")

    scene, questions = draw_clip(seed)
    write_video(video, scene)
    print(f"\nDrawn at random, seed {seed}: {video}, {scene.times[-1]:.0f} s. Five questions about it:", flush=True)
    table = Table("question", "answer", "truth", "score")
    said = []
    with Engine.from_checkpoint(converted, options=EngineOptions(cache_tokens=4096, media_workers=0)) as engine:
        for answer in answers(engine, [Clip(video, questions)]):
            said.append(answer)
            table.add_row(answer.question.text, answer.said, answer.question.answer, f"{answer.score:.2f}")
    rich.print(table)
    right = sum(answer.score >= 0.5 for answer in said)
    print(f"{right} of {len(said)} are right. The score of an interval is its overlap with the true one (IoU).")
    top_k = KeyeConfig.from_file(converted).sa_config.topk
    print(f"Each token attended to at most {top_k} earlier tokens, which the model's indexer chose.")
    print(f"`python -m keye_jax.demo DIR --seed {seed + 1}` asks about another clip.")
    print(f"{directory}/ has all files. Done in {time.perf_counter() - start:.0f} s.")


def draw_clip(seed: int) -> tuple[Scene, tuple[Question, ...]]:
    """A clip that no training sees, and a question of each kind of `ASKED`."""
    from keye_jax.train.shapes.questions import ask
    from keye_jax.train.shapes.scene import HELD_OUT, SceneOptions, make_scene

    options = SceneOptions(needle=0.0)
    for number in itertools.count():
        scene = make_scene(HELD_OUT + seed, options, number=number)
        questions = [question for kind in ASKED for question in ask(scene, 1, (seed, number), kinds={kind: 1.0})]
        if len(questions) == len(ASKED):
            return scene, tuple(questions)
    raise AssertionError("most scenes have something of each kind")


def main() -> int:
    """Runs the demo in the folder named on the command line. Returns the exit code: 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m keye_jax.demo", description="Convert a small checkpoint and ask it about a clip."
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a new folder, an empty one, or an earlier demo's")
    parser.add_argument("--seed", type=int, help="of the clip and the questions; a random one if left out")
    arguments = parser.parse_args()
    directory, seed = arguments.directory, arguments.seed
    try:
        if seed is not None and seed < 0:
            raise UserError(f"--seed is {seed}; it must be 0 or more")
        if importlib.util.find_spec("av") is None:
            raise UserError("the demo writes a video, which needs PyAV: pip install 'keye-jax[video]'")
        prepare(directory)
    except (UserError, OSError) as error:
        print(f"keye-jax: {error}", file=sys.stderr)
        return 2
    try:
        answer_questions(directory, random.randrange(10**6) if seed is None else seed)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
