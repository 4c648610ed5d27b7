"""What `keye_jax.processor` imports."""

import subprocess
import sys
from pathlib import Path


def test_the_processor_needs_no_jax():
    program = "import keye_jax.processor, sys; print(*{'jax', 'flax', 'orbax'} & sys.modules.keys())"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
