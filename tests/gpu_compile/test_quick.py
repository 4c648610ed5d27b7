"""Quick subsets of `python -m tests.gpu_compile` and its `memory`, in processes of their own, and ptxas' messages."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_compile.compiler import prepared, read_messages

GOOD = """\
ptxas k.ptx, line 199; info    : Potential out of bound access while accessing symbol 's' with instruction type '.b32'.
ptxas info    : (C7519) warpgroup.arrive is injected in around line 920 by compiler to allow use of registers in GMMA
ptxas info    : Function properties for kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compile time = 2064.710 ms
"""
BAD = """\
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient
ptxas info    : (C7504) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirement
    104 bytes stack frame, 104 bytes spill stores, 116 bytes spill loads
ptxas info    : Used 255 registers, used 16 barriers, 104 bytes cumulative stack size, 1 bytes smem
"""


def test_messages_of_ptxas():
    good, bad = read_messages(GOOD), read_messages(BAD)
    assert (good.registers, good.stack, good.spills, good.problems, good.seconds) == (168, 0, 0, (), 2.06471)
    assert (bad.registers, bad.stack, bad.spills) == (255, 104, 220)
    assert [problem[:7] for problem in bad.problems] == ["(C7512)", "(C7504)"]


@pytest.mark.slow
@pytest.mark.skipif(prepared() is None, reason="the compilers for NVIDIA GPUs are not installed")
@pytest.mark.parametrize("module", ["tests.gpu_compile", "tests.gpu_compile.memory"])
def test_programs_for_hopper_compile_well(module):
    command = [sys.executable, "-m", module, "--quick"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
