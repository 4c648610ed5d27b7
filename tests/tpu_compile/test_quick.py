"""The quick subset of `python -m tests.tpu_compile`, for one generation, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu_compile.compiler import library


@pytest.mark.skipif(library() is None, reason="the TPU compiler, libtpu, is not installed")
def test_programs_for_tpus_compile():
    command = [sys.executable, "-m", "tests.tpu_compile", "--quick", "--generation", "v5p"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
