"""`python -m convert` is `keye-jax convert`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:] = ["convert", *(sys.argv[1:] or ["--help"])]
    runpy.run_module("keye_jax.cli", run_name="__main__", alter_sys=True)
