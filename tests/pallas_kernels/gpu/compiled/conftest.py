"""Tests of the compiled kernels: `make test-gpu` on a Hopper GPU. Without one, nothing is collected here."""

from pallas_kernels.dispatch import available

collect_ignore_glob = [] if "mosaic_gpu" in available() else ["test_*.py"]
