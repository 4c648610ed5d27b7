"""The benchmark of reading a video, with short clips."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_all_is_measured():
    command = [sys.executable, "-m", "keye_jax.bench.media", "--seconds", "2", "--long-seconds", "3", "--runs", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("clip.mp4: 4 frames of 588x336, medians of 1 runs\n")
    for name in ("keye-jax", "ffmpeg -threads 1"):
        assert re.search(rf"^ +{name} +\d+\.\d\d +\d+\.\d\d ", done.stdout, re.M)
    assert re.search(
        r"^3 s: 6 frames of 588x336, peak \d+ MiB, of which the model's input is 3 MiB$", done.stdout, re.M
    )
