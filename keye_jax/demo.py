"""The main job on a model small enough for any machine: `python -m keye_jax.demo DIR`.

Writes a checkpoint in the released layout with random weights, a video clip and a picture. Then it runs the commands
that the real model needs: convert, inspect, and two questions. Only the answers are nonsense.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.testing import write_clip, write_picture, write_processor_files

CONFIG = presets.TINY

MARKER = ".keye-jax-demo"
"""A file that tells a later demo that it may replace what this one wrote."""

_WRITTEN = ("hf", "orbax", "orbax.partial", "clip.mp4", "picture.png")


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


def write_inputs(directory: Path) -> None:
    """Writes `hf/`, a tiny checkpoint as the publisher would release it, `clip.mp4` and `picture.png`."""
    from convert.synthetic import write_checkpoint

    config = KeyeConfig.from_file(CONFIG)
    write_checkpoint(directory / "hf", config, seed=0, shard_size=2_000_000)
    write_processor_files(directory / "hf", config)
    write_clip(directory / "clip.mp4", seconds=20)
    write_picture(directory / "picture.png", size=(640, 480))


def run(*arguments: str) -> None:
    """Shows a `keye-jax` command and runs it with this Python.

    Raises:
      CalledProcessError: the command failed.
    """
    print(f"\n$ keye-jax {shlex.join(arguments)}", flush=True)
    flags = ["-P"] if sys.flags.safe_path else []
    subprocess.run([sys.executable, *flags, "-m", "keye_jax.cli", *arguments], check=True)


def demonstrate(directory: Path) -> None:
    """Writes the inputs to `directory` and runs all commands on them."""
    start = time.perf_counter()
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

    top_k = KeyeConfig.from_file(CONFIG).sa_config.topk
    print(f"\nEach token attended to at most {top_k} earlier tokens, which its indexer chose.")
    print("The weights are random, and so are the answers. Everything else works as with the real model.")
    print(f"{directory}/ has all files. Done in {time.perf_counter() - start:.0f} s.")


def main() -> int:
    """Runs the demo in the folder named on the command line. Returns the exit code: 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m keye_jax.demo", description="Convert a tiny random checkpoint and ask it about a clip."
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a new folder, an empty one, or an earlier demo's")
    directory = parser.parse_args().directory
    try:
        if importlib.util.find_spec("av") is None:
            raise UserError("the demo writes a video, which needs PyAV: pip install 'keye-jax[video]'")
        prepare(directory)
    except (UserError, OSError) as error:
        print(f"keye-jax: {error}", file=sys.stderr)
        return 2
    try:
        demonstrate(directory)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
