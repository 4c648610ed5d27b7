"""Measures every operation beside its baselines: `python -m pallas_kernels.bench`."""
