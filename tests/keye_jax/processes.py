"""Jobs of several real processes on one machine."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

from convert import convert
from convert.synthetic import write_checkpoint
from keye_jax.config import KeyeConfig
from keye_jax.testing import write_clip, write_picture, write_processor_files
from tests.compiler_flags import COMPILER_FLAGS

ROOT = Path(__file__).parents[2]
SHARDING = ROOT / "configs" / "sharding" / "combined.yaml"


def write_inputs(directory):
    """Writes `orbax`, a converted checkpoint that is mostly experts, as the released one is, a clip and a picture."""
    config = KeyeConfig.from_file(ROOT / "configs" / "model" / "tiny.json")
    vision = dataclasses.replace(config.vision_config, num_hidden_layers=1)
    config = dataclasses.replace(
        config, num_hidden_layers=1, hidden_size=256, moe_intermediate_size=768, vision_config=vision
    )
    write_checkpoint(directory / "hf", config, dtype="float32")
    write_processor_files(directory / "hf", config)
    convert(directory / "hf", directory / "orbax")
    write_clip(directory / "clip.mp4", seconds=4, size=(112, 56))
    write_picture(directory / "picture.png", size=(84, 56))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def begin(*arguments, environment=None):
    """Starts Python with arguments, on one CPU device, and with these variables too. Programs are quick to compile."""
    given = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": COMPILER_FLAGS}
    given["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    environment = os.environ | given | (environment or {})
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, seconds=240):
    """Exit code, stdout and stderr; a process that does not end in time is killed, and its test fails."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def told(process, beginning):
    """The first line on stderr that begins so."""
    lines = []
    for line in process.stderr:
        if line.startswith(beginning):
            return line
        lines.append(line)
    raise AssertionError("".join(lines))
