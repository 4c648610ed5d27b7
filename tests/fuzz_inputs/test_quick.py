"""The first cases of `python -m tests.fuzz_inputs`, in processes of their own."""

import subprocess
import sys
from pathlib import Path


def test_damaged_inputs_are_read_or_refused():
    command = [sys.executable, "-m", "tests.fuzz_inputs", "--media", "150", "--messages", "150", "--jobs", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
