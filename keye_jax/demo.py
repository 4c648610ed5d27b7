"""The main job on a model small enough for any machine: `python -m keye_jax.demo DIRECTORY`.

Writes a checkpoint in the released layout with random weights, a clip and a picture, and then runs the same commands
as for the real model: convert, inspect, and two questions. Only the answers are nonsense.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.testing import write_clip, write_picture, write_processor_files

CONFIG = presets.TINY


def write_inputs(directory: Path) -> None:
    """Writes `hf/`, a tiny checkpoint as the publisher would release it, `clip.mp4` and `picture.png`."""
    from convert.synthetic import write_checkpoint

    config = KeyeConfig.from_file(CONFIG)
    write_checkpoint(directory / "hf", config, seed=0, shard_size=2_000_000)
    write_processor_files(directory / "hf", config)
    write_clip(directory / "clip.mp4", seconds=20)
    write_picture(directory / "picture.png", size=(640, 480))


def run(*arguments: str) -> None:
    """Shows and runs a `keye-jax` command."""
    print(f"\n$ keye-jax {shlex.join(arguments)}", flush=True)
    subprocess.run([Path(sys.executable).parent / "keye-jax", *arguments], check=True)


def main() -> None:
    """Runs the demo in the directory given on the command line, which is emptied first."""
    start = time.perf_counter()
    directory = Path(sys.argv[1])
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(directory / "compiled"))
    print(f"Writing a tiny checkpoint with random weights, a 20 s clip and a picture to {directory}/", flush=True)
    write_inputs(directory)

    checkpoint = str(directory / "orbax")
    run("convert", str(directory / "hf"), checkpoint)
    run("inspect", checkpoint)
    ask = ("generate", "--checkpoint", checkpoint)
    question = "What does the clock show when the background turns green?"
    run(*ask, "--video", str(directory / "clip.mp4"), "--prompt", question, "--max-new-tokens", "48")
    question = "Describe the picture in one sentence."
    run(*ask, "--image", str(directory / "picture.png"), "--prompt", question, "--max-new-tokens", "48")

    topk = KeyeConfig.from_file(CONFIG).sa_config.topk
    print(f"\nEach token was read with at most {topk} of the tokens before it, those its indexer chose.")
    print(f"The weights are random, and so are the words; everything else is the real thing. {directory}/ has it all.")
    print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
