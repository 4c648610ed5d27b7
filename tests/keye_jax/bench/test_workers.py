"""The benchmark of worker processes, with short clips."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_all_is_measured():
    options = ["--seconds", "2", "--long-seconds", "3", "--runs", "1", "--videos", "2"]
    command = [sys.executable, "-m", "keye_jax.bench.workers", *options]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("2 clips of 2 s, medians of 1 runs\n")
    for processes in (1, 2):
        assert re.search(rf"^ +{processes} +\d+\.\d +\d+\.\d +\d+\.\d\d +\d+   \d+\.\d$", done.stdout, re.M)
    assert re.search(r"^3 s: 6 frames in .* of which 3 MiB are shared$", done.stdout, re.M)
